"""One denoising pass that prompts join, and leave as models, at any of its steps.

The denoiser is told the timestep of each sample, so that one pass serves samples of any age: a
prompt waits for the step that runs, not for the models of those before it, while there is room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serve.ids import Recipe
from serve.shown import asked_by
from tina.asked import Asked, pad
from tina.diffusion import Walk, advance, join
from tina.errors import TinaError
from tina.model import GeneratedModel
from tina.pipeline import TinaPipeline


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt in the making; `begun` as `time.perf_counter` has it."""

    ticket: int
    recipe: Recipe
    asked: Asked
    begun: float


class Making:
    """The prompts in the making; what a `Batcher` runs.

    Args:
        made: Called for each model that is made, with the prompts in its last step and its time in
            the making in seconds.
    """

    def __init__(self, pipe: TinaPipeline, *, made: Callable[[int, float], None]) -> None:
        self._pipe, self._made = pipe, made
        # prompts choose their number of steps, so that any timestep may come
        self._denoise = pipe.generator.denoise_at(range(pipe.generator.config.diffusion.timesteps))
        self._tasks: list[Sample] = []  # in the order of the walk's samples
        self._walk: Walk | None = None

    def __call__(self, asked: Mapping[int, Recipe]) -> dict[int, GeneratedModel | Exception]:
        """Take one denoising step.

        Args:
            asked: All recipes that are still wanted, by ticket: new ones join, and those in the
                making that are no longer among them are dropped.

        Returns:
            The models that are made, and why others cannot be, by ticket.
        """
        self._keep([i for i, task in enumerate(self._tasks) if task.ticket in asked])
        found = self._join(asked)
        if self._walk:
            self._walk = advance(self._denoise, self._walk)
            found |= self._finish(self._walk)
        return found

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) < len(self._tasks):
            self._tasks = [self._tasks[i] for i in rows]
            self._walk = self._walk.take(rows) if self._walk and rows else None

    def _join(self, asked: Mapping[int, Recipe]) -> dict[int, GeneratedModel | Exception]:
        failed: dict[int, GeneratedModel | Exception] = {}
        alike: dict[tuple[int, float], list[Sample]] = {}  # by steps and guidance: begun together
        known = {task.ticket for task in self._tasks}
        for ticket in [ticket for ticket in asked if ticket not in known]:
            recipe = asked[ticket]
            try:
                asked_for = asked_by(self._pipe, recipe)
            except TinaError as error:
                failed[ticket] = error
                continue
            alike.setdefault((recipe.steps, recipe.guidance), []).append(
                Sample(ticket=ticket, recipe=recipe, asked=asked_for, begun=time.perf_counter())
            )
        walks = [self._walk] if self._walk else []
        for (steps, guidance), tasks in alike.items():
            walk = self._pipe.generator.begin(
                *pad([task.asked.embeddings for task in tasks]),
                seeds=[task.recipe.seed for task in tasks],
                steps=steps,
                guidance=guidance,
            )
            walks.append(walk)
            self._tasks += tasks
        if alike:
            self._walk = join(walks)
        return failed

    def _finish(self, walk: Walk) -> dict[int, GeneratedModel | Exception]:
        """The models of the samples that are at their end, which leave."""
        ended = [i for i, ahead in enumerate(walk.ahead) if not ahead]
        if not ended:
            return {}
        tasks, models = [self._tasks[i] for i in ended], self._models(walk, ended)
        now = time.perf_counter()
        for task in tasks:
            self._made(len(walk.ahead), now - task.begun)
        self._keep([i for i, ahead in enumerate(walk.ahead) if ahead])
        return {task.ticket: model for task, model in zip(tasks, models, strict=True)}

    def _models(self, walk: Walk, ended: Sequence[int]) -> Sequence[GeneratedModel | Exception]:
        """What the samples at these places have become; no failure is another's."""
        tasks = [self._tasks[i] for i in ended]
        try:
            return self._pipe.models(
                walk.take(ended).x,
                [task.asked for task in tasks],
                [task.recipe.classes for task in tasks],
                seeds=[task.recipe.seed for task in tasks],
                steps=[task.recipe.steps for task in tasks],
            )
        except TinaError as error:
            if len(ended) == 1:
                return [error]
            return [model for i in ended for model in self._models(walk, [i])]
