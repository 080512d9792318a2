"""What the training loop needs of an optimiser engine, and the plain engine of one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tina.errors import NonFiniteError
from tina.jobconfig import TrainConfig
from tina.tensors import write_tensors

Weights = Mapping[str, Tensor]
"""Tensors by the name of their parameter."""


class Engine(Protocol):
    """An optimiser over one or more ranks; `ray_jobs.engine` has DeepSpeed's.

    Where the weights are partitioned, a rank holds a shard of each. `split` and `gather` are
    inverse to each other.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoiser's forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss, averaged over parts and ranks."""

    def step(self) -> None:
        """After the last part of a step: clip, update, clear. After an earlier one: nothing."""

    def shards(self) -> Weights:
        """This rank's shards of the fp32 weights as they are now; not copies."""

    def split(self, full: Weights) -> dict[str, Tensor]:
        """Copies of this rank's shards of full tensors."""

    def gather(self, shards: Weights) -> dict[str, Tensor]:
        """Copies of full tensors, on the CPU, from all ranks' shards. Every rank must call it."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks. Every rank must call it."""


class LocalEngine:
    """The plain engine of one process, for tests and for use without a cluster."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module, self.clip, self.parts = module, config.clip, config.accumulation
        self.optimizer: torch.optim.Optimizer = build_optimiser(module, config)
        self._parts_done = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's forward pass."""
        return cast(Tensor, self.module(*args, **kwargs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        (loss / self.parts).backward()

    def step(self) -> None:
        """After the last part: clip the gradient norm, update, clear.

        Raises:
            NonFiniteError: The gradient is NaN or infinite; nothing is updated.
        """
        self._parts_done += 1
        if self._parts_done % self.parts:
            return
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError(f"the gradient's norm is {norm.item()}; the step was not taken")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shards(self) -> Weights:
        """The weights: one process holds them all."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def split(self, full: Weights) -> dict[str, Tensor]:
        """Copies."""
        place = next(self.module.parameters())
        return {name: value.to(place, copy=True) for name, value in full.items()}

    def gather(self, shards: Weights) -> dict[str, Tensor]:
        """Copies."""
        return {name: value.to("cpu", copy=True) for name, value in shards.items()}

    def mean(self, values: Tensor) -> Tensor:
        """The values: there is one rank."""
        return values

    def save(self, file: Path) -> None:
        """Weights and optimiser state as safetensors."""
        state = self.optimizer.state_dict()["state"]
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"{i}.{key}": value for i, slot in state.items() for key, value in slot.items()}
        write_tensors(file, tensors)

    def load(self, file: Path) -> None:
        """Inverse of `save`."""
        tensors = load_file(file)
        module = {k[7:]: v for k, v in tensors.items() if k.startswith("module.")}
        self.module.load_state_dict(module)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if not name.startswith("module."):
                place, key = name.split(".")
                state.setdefault(int(place), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def build_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as every engine uses it."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.lr,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        fused=True,
    )
