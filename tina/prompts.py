"""What a user says -> class names and conditions; what the task inherits by its prompt alone.

Axes: B batch, K classes, V vocabulary, E embedding width, R values of a head row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tina.asked import Asked, pad
from tina.encoders import EmbeddingSpace, PromptEncoder, TableEncoder
from tina.errors import PromptError
from tina.names import normalise_name, readings
from tina.sparsemax import sparsemax

MAX_CHARACTERS = 1000
MAX_WORDS = 16
"""Of one class, which may be asked for by several."""
Description = str | Sequence[str] | None
"""What a class is asked for by in the place of its name: a text, several, or nothing."""
SHARPNESS = 10.0
"""Cosines are multiplied by this before the sparsemax of `Vocabulary.attention`: a prompt that is
nearer to one class than to any other by 1 / SHARPNESS inherits that class's row alone. Names that
are closer to each other than that sharpen it."""
HIDDEN = -1e6  # far below any cosine
SAME = 1 - 1e-5
"""Cosine above which two names are one to the prompt encoder."""


def check_prompt(
    names: Sequence[str],
    *,
    descriptions: Sequence[Description] | None,
    images: Sequence[object] | None,
    examples: Sequence[object] | None,
    max_classes: int,
) -> tuple[str, ...]:
    """The names of a task as `check_task` has them, if what goes with them does.

    Of pictures it only looks which classes have some: so much can be refused before any is read.

    Raises:
        PromptError: See `check_task` and `check_examples`; or there are not as many of something as
            there are classes, or something beside images; or a text stands twice, or more than
            `MAX_WORDS` for one class.
    """
    names = check_task(names, max_classes=max_classes)
    extras = {"descriptions": descriptions, "images": images, "examples": examples}
    for field, given in extras.items():
        if given is not None and len(given) != len(names):
            count = f"{len(names)} classes need as many {field}, got {len(given)}"
            raise PromptError(count, field=field)
    if images is not None and (descriptions is not None or examples is not None):
        alone = "images stand alone: descriptions and examples go with words"
        raise PromptError(alone, field="images")
    if descriptions is not None:
        try:
            words = described(names, descriptions)
            if not all(0 < len(texts) <= MAX_WORDS for texts in words):
                raise PromptError(f"a class is described by 1 to {MAX_WORDS} texts")
            check_texts([text for texts in words for text in texts], what="text")
        except PromptError as error:
            raise PromptError(str(error), field="descriptions") from None
    if examples is not None:
        check_examples([has_some(shots) for shots in examples])
    return names


def described(
    names: Sequence[str], descriptions: Sequence[Description] | None
) -> list[tuple[str, ...]]:
    """The texts of each class: what describes it, or where nothing does its name."""
    given = [None] * len(names) if descriptions is None else descriptions
    texts: list[Any] = [n if own is None else own for n, own in zip(names, given, strict=True)]
    return [tuple(own) if isinstance(own, (list, tuple)) else (own,) for own in texts]


def has_some(shots: object) -> bool:
    """Whether a class has pictures: neither None nor an empty list."""
    return shots is not None and not (isinstance(shots, (list, tuple)) and not shots)


def is_batch(prompt: Sequence[object]) -> bool:
    """Whether a prompt is a list of tasks; else it is a list of names.

    Raises:
        PromptError: It is neither.
    """
    if not isinstance(prompt, Sequence):
        raise PromptError(f"a prompt is a sentence or lists of class names, got {prompt!r}")
    if odd := [item for item in prompt if not isinstance(item, (str, list, tuple))]:
        raise PromptError(f"class names are text, got {odd[0]!r}")
    kinds = {isinstance(item, str) for item in prompt}
    if len(kinds) > 1:
        raise PromptError("a prompt is a list of names or a list of lists, not a mixture")
    return kinds == {False}


def check_task(names: Sequence[str], *, max_classes: int) -> tuple[str, ...]:
    """The names of a task, cleaned of surrounding white space.

    Raises:
        PromptError: Fewer than 2 names or more than `max_classes`; see `check_texts`.
    """
    names = check_texts(names, what="class name")
    if len(names) < 2:
        how = "separate names by commas, after a colon by semicolons"
        found = f", {shorten(names[0], 60)!r}: {how}" if names else ""
        raise PromptError(f"a task needs at least 2 classes, got {len(names)}{found}")
    if len(names) > max_classes:
        most = f"this generator makes classifiers of at most {max_classes} classes"
        raise PromptError(f"{most}, got {len(names)}")
    return names


def check_texts(texts: Sequence[str], *, what: str) -> tuple[str, ...]:
    """The texts of a task, cleaned of surrounding white space.

    Args:
        what: Each is called in messages.

    Raises:
        PromptError: One is no text, empty or very long, or there twice (case and underscores
            aside).
    """
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise PromptError(f"a {what} is text, got {odd[0]!r}")
    texts = tuple(" ".join(text.split()) for text in texts)
    for text in texts:
        if not normalise_name(text):
            raise PromptError(f"a {what} is empty")
        if len(text) > MAX_CHARACTERS:
            long = f"{len(text)} characters, at most {MAX_CHARACTERS} are taken"
            raise PromptError(f"a {what} has {long}")
    keys = [normalise_name(text) for text in texts]
    if twice := {key for key in keys if keys.count(key) > 1}:
        said = ", ".join(sorted(twice))
        raise PromptError(f"each {what} may stand once in a task; twice: {said}")
    return texts


def check_examples(shown: Sequence[bool]) -> None:
    """Make sure that examples can tell classes apart.

    Args:
        shown: Per class, whether there are some.

    Raises:
        PromptError: There are some of fewer than two classes.
    """
    if sum(shown) < 2:
        few = "examples are needed of two classes at least: they tell these apart"
        raise PromptError(few, field="examples")


def check_apart(names: Sequence[str], shown: Sequence[Collection[bytes]], *, field: str) -> None:
    """Make sure that no picture stands for two classes, as no name does.

    Args:
        shown: Per class its pictures, by whatever bytes tell them apart.
        field: The part of the prompt that they are.

    Raises:
        PromptError: One does.
    """
    first: dict[bytes, str] = {}
    for name, pictures in zip(names, shown, strict=True):
        for picture in pictures:
            if (other := first.setdefault(picture, name)) != name:
                shared = f"a picture may show one class: {other!r} and {name!r} share one"
                raise PromptError(shared, field=field)


def check_distinct(names: Sequence[str], embeddings: Tensor) -> None:
    """Make sure that K names differ to the prompt encoder, by their embeddings (K, E).

    Raises:
        PromptError: Two do not: it knows no emoji, say, or leaves accents out.
    """
    units = F.normalize(embeddings, dim=-1)  # a checkpoint may hold rounded ones
    alike = ((units @ units.T) > SAME).triu(1).nonzero().tolist()
    if alike:
        one, other = (names[i] for i in alike[0])
        raise PromptError(f"{one!r} and {other!r} are the same to the prompt encoder")


def check_pictures(images: Tensor, *, channels: int) -> None:
    """Make sure that images are pictures: float (N, C, H, W) in [0, 1], N above 0.

    Raises:
        PromptError: They are not.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise PromptError(
            f"pictures must be files, Pillow's or tensors (N, C, H, W), N above 0, got {got}"
        )
    if images.shape[1] != channels:
        raise PromptError(f"pictures must have C = {channels}, got {tuple(images.shape)}")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise PromptError("pictures must be floating point, with values in [0, 1]")


