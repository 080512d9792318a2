"""A classifier as ONNX: one exported graph per family, its weights swapped in.

torch's exporter takes seconds, a swap a millisecond.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from tina.classifiers import Classifier
from tina.errors import CheckpointError
from tina.families import Family

OPSET = 18
PREFIX = "network."
"""Of the generated tensors' names in a graph; a trunk's begin with `trunk.`."""
EXPORTED_CLASSES = 2


def export_graph(family: Family) -> bytes:
    """The graph of a family's classifiers (opset 18), of no meaningful weights, for `OnnxGraph`.

    It takes float32 images (N, C, H, W) in [0, 1] of any N, H and W; cuts the centre square,
    resizes and normalises inside. torch's exporter holds Python's lock for most of its seconds.

    Raises:
        CheckpointError: Its trunk is CLIP's image tower, which the exporter cannot take.
    """
    if family.on_clip:
        raise CheckpointError(f"a {family.name} classifier cannot be exported: CLIP's image tower")
    k, side = EXPORTED_CLASSES, family.image_size + 1
    blank = Classifier(family, torch.ones(family.layout(k).size), ("",) * k)
    program = torch.onnx.export(
        blank,
        (torch.rand(2, family.channels, side, side + 1),),
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
    graph = model.graph
    # they say the weights' shapes a second time
    noted = [value for value in graph.value_info if value.name.startswith(PREFIX)]
    for value in noted:
        graph.value_info.remove(value)
    # where the exporter's code lies, half of the file and another in each process
    for part in (graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]
    return model.SerializeToString(deterministic=True)


class OnnxGraph:
    """Any classifier of a family as ONNX, `images` in, `logits` out.

    Args:
        graph: What `export_graph` made of the family.
    """

    def __init__(self, family: Family, graph: bytes) -> None:
        self.family = family
        self._model = onnx.ModelProto.FromString(graph)

    def fill(self, tensors: Mapping[str, Tensor], class_names: tuple[str, ...]) -> bytes:
        """An ONNX file's content.

        Args:
            tensors: The generated tensors under the layout's names.
            class_names: Written into the metadata, in the order of the logits.
        """
        filled = onnx.ModelProto()
        filled.CopyFrom(self._model)
        weights = {tensor.name: tensor for tensor in filled.graph.initializer}
        for slot in self.family.layout(len(class_names)).slots:
            value = tensors[slot.name].detach().cpu().float().contiguous()
            weight = weights[PREFIX + slot.name]
            weight.dims[:] = value.shape
            weight.raw_data = value.numpy().tobytes()
        # beside the head's weights nothing but the answer's shape depends on the number of classes
        filled.graph.output[0].type.tensor_type.shape.dim[1].dim_value = len(class_names)
        filled.metadata_props.add(key="class_names", value=json.dumps(list(class_names)))
        return filled.SerializeToString(deterministic=True)
