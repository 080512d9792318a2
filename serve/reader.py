"""Texts that the checkpoint does not know, encoded beside the denoising pass."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from serve.ids import Recipe
from serve.problems import Problem
from tina.errors import DataError, PromptError
from tina.mapped import MappedEncoder
from tina.pipeline import TinaPipeline

log = logging.getLogger("ray.serve")


class Reader:
    """A replica's encoder, loaded when it is made.

    Attributes:
        reads_text: Whether it takes texts that the checkpoint does not know.
        encoder: What turns words into conditions.

    Raises:
        ConfigError: There can be none; without its weights, what the checkpoint knows is served.
    """

    def __init__(self, pipe: TinaPipeline) -> None:
        self._pipe, self.reads_text = pipe, pipe.reads_text
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self.encoder, self._maps = pipe.generator.vocabulary.space.model, False
        if self.reads_text:
            try:
                self.encoder = pipe.encoder.space.model
                self._maps = isinstance(pipe.encoder, MappedEncoder)
            except DataError as error:
                log.error("no encoder: %s", error)
                self.reads_text = False

    def placed(self, recipe: Recipe) -> list[str]:
        """The texts of a recipe that are placed by another encoder than that of the space."""
        return self._unknown(recipe) if self._maps else []

    def named(self, recipe: Recipe) -> Recipe:
        """A recipe as it is made here: with the encoder, where it places a text."""
        return replace(recipe, encoder=self.encoder if self.placed(recipe) else "")

    async def encode(self, recipe: Recipe) -> None:
        """Encode what is unknown, which the denoising pass then finds among what is remembered.

        Raises:
            Problem: It cannot be encoded.
        """
        if not self._unknown(recipe):
            return
        if self._pipe.reads_text and not self.reads_text:
            why = "cannot be encoded: this server has no encoder for it"
            raise Problem.of_field(recipe.text_field, why)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._pipe.embed_names, recipe.texts)
        except PromptError as error:
            why = f"cannot be encoded: {error.plain}"
            raise Problem.of_field(recipe.text_field, why) from None

    def _unknown(self, recipe: Recipe) -> list[str]:
        lookup = self._pipe.generator.vocabulary.lookup
        return [text for text in recipe.texts if lookup(text) is None]
