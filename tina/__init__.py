"""Tina: text-to-model generation. Name the classes, get the weights of a classifier for them.

from tina import TinaPipeline
pipe = TinaPipeline.from_pretrained("runs/quickstart/checkpoint")
out = pipe(["three", "five", "eight"], seed=0)
out.classifier(images)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tina.pipeline import GeneratedModel, TinaPipeline, load_classifier

__all__ = ["GeneratedModel", "TinaPipeline", "load_classifier"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed, so that `tina --help` answers at once
    if name in __all__:
        from tina import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'tina' has no attribute {name!r}")
