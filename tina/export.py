"""A classifier as ONNX: one exported graph per family and class count, its weights swapped in.

torch's exporter takes seconds, a swap a millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

import onnx
import torch
from torch import Tensor

from tina.classifiers import Classifier, Family

OPSET = 18
PREFIX = "network."
"""Of the generated tensors' names in a graph; a trunk's begin with `trunk.`."""


class OnnxGraph:
    """The graph of a family's K-class classifiers (opset 18): `images` in, `logits` out.

    Takes float32 images (N, C, H, W) in [0, 1] of any N, H and W; resizes and normalises inside.

    Args:
        num_classes: K.
    """

    def __init__(self, family: Family, *, num_classes: int) -> None:
        self.family, self.layout = family, family.layout(num_classes)

    @cached_property
    def _model(self) -> onnx.ModelProto:
        k, side = self.layout.num_classes, self.family.image_size + 1
        blank = Classifier(self.family, torch.ones(self.layout.size), ("",) * k)
        program = torch.onnx.export(
            blank,
            (torch.rand(2, self.family.channels, side, side + 1),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),),
            # folding could merge a weight into something that has no name
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model: onnx.ModelProto = program.model_proto
        return model

    def fill(self, tensors: Mapping[str, Tensor], class_names: tuple[str, ...]) -> bytes:
        """An ONNX file's content.

        Args:
            tensors: The generated tensors under the layout's names.
            class_names: Written into the metadata, in the order of the logits.
        """
        filled = onnx.ModelProto()
        filled.CopyFrom(self._model)
        weights = {tensor.name: tensor for tensor in filled.graph.initializer}
        for slot in self.layout.slots:
            value = tensors[slot.name].detach().cpu().float().contiguous()
            weights[PREFIX + slot.name].raw_data = value.numpy().tobytes()
        filled.metadata_props.add(key="class_names", value=json.dumps(list(class_names)))
        return filled.SerializeToString(deterministic=True)
