"""What a failed job says last: the reason under what Ray wraps around it, and what would help."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from errno import EMFILE, ENFILE
from textwrap import shorten

from tina.errors import TinaError

MOST_CHARACTERS = 500  # of a last line; the traceback above it has them all
LESS_MEMORY = {
    "a pool worker": "lower cluster.zoo_block (on a GPU zoo_block_gpu) or cluster.zoo_workers",
    "training rank": "raise train.accumulation or cluster.zero_stage, set cluster.offload or "
    "cluster.activation_checkpointing, or lower cluster.train_workers",
    "the job's own process": "run it on a machine with more memory",
}


def explain(error: Exception, job: str) -> tuple[int, str]:
    """A job's exit code and, for its last line, what went wrong; a bug's traceback is printed."""
    wrapped = list(layers(error))
    cause = wrapped[-1]
    words, *_ = str(cause).split("\nFailed to apply UDF transform")  # Ray Data adds how often
    lines = words.strip().splitlines() or [""]
    if getattr(cause, "actor_init_failed", False):
        lines = lines[-1:]  # all that Ray keeps of it is a traceback, and that ends in the error
    message = " ".join(" ".join(lines).split())
    code = 1
    who, cure = _who(wrapped)
    if _out_of_memory(cause):
        # Ray's own account goes on for a page, with a list of the node's processes
        fact = re.search(r"Memory on the node .*? limit", message)
        message = fact[0] if fact else shorten(message, MOST_CHARACTERS)
        message = f"{job}: {who} ran out of memory ({message}): {cure}"
    elif isinstance(cause, (TinaError, OSError)) and not (_is_rays(cause) or _is_broken(cause)):
        code = 2
    else:
        traceback.print_exception(error)
        message = shorten(f"{type(cause).__name__}: {message}", MOST_CHARACTERS)
        if "SIGKILL" in words:  # as the kernel does, which leaves no word of it
            message += f" If memory ran out: {cure}"
    return code, message


def _who(wrapped: Sequence[BaseException]) -> tuple[str, str]:
    """Which process failed, and how it would need less memory."""
    for layer in wrapped:
        if ranks := getattr(layer, "worker_failures", None):
            return f"training rank {_culprit(ranks)}", LESS_MEMORY["training rank"]
    who = "a pool worker" if any(map(_is_rays, wrapped)) else "the job's own process"
    return who, LESS_MEMORY[who]


def _is_broken(error: BaseException) -> bool:
    """Whether an OSError is of a connection or of too many open files, which no user can mend."""
    lost = isinstance(error, (ConnectionError, TimeoutError))
    return lost or getattr(error, "errno", None) in (EMFILE, ENFILE)


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "ray"


def _out_of_memory(error: BaseException) -> bool:
    """Killed by Ray for it, refused by Python, by CUDA or by torch's CPU allocator."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in ("low on memory", "allocate memory"))
    )


def _culprit(failures: Mapping[int, BaseException]) -> int:
    """The rank to blame: it died or says what was wrong; the others only lost their peer."""

    def vague(rank: int) -> bool:
        root = list(layers(failures[rank]))[-1]
        return not (_out_of_memory(root) or _is_rays(root) or isinstance(root, TinaError))

    return min(failures, key=vague)


def layers(error: BaseException) -> Iterator[BaseException]:
    """An error and what it wraps, down to what was raised in the worker."""
    yield error
    ranks = getattr(error, "worker_failures", None)
    inner = (
        getattr(error, "cause", None)  # a task's or an actor's
        or getattr(error, "controller_failure", None)  # Ray Train's
        or getattr(error, "health_check_failure", None)  # its, of a rank that is gone
        or (ranks and ranks[_culprit(ranks)])
    )
    if isinstance(inner, BaseException):
        yield from layers(inner)
