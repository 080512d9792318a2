"""The generator behind the endpoint: loads a checkpoint once, batches what comes in together.

Denoising and forward passes run in one thread of their own, never on the event loop; pictures are
decoded and made small in others, and the one export to ONNX that a replica needs is another
process's.
Callers get every expected refusal as a `Problem` they are given back, not as an exception: Ray
would wrap one, with its traceback, and log it as a failure of the replica.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial, wraps
from importlib.metadata import version
from itertools import accumulate, islice
from multiprocessing import get_context
from typing import Concatenate, ParamSpec, TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor

from serve.batcher import Batcher
from serve.checking import check_request
from serve.ids import Recipe
from serve.made import Made
from serve.making import Making
from serve.metrics import Metrics
from serve.pictures import PICTURES, bounded, pixels_of
from serve.problems import Problem
from serve.reader import Reader
from serve.shown import pack_rows, shift_by, shifted
from tina.advice import placed
from tina.classifiers import predict_many
from tina.config import TextEncoder
from tina.errors import DataError, PromptError
from tina.examples import NEEDLESS, teach
from tina.export import OnnxGraph, export_graph
from tina.images import read_image, shrink
from tina.model import GeneratedModel
from tina.pipeline import TinaPipeline
from tina.schemas import (
    MAX_CLASSES,
    MAX_PIXELS,
    MAX_REQUEST_PIXELS,
    MAX_STEPS,
    Fault,
    Format,
    Info,
    Limits,
    ModelRequest,
)

DECODERS = 2  # threads
OVERHEAD = 1024  # bytes of a cached model beside its theta and names
PICTURES_AT_ONCE = 256  # a large trunk takes seconds for them, and health checks come in between

P = ParamSpec("P")
T = TypeVar("T")


def answering(
    method: Callable[Concatenate[Replica, P], Awaitable[T]],
) -> Callable[Concatenate[Replica, P], Awaitable[T | Problem]]:
    """Give a `Problem` back instead of raising it."""

    @wraps(method)
    async def answer(self: Replica, *args: P.args, **kwargs: P.kwargs) -> T | Problem:
        try:
            return await method(self, *args, **kwargs)
        except Problem as problem:
            return problem

    return answer


class Replica:
    """One copy of the generator.

    Args:
        checkpoint: What `TinaPipeline.from_pretrained` takes.
        encoder: Of the words that it does not know, as `from_pretrained` takes it.
        device: cpu or cuda.
        threads: Of torch.
        max_batch: Prompts of one denoising step, and models of one forward pass.
        max_steps: Denoising steps that a request may ask for; the checkpoint's own number always.
        cache_bytes: Of generated models.
        threshold: Familiarity below which a class is warned of.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        encoder: TextEncoder | None = None,
        device: str,
        threads: int,
        max_batch: int,
        max_steps: int,
        cache_bytes: int,
        threshold: float,
    ) -> None:
        torch.set_num_threads(threads)
        self.pipe = TinaPipeline.from_pretrained(checkpoint, encoder=encoder).to(device)
        diffusion = self.pipe.generator.config.diffusion
        self.most_steps = max(diffusion.sampling_steps, min(max_steps, diffusion.timesteps))
        self.threshold = threshold
        self.metrics = Metrics()
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="torch")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._exporter = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._reader = Reader(self.pipe)
        self._cache: LRUCache[bytes, GeneratedModel] = LRUCache(cache_bytes, getsizeof=size_of)
        making = Making(self.pipe, made=partial(self.metrics.batch, "generate"))
        self._in_hand = asyncio.Semaphore(DECODERS)  # classes whose pictures are in memory
        self._generations = Batcher(making, most=max_batch, executor=self._torch)
        self._predictions = Batcher(self._predict, most=max_batch, executor=self._torch)
        self._probe()  # a checkpoint that cannot generate fails here, before it gets requests

    # --- what the ingress calls ------------------------------------------------------------------

    @answering
    async def create(self, request: ModelRequest, format: Format) -> Made:
        """A model for a new prompt."""
        generator, diffusion = self.pipe.generator, self.pipe.generator.config.diffusion
        names, descriptions = check_request(request, generator, most_steps=self.most_steps)
        embeddings, examples = "", list[Tensor | None]()
        if request.images is not None:
            seen, examples = await self._see(request.images)
            embeddings = pack_rows(seen)
        if request.examples is not None:
            examples = await self._shots(request.examples)
        recipe = Recipe(
            checkpoint=self.pipe.checkpoint,
            classes=names,
            descriptions=descriptions,
            embeddings=embeddings,
            seed=request.seed,
            steps=request.steps or diffusion.sampling_steps,
            guidance=diffusion.guidance if request.guidance is None else request.guidance,
        )
        recipe = self._reader.named(recipe)
        model, anew = await self._model(recipe)
        self.metrics.familiarity.observe(min(model.familiarity))
        if request.strict and (far := model.unfamiliar(self.threshold)):
            faults = [
                Fault(field=f"classes[{i}]", detail=f"familiarity {model.familiarity[i]:.2f}")
                for i in far
            ]
            raise Problem("unfamiliar", f"the threshold is {self.threshold:g}", faults)
        if examples and teach(model.familiarity, [shots is not None for shots in examples]):
            await self._reader.encode(recipe)  # it may have left the encoder's memory
            learn = partial(shift_by, self.pipe, model, recipe, examples)
            recipe = replace(recipe, shift=await _run(self._torch, learn))
            model, anew = shifted(model, recipe.shift), True
        made = await self._made(recipe, model, format, anew=anew)
        if request.examples and not recipe.shift:
            made = replace(made, warnings=(*made.warnings, NEEDLESS))
        return made

    @answering
    async def fetch(self, recipe: Recipe, format: Format) -> Made:
        """The model of a recipe again."""
        self._refuse_gone(recipe)
        model, anew = await self._model(recipe)
        return await self._made(recipe, model, format, anew=anew)

    @answering
    async def predict(self, recipe: Recipe, images: Sequence[bytes]) -> list[list[float]]:
        """Class probabilities (N, K) of a model on picture files."""
        self._refuse_gone(recipe)  # before a picture is looked at: other replicas are asked too

        async def read() -> Tensor:
            await self._refuse_large(images, "images")
            return await self._small(images, "images")

        try:
            async with asyncio.TaskGroup() as group:  # what is left of a refused one is cancelled
                begun = group.create_task(self._model(recipe))
                pictures = group.create_task(read())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        model, _ = begun.result()
        logits = await self._predictions((model, pictures.result()))
        return logits.softmax(-1).tolist()

    async def info(self) -> Info:
        """What is served."""
        generator = self.pipe.generator
        vocabulary, diffusion = generator.vocabulary, generator.config.diffusion
        return Info(
            version=version("tina-text2model"),
            checkpoint=self.pipe.checkpoint,
            families=[generator.family.name],
            dataset=generator.dataset,
            classes=vocabulary.trained_names,
            encoder=self._reader.encoder,
            semantic=self.pipe.is_semantic,
            free_text=self._reader.reads_text,
            steps=diffusion.sampling_steps,
            guidance=diffusion.guidance,
            familiarity_threshold=self.threshold,
            limits=Limits(
                classes=min(generator.max_classes, MAX_CLASSES),
                steps=min(self.most_steps, MAX_STEPS),
            ),
            licences={"code": "Apache-2.0"}
            | ({"trunk": "Apache-2.0"} if generator.family.on_imagenet else {}),
        )

    async def check_health(self) -> None:
        """Generate a real model; Ray Serve replaces the replica when this raises."""
        await _run(self._torch, self._probe)

    # --- what runs in threads --------------------------------------------------------------------

    def _probe(self) -> None:
        self.pipe(list(self.pipe.generator.vocabulary.names[:2]), num_inference_steps=1)

    @cached_property
    def _graph(self) -> OnnxGraph:
        """From a process of its own, or nobody else would be served in the meantime."""
        family = self.pipe.generator.family
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return OnnxGraph(family, process.submit(export_graph, family).result())

    def _to_onnx(self, model: GeneratedModel) -> bytes:
        return self._graph.fill(model.tensors, model.class_names)

    def _predict(
        self, asked: Mapping[int, tuple[GeneratedModel, Tensor]]
    ) -> dict[int, Tensor | Exception]:
        begin = time.perf_counter()
        family, ends = self.pipe.generator.family, accumulate(len(x) for _, x in asked.values())
        count = max(1, sum(end <= PICTURES_AT_ONCE for end in ends))
        asked = dict(islice(asked.items(), count))  # the others come again
        logits = predict_many(
            family,
            [model.theta for model, _ in asked.values()],
            [len(model.class_names) for model, _ in asked.values()],
            [family.embed(inputs) for _, inputs in asked.values()],
        )
        self.metrics.batch("predict", len(asked), time.perf_counter() - begin)
        return dict(zip(asked, logits, strict=True))

    # --- the way of a request --------------------------------------------------------------------

    def _refuse_gone(self, recipe: Recipe) -> None:
        if recipe.checkpoint != self.pipe.checkpoint:
            raise Problem("checkpoint-gone", f"checkpoint {self.pipe.checkpoint} is served now")
        if recipe != self._reader.named(recipe):
            raise Problem("checkpoint-gone", "another encoder reads its texts now")

    async def _model(self, recipe: Recipe) -> tuple[GeneratedModel, bool]:
        """A recipe's model, and whether it was generated now."""
        if recipe.shift:
            plain, anew = await self._model(replace(recipe, shift=""))
            return shifted(plain, recipe.shift), anew
        key = hashlib.sha256(recipe.pack()).digest()  # a recipe of pictures is larger than a model
        model = self._cache.get(key)
        anew = model is None
        self.metrics.lookup(hit=not anew)
        if model is None:
            await self._reader.encode(recipe)
            made = self._generations(recipe)
            self.metrics.waiting.set(len(self._generations))
            try:
                model = await made
            except PromptError as error:  # two names that are one to the prompt encoder
                raise Problem.of_field(recipe.text_field, f"are refused: {error}") from None
            finally:
                self.metrics.waiting.set(len(self._generations))
            if size_of(model) <= self._cache.maxsize:
                self._cache[key] = model
        return model, anew

    async def _made(
        self, recipe: Recipe, model: GeneratedModel, format: Format, *, anew: bool
    ) -> Made:
        content = b""
        if format == "safetensors":
            content = model.to_safetensors()
        elif format == "onnx":
            if model.family.on_clip:
                raise Problem("not-acceptable", f"a {model.family.name} classifier has no ONNX")
            content = await _run(self._exporter, partial(self._to_onnx, model))
        family, warnings = model.family, [*model.unfamiliar(self.threshold).values()]
        if recipe.encoder:
            warnings.append(placed(self._reader.placed(recipe)))
        return Made(
            recipe=recipe,
            familiarity=model.familiarity,
            nearest=model.nearest,
            warnings=tuple(warnings),
            family=family.name,
            parameters=model.theta.numel(),
            input_shape=(family.channels, family.side, family.side),
            content=content,
            anew=anew,
        )

    async def _refuse_large(self, files: Sequence[bytes], field: str) -> None:
        """Refuse pictures that would be decoded for long, before the first of them is."""
        pixels = 0
        for file in files:  # one after another, as they are decoded
            pixels += await _run(self._decoders, partial(pixels_of, file))
        if pixels > MAX_REQUEST_PIXELS:
            most = f"more than {MAX_REQUEST_PIXELS}"
            raise Problem.of_field(field, f"have {pixels} pixels together, {most}", "too-large")

    async def _pictures(
        self, files: Sequence[bytes], field: str, cut: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Pictures (1, C, H, W) one after another, so that requests take turns at the threads."""
        return [await self._picture(f, f"{field}[{i}]", cut) for i, f in enumerate(files)]

    async def _picture(self, file: bytes, field: str, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """A picture (1, C, H, W), made small at once: many large ones fit in no memory."""
        channels = self.pipe.generator.family.channels

        def read() -> Tensor:
            image = read_image(
                bounded(file), channels=channels, max_pixels=MAX_PIXELS, formats=PICTURES
            )
            return cut(image)

        try:
            return await _run(self._decoders, read)
        except DataError as error:
            reason = " ".join(str(error).removeprefix("cannot read the image: ").split())
            raise Problem.of_field(field, f"is no picture that can be read: {reason}") from None

    async def _shots(self, examples: Sequence[Sequence[bytes]]) -> list[Tensor | None]:
        """Inputs (N, ...) of each class that has pictures; of these few at once are in memory."""
        await self._refuse_large([file for files in examples for file in files], "examples")
        embed, found = self.pipe.generator.family.embed, list[Tensor | None]()
        for i, files in enumerate(examples):
            async with self._in_hand:
                small = await self._small(files, f"examples[{i}]") if files else None
                inputs = None if small is None else await _run(self._torch, partial(embed, small))
            found.append(inputs)
        return found

    async def _small(self, files: Sequence[bytes], field: str) -> Tensor:
        """Pictures (N, C, H, W) as the classifiers take them."""
        look_at = self.pipe.generator.family.look_at
        return torch.cat(await self._pictures(files, field, look_at))

    async def _see(self, images: Sequence[Sequence[bytes]]) -> tuple[Tensor, list[Tensor | None]]:
        """Embeddings (K, E) of pictures per class, and what rows may learn from (N, ...) each.

        Of all requests few classes are in memory.
        """
        await self._refuse_large([file for files in images for file in files], "images")
        rows, inputs = list[Tensor](), list[Tensor | None]()
        for i, files in enumerate(images):
            async with self._in_hand:
                shots = await self._pictures(files, f"images[{i}]", shrink)
                row, _, own = await _run(self._torch, partial(self.pipe.see, shots))
            rows.append(row)
            inputs.append(own)
        return torch.stack(rows), inputs


async def _run(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def size_of(model: GeneratedModel) -> int:
    """Bytes of a cached model."""
    return model.theta.nbytes + 4 * sum(map(len, model.class_names)) + OVERHEAD
