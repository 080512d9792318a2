"""Tina: text-to-model generation. Name the classes, get the weights of a classifier for them.

from tina import TinaPipeline
from tina.images import read_image
pipe = TinaPipeline.from_pretrained("tina-cifar100-cnn5k")
out = pipe(["otter", "bicycle", "maple tree"], seed=0)
out.classifier(read_image("photo.jpg", channels=3)).softmax(1)
out.save("mine.safetensors")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tina.model import GeneratedModel, load_classifier
    from tina.pipeline import TinaPipeline

__all__ = ["GeneratedModel", "TinaPipeline", "load_classifier"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed, so that `tina --help` answers at once
    if name in __all__:
        from tina import model, pipeline

        return getattr(pipeline if name == "TinaPipeline" else model, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("tina-text2model")
    raise AttributeError(f"module 'tina' has no attribute {name!r}")