def _highest(cosines: Tensor) -> Tensor:
    return cosines.amax(-1).clamp(0, 1)


def _entropy(weights: Tensor) -> Tensor:
    """In nats, of weights (..., V) that add up to one."""
    return torch.special.entr(weights).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The embeddings of a data set's class names, which say what the generator knows.

    Args:
        space: The embedding space; conditions from another one mean nothing here.
        names: V names, as `normalise_name` writes them: the data set's classes, then further words.
        embeddings: (V, E), unit norm.
        trained: bool (V,), false for classes kept out of all training and for further words.
        lent: Which classes of ImageNet the last of the trained are, whose rows the trunk lends.
    """

    space: EmbeddingSpace
    names: tuple[str, ...]
    embeddings: Tensor
    trained: Tensor
    lent: tuple[int, ...] = ()

    @classmethod
    def by(cls, encoder: PromptEncoder, names: Sequence[str], trained: Sequence[int]) -> Vocabulary:
        """The names of a data set's classes as an encoder has them.

        With all words of a table: where a checkpoint is used, the table need not be at hand.

        Args:
            trained: Ids of the classes that are.
        """
        mask = torch.zeros(len(names), dtype=torch.bool)
        mask[list(trained)] = True
        vocabulary = cls(
            space=encoder.space,
            names=tuple(normalise_name(name) for name in names),
            embeddings=encoder.encode_text(names),
            trained=mask,
        )
        if isinstance(encoder, TableEncoder):
            vocabulary = vocabulary.with_words(*encoder.words())
        return vocabulary

    @cached_property
    def _centre(self) -> Tensor:
        # CLIP vectors are crowded (mean cosine about .75): without their common part, what
        # distinguishes classes fills the scale
        return self.embeddings[self.trained].mean(0)

    @cached_property
    def _keys(self) -> Tensor:
        return self._centred(self.embeddings[self.trained])

    @cached_property
    def _sharpness(self) -> float:
        closest = (self._keys @ self._keys.T).fill_diagonal_(-1).max().clamp(max=SAME)
        return max(SHARPNESS, 1.01 / (1 - float(closest)))  # above 1: of what rounding leaves

    def _centred(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings - self._centre, dim=-1)

    @cached_property
    def trained_names(self) -> list[str]:
        """The names of the trained classes, in their order."""
        return [n for n, seen in zip(self.names, self.trained.tolist(), strict=True) if seen]

    @property
    def own_names(self) -> list[str]:
        """Those of them that are the data set's: without what a trunk lends."""
        return self.trained_names[: len(self.trained_names) - len(self.lent)]

    def with_words(self, names: Sequence[str], embeddings: Tensor) -> Vocabulary:
        """With further words, so that prompts may say them where no encoder is at hand.

        A name that is here already keeps its embedding.

        Args:
            embeddings: (W, E), of the W names.
        """
        keys = [normalise_name(name) for name in names]
        new = {key: i for i, key in enumerate(keys) if key not in self._places}
        return replace(
            self,
            names=self.names + tuple(new),
            embeddings=torch.cat([self.embeddings, embeddings[list(new.values())]]),
            trained=torch.cat([self.trained, torch.zeros(len(new), dtype=torch.bool)]),
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in reversed(list(enumerate(self.names)))}

    def lookup(self, name: str) -> Tensor | None:
        """The embedding (E,) of a name by the first of its `readings` that is here, or None."""
        for reading in readings(name):
            if reading in self._places:
                return self.embeddings[self._places[reading]]
        return None

    def of(
        self, tasks: Sequence[Sequence[int]], length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, K, E) of tasks' class ids, padded to `length`, and the mask (B, K)."""
        return pad([self.embeddings[list(class_ids)] for class_ids in tasks], length)

    def condition(self, embeddings: Tensor, *, shrinkage: float = 0.0) -> Tensor:
        """What the denoiser sees of embeddings (..., E): centred, values of about 1.

        It was trained on those of the trained names alone, and a synonym's lies between them.

        Args:
            shrinkage: How far each is drawn to what its row is mixed of, 0..1; a trained name's
                stays where it is.
        """
        units = self._centred(embeddings)
        if shrinkage:
            mixture = self.attention(embeddings) @ self._keys
            units = F.normalize(units.lerp(mixture, shrinkage), dim=-1)
        return units * embeddings.shape[-1] ** 0.5

    def attention(self, embeddings: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Weights (..., V) over the V trained classes, a function of the embedding alone.

        One-hot for a prompt that means one of them, else a sparse mixture of the nearest.

        Args:
            hidden: bool (..., V), as if these had not been trained.
        """
        return self._mixture(self._cosines(embeddings, hidden))

    def familiarity(self, embeddings: Tensor, hidden: Tensor | None = None) -> Tensor:
        """0..1 (...,): centred cosine to the nearest trained class, 1 for a trained name.

        Args:
            hidden: As in `attention`.
        """
        return _highest(self._cosines(embeddings, hidden))

    def asked(self, embeddings: Tensor) -> Asked:
        """Classes that are asked for by one word each, (..., K, E) of unit norm."""
        cosines = self._cosines(embeddings, None)
        familiarity = _highest(cosines)
        return Asked(
            embeddings=embeddings,
            attention=self._mixture(cosines),
            familiarity=familiarity,
            weakest=familiarity,
            breadth=torch.zeros(embeddings.shape[:-1]),
        )

    def asked_by_any(self, words: Sequence[Tensor]) -> Asked:
        """K classes, each of which is any of its words, (M, E) of unit norm.

        Rows inherit of each word alike: the mean of their embeddings is often nearest to one alone.
        """
        counts = [len(own) for own in words]
        each = self.asked(torch.cat(list(words)))
        if set(counts) == {1}:
            return each

        def mean(values: Tensor) -> Tensor:
            return torch.stack([own.mean(0) for own in values.split(counts)])

        embeddings, attention = mean(each.embeddings), mean(each.attention)
        several = torch.tensor(counts).unsqueeze(-1) > 1  # one alone stays as it is, to the bit
        return Asked(
            embeddings=F.normalize(embeddings, dim=-1).where(several, embeddings),
            attention=attention,
            familiarity=mean(each.familiarity),
            weakest=torch.stack([own.amin() for own in each.familiarity.split(counts)]),
            breadth=(_entropy(attention) - mean(_entropy(each.attention))).clamp_min(0),
        )

    def _mixture(self, cosines: Tensor) -> Tensor:
        return sparsemax(self._sharpness * cosines)

    def _cosines(self, embeddings: Tensor, hidden: Tensor | None) -> Tensor:
        found = self._centred(embeddings) @ self._keys.T
        return found if hidden is None else found.masked_fill(hidden, HIDDEN)
