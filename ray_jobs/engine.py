"""DeepSpeed's engine behind `tina.engine.Engine`: ZeRO 0 to 3, checkpoints, change of world size.

Up to stage 2 every rank holds whole fp32 weights; in stage 3 a rank holds a flat, padded partition
of each, and so does its moving average, of which DeepSpeed knows nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from tina.engine import Weights, build_optimiser
from tina.errors import NonFiniteError
from tina.jobconfig import JobConfig
from tina.precision import in_bf16

TAG = "engine"
WORLD = "world.json"


def deepspeed_config(config: JobConfig, world: int, *, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration. Batches are ours, so its batch sizes only have to agree."""
    train, cluster = config.train, config.cluster
    zero: dict[str, Any] = {"stage": cluster.zero_stage}
    if cluster.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.accumulation,
        "train_batch_size": world * train.accumulation,
        "gradient_clipping": train.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # autocast around the engine is switched off inside it; gradients are reduced in fp32
        "torch_autocast": {
            "enabled": in_bf16(train.precision),
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 10**9,
    }


class DeepSpeedEngine:
    """One rank of a DeepSpeed engine.

    Args:
        resume: Folder that `save` wrote, of the same ZeRO stage; it may come from another number
            of ranks.
    """

    def __init__(self, denoiser: nn.Module, config: JobConfig, *, resume: Path | None) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one
        import deepspeed

        self.facts = {
            "world_size": distributed.get_world_size(),
            "zero_stage": config.cluster.zero_stage,
        }
        saved = read_world(resume) if resume else self.facts
        # without ZeRO every rank saved everything, and any number of ranks may read it
        universal = saved != self.facts and self.facts["zero_stage"] > 0
        self.inner, *_ = deepspeed.initialize(
            model=denoiser,
            optimizer=build_optimiser(denoiser, config.train),
            config=deepspeed_config(config, self.facts["world_size"], universal=universal),
            dist_init_required=False,
        )
        self.module: nn.Module = self.inner.module
        self.optimizer: torch.optim.Optimizer = self.inner.optimizer
        if resume and universal:
            with tempfile.TemporaryDirectory() as folder:
                convert(resume / TAG, Path(folder) / TAG)
                self.inner.load_checkpoint(folder, tag=TAG)
            for parameter, slot in self.inner.optimizer.optimizer.state.items():
                # read on the CPU, one for all: a fused optimiser wants its own beside each
                slot["step"] = slot["step"].to(parameter.device, copy=True)
        elif resume:
            self.inner.load_checkpoint(str(resume), tag=TAG)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoiser's forward pass."""
        return cast(Tensor, self.inner(*args, **kwargs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        self.inner.backward(loss)

    def step(self) -> None:
        """After the last part of a step: clip, update, clear.

        Raises:
            NonFiniteError: Under ZeRO, the gradient is NaN or infinite; nothing is updated.
        """
        self.inner.step()
        if getattr(self.optimizer, "overflow", False):  # which DeepSpeed would leave out and go on
            raise NonFiniteError("the gradient is NaN or infinite; the step was not taken")

    def _partition(self, parameter: nn.Parameter) -> Tensor:
        """Stage 3's flat partition of a parameter, padded to the same size on every rank."""
        return cast(Tensor, cast(Any, parameter).ds_tensor)

    @property
    def _partitioned(self) -> bool:
        return self.facts["zero_stage"] == 3

    def shards(self) -> Weights:
        """The rank's fp32 weights: whole, or in stage 3 its partitions."""
        return {
            name: self._partition(p).detach() if self._partitioned else p.detach()
            for name, p in self.module.named_parameters()
        }

    def split(self, full: Weights) -> dict[str, Tensor]:
        """Copies of this rank's shards of full tensors."""
        shards = {}
        for name, own in self.shards().items():
            value = full[name]
            if self._partitioned:
                flat = value.new_zeros(own.numel() * self.facts["world_size"])
                flat[: value.numel()] = value.flatten()
                value = flat.chunk(self.facts["world_size"])[distributed.get_rank()]
            shards[name] = value.to(own.device, copy=True)
        return shards

    def gather(self, shards: Weights) -> dict[str, Tensor]:
        """Copies of full tensors, on the CPU, from all ranks' shards."""
        if not self._partitioned:
            return {name: value.to("cpu", copy=True) for name, value in shards.items()}
        full = {}
        for name, parameter in self.module.named_parameters():
            shape = cast(Any, parameter).ds_shape
            parts = [torch.empty_like(shards[name]) for _ in range(self.facts["world_size"])]
            distributed.all_gather(parts, shards[name].contiguous())
            full[name] = torch.cat(parts)[: shape.numel()].view(shape).cpu()
        return full

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks."""
        distributed.all_reduce(values)
        return values / self.facts["world_size"]

    def save(self, folder: Path) -> None:
        """This rank's part of a resumable state, to be merged with the others' where it is stored.

        Every rank must call it, each for a folder of its own.
        """
        self.inner.save_checkpoint(str(folder), tag=TAG)
        (folder / WORLD).write_text(json.dumps(self.facts))


def read_world(folder: Path) -> dict[str, int]:
    """What wrote a state: its `world_size` and `zero_stage`."""
    return cast(dict[str, int], json.loads((folder / WORLD).read_text()))


def convert(source: Path, target: Path) -> None:
    """A DeepSpeed checkpoint to the universal form, which any number of ranks can read."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed on {source}: {done.stderr.strip()[-2000:]}")
