"""From a folded network to ONNX.

Two graphs come of it. The *core* maps `(pixel - 128) / 64` to probabilities; it is what TFLite is
made from, since an int8 tensor of scale 1/64 is the pixel minus 128 itself. model.onnx is the core
with those two operations in front: raw pixels in.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import onnxsim
import torch
from onnx import helper, numpy_helper
from torch import nn

from ghostedge.errors import GhostEdgeError, in_a_line
from ghostedge.pixels import MIDDLE, STEP, PixelContract

IMAGE, PROBABILITIES = "image", "probabilities"
PRODUCER = "ghostedge"
"""Names a model that takes raw pixels and gives probabilities."""
TFLITE_OPSET = 17
"""What TFLite is made from, whatever opset model.onnx has: from 18 on, onnx2tf 1.29 resizes odd maps
wrongly."""


def core(
    deployed: nn.Module, pixels: PixelContract, opset: int, softmax: bool = True
) -> onnx.ModelProto:
    """Export (batch, 3, size, size) values `(pixel - 128) / 64` -> (batch, classes) probabilities.

    The batch axis is free; `softmax` adds one to a net that ends in logits. A pixel contract other
    than the default becomes a 1x1 depthwise convolution in front, which is exact also where the first
    convolution pads.
    """
    parts: list[nn.Module] = [deployed, *[nn.Softmax(1)] * softmax]
    if not pixels.is_default:
        parts.insert(0, _reading(pixels))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of sizes it makes constant, as is meant
        torch.onnx.export(
            nn.Sequential(*parts).eval(),
            (torch.zeros(1, 3, pixels.size, pixels.size),),
            buffer,  # type: ignore[arg-type]  # it takes any binary file
            dynamo=False,
            opset_version=opset,
            input_names=[IMAGE],
            output_names=[PROBABILITIES],
            dynamic_axes={IMAGE: {0: "batch"}, PROBABILITIES: {0: "batch"}},
        )
    return onnx.load_model_from_string(buffer.getvalue())


def _reading(pixels: PixelContract) -> nn.Conv2d:
    """Return the depthwise convolution from `(pixel - 128) / 64` to `(pixel - mean) / std`."""
    conv = nn.Conv2d(3, 3, 1, groups=3)
    assert conv.bias is not None
    for values, wanted in zip((conv.weight, conv.bias), pixels.from_default(), strict=True):
        values.data[:] = torch.from_numpy(wanted).reshape(values.shape)
    return conv


def with_raw_pixels(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that takes pixels 0-255 and subtracts 128 and divides by 64 itself: exact."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for node in graph.node:
        node.input[:] = ["normalized" if name == IMAGE else name for name in node.input]
    for name, value in (("pixel_middle", MIDDLE), ("pixel_step", 1 / STEP)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    graph.node.insert(0, helper.make_node("Sub", [IMAGE, "pixel_middle"], ["centred"], "centre"))
    scaling = helper.make_node("Mul", ["centred", "pixel_step"], ["normalized"], "normalize")
    graph.node.insert(1, scaling)
    return result


def simplified(model: onnx.ModelProto, batch: int | None = None) -> onnx.ModelProto:
    """Return the model after onnxsim, with a fixed batch where one is given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if batch is not None:
        for value in (*copy.graph.input, *copy.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        del copy.graph.value_info[:]
    try:
        result, _ = onnxsim.simplify(copy, check_n=0)  # the pipeline's own check follows
    except Exception as error:  # of its checker and of its C++, which share no base
        raise GhostEdgeError(
            f"onnxsim cannot read the graph ({in_a_line(error)}): export the model again, "
            "with opset 17 and without control flow."
        ) from error
    return result
