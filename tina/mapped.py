"""Free text for a checkpoint that knows words alone: MiniLM's vectors, mapped into its space.

Kernel ridge regression from MiniLM's vectors of the words that a checkpoint knows to its own of
them, so that a new text lands among the words that it is like. That is not where the encoder of the
checkpoint's space would put it, and a rare word may land anywhere: its familiarity is low then.
`benchmarks.texts` measures what such texts cost.

Axes: B texts, W known words, S MiniLM's width, E the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tina.encoders import PromptEncoder, SentenceEncoder
from tina.errors import ConfigError
from tina.files import hash_bytes
from tina.prompts import Vocabulary
from tina.storage import cached, user_cache

GAMMA, ALPHA = 1.5, 0.1
"""Of the kernel and of the ridge, by cross-validation over the packaged vocabularies
(docs/log.md)."""
LEAST_WORDS = 500
"""The fewer there are, the less a new text's place has to do with its meaning (docs/log.md)."""


class MappedEncoder(PromptEncoder):
    """Any English text -> unit vectors (B, E) in a checkpoint's space.

    Attributes:
        keys: Float64 (W, S), what the kernel compares a text with.
        duals: Float64 (W, E), by which its values are summed.
        mean: Float64 (E,), what that is added to.

    Raises:
        ConfigError: The vocabulary is too small to learn from, or the extra `sentence` is not
            installed.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        space, known = vocabulary.space, len(vocabulary.names)
        if known < LEAST_WORDS:
            raise ConfigError(
                f"MiniLM places a text among {LEAST_WORDS} known words or more, and the "
                f"checkpoint, whose space is {space.model}, knows {known}"
            )
        self._sentences = SentenceEncoder(template="{}")
        sentences = _read(vocabulary.names, self._sentences).double()  # (W, S)
        vectors = vocabulary.embeddings.double()  # (W, E)
        self._middle, self.mean = sentences.mean(0), vectors.mean(0)
        self.keys = self._centred(sentences)
        gram = self.kernel(self.keys) + ALPHA * torch.eye(known, dtype=torch.double)  # (W, W)
        self.duals = torch.linalg.solve(gram, vectors - self.mean)  # (W, E)
        model = f"{self._sentences.space.model} mapped into {space.model}"
        self.space = replace(space, model=model, template="{}")

    def _centred(self, sentences: Tensor) -> Tensor:
        return F.normalize(sentences - self._middle, dim=-1)

    def kernel(self, queries: Tensor) -> Tensor:
        """exp(-gamma |q - k|^2) of unit vectors: (..., S) -> (..., W)."""
        return torch.exp(-2 * GAMMA * (1 - queries @ self.keys.T))

    def query(self, phrase: str) -> Tensor:
        """What the kernel compares with the keys: float64 (S,)."""
        [(_, sentences)] = self._sentences.encode_many([phrase])
        return self._centred(sentences[0].double())

    def _encode(self, phrase: str) -> Tensor:
        found = self.kernel(self.query(phrase)) @ self.duals + self.mean
        return F.normalize(found, dim=-1).float()


def _read(names: Sequence[str], encoder: SentenceEncoder) -> Tensor:
    """Vectors (W, S) of a vocabulary, kept in the user cache: reading thousands takes seconds."""
    key = "\n".join((version(encoder.PACKAGE), *names))
    file = user_cache() / "sentences" / f"{hash_bytes(key.encode())[:32]}.safetensors"
    shape = (len(names), encoder.space.dim)

    def read(file: Path) -> Tensor:
        found = load_file(file)["sentences"]
        if found.shape != shape or not torch.isfinite(found).all():
            raise ValueError(f"{tuple(found.shape)} values, or not all of them finite")
        return found

    def make() -> Tensor:
        sentences = torch.empty(shape)
        with tqdm(total=len(names), desc="reading known words", delay=1, disable=None) as bar:
            for places, vectors in encoder.encode_many(names):
                sentences[places] = vectors
                bar.update(len(places))
        return sentences

    def write(file: Path, sentences: Tensor) -> None:
        save_file({"sentences": sentences}, file)

    return cached(file, read=read, make=make, write=write)
