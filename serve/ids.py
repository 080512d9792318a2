"""Model ids: a model is its recipe, and the recipe travels in the id.

An id is base64url(tag || deflate(recipe)), with tag the first 16 bytes of HMAC-SHA256 under a key
that all replicas share. No replica holds state that could be lost: any of them makes the same
model again. A recipe too large for that lies in shared storage under its hash, for a time, or until
there is no more room.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import secrets
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serve.problems import Problem
from tina.files import hash_bytes, write_bytes
from tina.schemas import MAX_ID_CHARACTERS

TAG_BYTES = 16
STORED = b"stored:"
SHORT_BYTES = MAX_ID_CHARACTERS * 3 // 4 - TAG_BYTES - 64
"""A packed recipe of at most this fits an id, however little deflate finds in it."""
MAX_STORED_BYTES = 2**30
"""Of all stored recipes together: the folder may share its volume with runs."""
UNKNOWN = "it is no id of this service, or not a whole one"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a model is made of.

    Args:
        checkpoint: sha256 of the manifest.
        classes: Names.
        descriptions: Per class a text in place of its name, or several; or none at all.
        embeddings: base64 of float32 (K, E), from pictures in place of names, or empty.
        shift: base64 of float32 (K, R), what examples added to the head's rows, or empty.
        encoder: Of texts that the checkpoint does not know, where it is not of its own space, or
            empty.
    """

    checkpoint: str
    classes: tuple[str, ...]
    descriptions: tuple[str | tuple[str, ...], ...] = ()
    embeddings: str = ""
    shift: str = ""
    encoder: str = ""
    seed: int
    steps: int
    guidance: float

    @property
    def words(self) -> tuple[tuple[str, ...], ...]:
        """The texts of each class; nothing where pictures are."""
        given = () if self.embeddings else self.descriptions or self.classes
        return tuple((texts,) if isinstance(texts, str) else texts for texts in given)

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them: what is encoded."""
        return tuple(text for texts in self.words for text in texts)

    @property
    def maker(self) -> str:
        """What a replica must have for it: the checkpoint, and the encoder if one is named."""
        return f"{self.checkpoint} {self.encoder}".strip()

    @property
    def text_field(self) -> str:
        """The field of a request that they come in."""
        return "descriptions" if self.descriptions else "classes"

    def pack(self) -> bytes:
        """Canonical: equal recipes give equal bytes."""
        younger = ("shift", "encoder")  # than the first ids
        found = {key: value for key, value in vars(self).items() if value or key not in younger}
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Recipe:
        """Inverse of `pack`; only for bytes that were signed."""
        found = json.loads(packed)
        for key in ("classes", "descriptions"):
            found[key] = tuple(tuple(x) if isinstance(x, list) else x for x in found[key])
        return cls(**found)


def load_key(storage: Path) -> bytes:
    """The key in the shared storage; whoever comes first makes it."""
    storage.mkdir(parents=True, exist_ok=True)
    file = storage / "key"
    if not file.exists():
        own = storage / f".key.{secrets.token_hex(8)}"
        own.touch(mode=0o600)
        own.write_bytes(secrets.token_bytes(32))
        try:
            os.link(own, file)  # fails where another replica was first
        except FileExistsError:
            pass
        finally:
            own.unlink()
    return file.read_bytes()


class Ids:
    """Recipes to ids and back.

    Args:
        key: Of the HMAC.
        storage: Folder that all replicas share.
        keep_s: Seconds for which a large recipe is kept after it was last named.
    """

    def __init__(self, key: bytes, *, storage: Path, keep_s: float) -> None:
        self._key, self._storage, self._keep_s = key, storage / "prompts", keep_s
        self._swept = 0.0
        self._written = 0  # bytes, since then

    def short(self, recipe: Recipe) -> str | None:
        """The id of a recipe with no file to write and nothing long to compress; else None."""
        packed = recipe.pack()
        return self._sign(zlib.compress(packed, 9)) if len(packed) <= SHORT_BYTES else None

    def issue(self, recipe: Recipe) -> str:
        """The id of a recipe; may take a while."""
        packed = zlib.compress(recipe.pack(), 9)
        name = self._sign(packed)
        if len(name) <= MAX_ID_CHARACTERS:
            return name
        digest = hash_bytes(packed)
        file = self._storage / digest
        try:
            os.utime(file)
        except FileNotFoundError:  # new, or swept just now
            write_bytes(file, packed)
            self._written += len(packed)
        self._sweep()
        return self._sign(STORED + digest.encode())

    def read(self, name: str) -> Recipe:
        """The recipe of an id.

        Raises:
            Problem: Not issued under this key, or its recipe is no longer stored.
        """
        try:
            signed = base64.b64decode(name + "=" * (-len(name) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raise Problem("unknown-model", UNKNOWN) from None
        packed = signed[TAG_BYTES:]
        # compared as text: base64 has several spellings of the same bytes
        if not hmac.compare_digest(self._sign(packed), name):
            raise Problem("unknown-model", UNKNOWN)
        if packed.startswith(STORED):
            file = self._storage / packed.removeprefix(STORED).decode()
            try:
                age = time.time() - file.stat().st_mtime
                if age > self._keep_s:
                    raise FileNotFoundError
                packed = file.read_bytes()
                if hash_bytes(packed) != file.name:
                    file.unlink()  # cut short: the prompt writes it anew when it comes again
                    raise FileNotFoundError
                if age > self._keep_s / 100:
                    os.utime(file)  # in use
            except FileNotFoundError:
                raise Problem("prompt-gone", "its pictures or texts are no longer stored") from None
        return Recipe.unpack(zlib.decompress(packed))

    def _sign(self, packed: bytes) -> str:
        tag = hmac.digest(self._key, packed, "sha256")[:TAG_BYTES]
        return base64.urlsafe_b64encode(tag + packed).rstrip(b"=").decode()

    def _sweep(self) -> None:
        """Remove what nobody has named for long, and of too much what nobody has for longest.

        At most once in a tenth of that time, or of that much.
        """
        now = time.time()
        if now - self._swept < self._keep_s / 10 and self._written < MAX_STORED_BYTES / 10:
            return
        self._swept, self._written = now, 0
        found = []
        for file in self._storage.iterdir():
            with suppress(FileNotFoundError):  # another replica was faster
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
        left = sum(size for _, size, _ in found)
        for named, size, file in sorted(found):
            if named >= now - self._keep_s and left <= MAX_STORED_BYTES:
                break
            file.unlink(missing_ok=True)
            left -= size
