"""Every error a user of Tina can cause, as a tree.

    TinaError
    ├── ConfigError        a configuration that cannot be run: unknown key, value out of range
    ├── DataError          a data set, image or zoo that is missing, corrupt or of another kind
    ├── PromptError        a prompt that names no task: 0 or 1 class, duplicates, too many, too long
    ├── CheckpointError    a directory or file that is not what its manifest says
    └── NonFiniteError     a loss, gradient or theta with NaN or infinity in it

Each carries a one-line message; the command line prints it and exits with status 2. Broken
invariants of Tina itself are assertions, not errors of this tree.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteError",
    "PromptError",
    "TinaError",
    "one_line",
]

MOST_CHARACTERS = 500  # a network's missing tensors would fill pages


class TinaError(Exception):
    """Base of the errors that a user can cause and mend."""


class ConfigError(TinaError, ValueError):
    """A configuration that cannot be run."""


class DataError(TinaError, ValueError):
    """A data set, image or zoo that is missing, corrupt or of another kind."""


class PromptError(TinaError, ValueError):
    """A prompt that names no task.

    Args:
        field: The part at fault: classes, descriptions, images or examples.
        advice: For who has the checkpoint; those whom it is served to can do nothing of it.

    Attributes:
        plain: The message without that advice.
    """

    def __init__(self, message: str, *, field: str = "classes", advice: str = "") -> None:
        super().__init__(message + advice)
        self.plain, self.field = message, field


class CheckpointError(TinaError, ValueError):
    """A checkpoint or weight file that is not what it says it is."""


class NonFiniteError(TinaError, ArithmeticError):
    """A NaN or infinity where a finite number belongs."""


class UnfamiliarWarning(UserWarning):
    """A class that is not close to anything the generator was trained on."""


def one_line(error: BaseException) -> str:
    """An error's message, or its type's name where it has none, as one line of bounded length."""
    return " ".join(str(error).split())[:MOST_CHARACTERS] or type(error).__name__
