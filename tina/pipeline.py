"""Prompt -> theta -> classifier: the object that users hold.

Axes: B prompts, K classes (padded), E embedding width, N images, C channels, H W sides in pixels.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeGuard, cast, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tina.advice import unfamiliar, unknown
from tina.asked import Asked, pad, together
from tina.checkpoint import find_checkpoint, load_generator, save_generator
from tina.config import TextEncoder
from tina.encoders import HashEncoder, OpenClipEncoder, PromptEncoder, build_encoder
from tina.errors import CheckpointError, ConfigError, PromptError, UnfamiliarWarning, one_line
from tina.files import hash_file
from tina.generator import Generator
from tina.images import read_image, shrink
from tina.mapped import MappedEncoder
from tina.model import GeneratedModel
from tina.names import read_prompt
from tina.prompts import (
    Description,
    check_apart,
    check_distinct,
    check_pictures,
    check_prompt,
    described,
    has_some,
    is_batch,
)
from tina.storage import MANIFEST, named

Picture = Tensor | str | Path | Image.Image
Shots = Picture | Sequence[Picture]
"""The pictures of a class."""
FILES = (str, Path, Image.Image)


class TinaPipeline:
    """Text-to-model generation from a checkpoint.

    Args:
        checkpoint: sha256 of the manifest, written into every model.
        card: Its model card.
        encoder: See `from_pretrained`.

    Raises:
        ConfigError: There is no such encoder, or the checkpoint has one that reads any text.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        checkpoint: str,
        card: str = "",
        encoder: TextEncoder | None = None,
    ) -> None:
        own = generator.config.prompt.encoder
        if encoder not in (None, own) and own != "table":
            raise ConfigError(f"encoder {encoder}: the checkpoint reads any text by its own, {own}")
        self.generator, self.checkpoint, self.card = generator, checkpoint, card
        self._encoder = encoder

    def __repr__(self) -> str:
        generator = self.generator
        words = len(generator.vocabulary.names)
        return f"TinaPipeline({generator.dataset}, {generator.family.name}; {words} words)"

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, encoder: TextEncoder | None = None
    ) -> TinaPipeline:
        """Load a checkpoint.

        Args:
            name: A checkpoint's folder or URI (`s3://...`); the name of one that comes with Tina,
                as `tina-cifar100-cnn5k`; or a repository of the Hugging Face hub, `owner/name`.
            encoder: What encodes words that the checkpoint does not know, instead of the encoder
                that it names. "open_clip": open_clip's model of its embedding space, which the
                first such word downloads, once. "sentence": MiniLM, from the extra of that name,
                mapped into that space (`tina.mapped`).

        Raises:
            CheckpointError: Missing, or not exactly what its manifest says.
            ConfigError: There is no such encoder, or the checkpoint has one that reads any text.
        """
        if encoder not in (None, *get_args(TextEncoder)):
            kinds = ", ".join(get_args(TextEncoder))
            raise ConfigError(f"encoder must be one of {kinds}, got {encoder!r}")
        with named(str(name)):
            directory = find_checkpoint(str(name))
            generator, card = load_generator(directory), _read_card(directory)
            checkpoint = hash_file(directory / MANIFEST)
        return cls(generator, checkpoint=checkpoint, card=card, encoder=encoder)

    def to(self, device: str | torch.device) -> TinaPipeline:
        """Denoise on a device, such as "cuda"; what comes out lies on the CPU as before.

        Raises:
            ConfigError: There is none such.
        """
        try:
            self.generator.denoiser.to(device)
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(f"cannot denoise on {device}: {one_line(error)}") from error
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint directory, with its card; see `tina.checkpoint`."""
        save_generator(self.generator, Path(directory), card=self.card or "A Tina checkpoint.\n")

    @cached_property
    def encoder(self) -> PromptEncoder:
        """The encoder of the checkpoint's space; only built when a prompt needs it.

        Raises:
            ConfigError: The encoder's space is not the checkpoint's, open_clip has no model of
                that, or MiniLM cannot be mapped into it.
            DataError: Its weights cannot be had.
        """
        own, space = self.generator.config.prompt, self.generator.vocabulary.space
        if self._encoder not in (None, own.encoder):
            if self._encoder == "sentence":
                return MappedEncoder(self.generator.vocabulary)
            return OpenClipEncoder.of(space)
        encoder = build_encoder(own)
        if encoder.space != space:
            raise ConfigError(
                f"the prompt encoder's space is {encoder.space}, "
                f"the checkpoint was trained in {space}"
            )
        return encoder

    def __call__(
        self,
        prompt: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        images: Sequence[Shots] | None = None,
        descriptions: Sequence[Description] | None = None,
        examples: Sequence[Shots | None] | None = None,
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> GeneratedModel | list[GeneratedModel]:
        """Generate classifiers.

        Args:
            prompt: One task (`["otter", "bicycle"]`), a batch of tasks (a list of lists; the result
                is then a list), or one sentence, see `tina.names.read_sentence`.
            images: For one task, in the words' place: per class a picture or a list of some, each
                a file, Pillow's or float32 (N, C, H, W) in [0, 1]; names then only label the rows.
                Those of new classes learn from them as from `examples`, but with CLIP's encoder.
            descriptions: For one task: per class a text that takes the place of its name, several
                of which it is any ("maple tree", "oak tree"), or None.
            examples: For one task, beside the words: per class pictures as in `images`, or None or
                an empty list. Of those that have some the rows of new ones, whose `familiarity` is
                below 1, learn; where there is none, examples change nothing. See `tina.examples`.
            seed: One for all, or one per task of a batch.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 is none.

        Raises:
            PromptError: The prompt names no task; see `tina.prompts.check_prompt`. Or one picture
                is given for two classes.
            DataError: A picture's file cannot be read.
            ConfigError: Steps or guidance that the generator has not.
            NonFiniteError: What it generated holds NaN or infinity.

        Warns:
            UnfamiliarWarning: A class is not close to anything the generator was trained on.
        """
        if isinstance(prompt, str):
            prompt, descriptions = read_prompt(prompt, descriptions)
        batched = prompt is not None and is_batch(prompt)
        extras = {"images": images, "descriptions": descriptions, "examples": examples}
        for field, given in extras.items():
            if given is None:
                continue
            if batched:
                raise PromptError(f"{field} go with one task, not with a batch", field=field)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise PromptError(f"{field} are a list, in the order of the classes", field=field)
        tasks = list(prompt) if batched else [self._one(prompt, images)]  # type: ignore[arg-type]
        most = self.generator.max_classes
        names = [check_prompt(task, **extras, max_classes=most) for task in tasks]  # type: ignore[arg-type]
        seeds = _seeds(seed, len(tasks))
        texts = [described(task, descriptions) for task in names]
        shown: list[Tensor | None] = []
        if images is not None:
            seen = [self.see(shots) for shots in images]
            check_apart(names[0], [_contents(small) for _, small, _ in seen], field="images")
            asked = [self.generator.vocabulary.asked(torch.stack([e for e, _, _ in seen]))]
            shown = [inputs for _, _, inputs in seen]
        else:
            asked = [self.ask(task) for task in texts]
        if examples is not None:
            few = [self._small(self._pictures(x)) if _some(x) else None for x in examples]
            check_apart(names[0], [_contents(small) for small in few], field="examples")
            from tina.examples import teach  # with scipy, which others need not

            if teach(asked[0].familiarity.tolist(), [small is not None for small in few]):
                embed = self.generator.family.embed
                shown = [None if small is None else embed(small) for small in few]
        models = self.generate(
            asked, names, seeds=seeds, steps=num_inference_steps, guidance=guidance_scale
        )
        if shown:
            from tina.examples import learn_from

            theta = learn_from(self.generator, models[0].theta, asked[0].familiarity, shown)
            models = [replace(models[0], theta=theta)]
        for model, own in zip(models, texts, strict=True):
            for warning in unfamiliar(model, own if images is None else None):
                warnings.warn(warning, UnfamiliarWarning, stacklevel=2)
        return models if batched else models[0]

    @staticmethod
    def _one(prompt: object, images: Sequence[object] | None) -> Sequence[str]:
        if prompt is None and images is not None:
            return [f"class {i + 1}" for i in range(len(images))]
        if prompt is None:
            raise PromptError("a prompt is needed: class names, a sentence or images")
        return prompt  # type: ignore[return-value]

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """Unit embeddings (K, E): the checkpoint's own for the names it knows, else encoded.

        Raises:
            PromptError: One that its encoder does not know either, or two that are one to it.
        """
        vocabulary = self.generator.vocabulary
        known = [vocabulary.lookup(name) for name in names]
        new = [name for name, vector in zip(names, known, strict=True) if vector is None]
        if new and not self.reads_text:
            raise unknown(new, vocabulary.names)
        encoded = iter(self.encoder.encode_text(new)) if new else iter(())
        found = torch.stack([next(encoded) if vector is None else vector for vector in known])
        check_distinct(names, found)
        return found

    def ask(self, words: Sequence[Sequence[str]]) -> Asked:
        """What a task is generated by, of the texts of each class.

        Raises:
            PromptError: See `embed_names`.
        """
        found = self.embed_names([text for texts in words for text in texts])
        return self.generator.vocabulary.asked_by_any(found.split([len(x) for x in words]))

    @property
    def is_semantic(self) -> bool:
        """Whether related words have related vectors."""
        return self.generator.vocabulary.space != HashEncoder.space

    @property
    def reads_text(self) -> bool:
        """Whether words that the checkpoint does not know can be encoded."""
        return bool(self._encoder) or self.generator.config.prompt.encoder != "table"

    def embed_images(self, images: Sequence[Shots]) -> Tensor:
        """Unit embeddings (K, E) of pictures per class, see `__call__`.

        Of their centre squares, through the image tower of a checkpoint's own open_clip; otherwise
        by the names that they are taken for (`Generator.embed_shots`).

        Raises:
            PromptError: A class has no pictures, or they are none.
            DataError: A picture's file cannot be read.
        """
        return torch.stack([self.see(shots)[0] for shots in images])

    def see(self, shots: Shots) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a class's pictures the embedding (E,), them made small, what its row may learn from.

        The last two are (N, C, H, W) and (N, ...). Raises what `embed_images` raises.
        """
        parts = [shrink(part) for part in self._pictures(shots)]  # as they are sent to an endpoint
        small, generator = self._small(parts), self.generator
        if generator.config.prompt.encoder == "open_clip":
            seen = [self.encoder.encode_images(part) for part in parts]
            # CLIP's pictures lie apart from its texts: their familiarity says nothing of newness
            return F.normalize(torch.cat(seen).mean(0), dim=-1), small, None
        inputs = generator.family.embed(small)
        named = generator.embed_shots(small) if generator.tower else generator.embed_seen(inputs)
        return named, small, inputs

    def _small(self, parts: Sequence[Tensor]) -> Tensor:
        """Pictures (N, C, H, W) as the family looks at them, each of a size of its own."""
        return torch.cat([self.generator.family.look_at(part.float()) for part in parts])

    def _pictures(self, shots: Shots) -> list[Tensor]:
        """One class's pictures as they were given, (N, C, H, W) each."""
        if not _some(shots):
            raise PromptError("a class has no pictures")
        several = list(shots) if isinstance(shots, (list, tuple)) else [cast(Picture, shots)]
        channels = self.generator.family.channels
        parts = [
            read_image(part, channels=channels) if isinstance(part, FILES) else part
            for part in several
        ]
        for part in parts:
            check_pictures(part, channels=channels)
        return parts

    def generate(
        self,
        asked: Sequence[Asked],
        names: Sequence[tuple[str, ...]],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[GeneratedModel]:
        """What `__call__` does with prompts once they are checked and encoded.

        Args:
            names: Per task, what its rows are called.
        """
        generator = self.generator
        steps = generator.config.diffusion.sampling_steps if steps is None else steps
        padded, mask = pad([task.embeddings for task in asked])
        tokens = generator.denoised(padded, mask, seeds=seeds, steps=steps, guidance=guidance)
        return self.models(tokens, asked, names, seeds=seeds, steps=[steps] * len(names))

    def models(
        self,
        tokens: Tensor,
        asked: Sequence[Asked],
        names: Sequence[tuple[str, ...]],
        *,
        seeds: Sequence[int],
        steps: Sequence[int],
    ) -> list[GeneratedModel]:
        """The classifiers of denoised tokens (B, S + K, P); the rest per task.

        Raises:
            NonFiniteError: See `Generator.finish`.
        """
        generator = self.generator
        body, rows = generator.finish(tokens, *together(asked))
        known = generator.vocabulary.trained_names
        return [
            GeneratedModel(
                theta=generator.theta(body[i], rows[i, : len(task)]),
                family=generator.family,
                class_names=task,
                familiarity=tuple(round(share, 6) for share in asked[i].weakest.tolist()),
                nearest=tuple(known[place] for place in asked[i].attention.argmax(-1)),
                seed=seeds[i],
                steps=steps[i],
                checkpoint=self.checkpoint,
            )
            for i, task in enumerate(names)
        ]


def _read_card(directory: Path) -> str:
    try:
        return (directory / "README.md").read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no model card: {one_line(error)}") from error


def _some(shots: Shots | None) -> TypeGuard[Shots]:
    return has_some(shots)


def _contents(images: Tensor | None) -> list[bytes]:
    """The bytes of each of N images (N, C, H, W), if there are any."""
    return [] if images is None else [i.tobytes() for i in images.detach().cpu().numpy()]


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One per task, of any type of integer."""
    try:
        if hasattr(seed, "__index__") and not getattr(seed, "shape", ()):
            seeds = [operator.index(seed)] * count
        else:
            seeds = [operator.index(s) for s in seed]  # type: ignore[union-attr]
    except TypeError:
        raise PromptError(f"a seed is an integer, or one per task, got {seed!r}") from None
    if len(seeds) != count:
        raise PromptError(f"{count} tasks need as many seeds, got {len(seeds)}")
    if odd := [s for s in seeds if not 0 <= s < 2**63]:
        raise PromptError(f"a seed must lie in 0..2^63 - 1, got {odd[0]}")
    return seeds
