"""ONNX files of any origin: what is in them, checked, and the core graph that is made of one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, external_data_helper, helper, inliner, numpy_helper, version_converter

from ghostedge.bundle import label_lines
from ghostedge.convert import to_onnx
from ghostedge.convert.plan import LARGEST_BATCH
from ghostedge.convert.rewrites.graph import Graph, attributes
from ghostedge.convert.to_onnx import IMAGE, PROBABILITIES
from ghostedge.errors import GhostEdgeError, in_a_line
from ghostedge.pixels import PixelContract
from ghostedge.runtime import uncomputed

LARGEST = 1 << 30
"""Bytes of a file that is read at all: these are nets for small devices, and protobuf ends at 2 GiB."""
LOWEST = 7
"""Opset from which on onnx's converter knows the ops of classifiers."""
BATCH = 50


@dataclasses.dataclass
class OnnxNet:
    """A classifier in an ONNX file, float32, with one image input and one output of scores."""

    model: onnx.ModelProto
    """As it was read, with its data, local functions inlined, and the input's size fixed."""
    size: int
    channels_last: bool
    labels: list[str] | None

    def __post_init__(self) -> None:
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), _quiet())

    @property
    def input(self) -> onnx.ValueInfoProto:
        return self.model.graph.input[0]

    @property
    def batch(self) -> int | None:
        """The batch that the file is made for, None where it is free."""
        side = self.input.type.tensor_type.shape.dim[0]
        return side.dim_value if side.HasField("dim_value") else None

    @property
    def is_ours(self) -> bool:
        """Whether ghostedge exported it: it then takes raw pixels and gives probabilities."""
        return self.model.producer_name == to_onnx.PRODUCER

    @property
    def opset(self) -> int:
        return _opset(self.model)

    @property
    def producer(self) -> str:
        return f"{self.model.producer_name} {self.model.producer_version}".strip()

    @property
    def parameters(self) -> int:
        return _parameters(self.model)

    def run(self, values: np.ndarray) -> np.ndarray:
        """Return the file's own outputs for normalised values (images, size, size, 3)."""
        values = values if self.channels_last else values.transpose(0, 3, 1, 2)
        batch, found = self.batch or BATCH, []
        for start in range(0, len(values), batch):
            part = np.ascontiguousarray(values[start : start + batch])
            fed = part if self.batch is None else np.resize(part, (batch, *part.shape[1:]))
            try:
                scores = self.session.run(None, {self.input.name: fed})[0]
            except Exception as error:  # ONNX Runtime's error classes share no other base
                raise uncomputed("The model", len(fed), error) from error
            if not scores.ndim:  # no classifier's
                return scores
            found.append(scores[: len(part)])
        return np.concatenate(found)


def read(file: Path, size: int | None) -> OnnxNet:
    """Read a classifier of square RGB images; `size` is needed where the file leaves it free.

    Nothing in the file is executed but its graph of standard ops, and no data from outside its
    folder is read. Raises GhostEdgeError, saying what is in the way, for anything else.
    """
    model = _load(file)
    for node in _nodes(model.graph):
        if node.domain not in ("", "ai.onnx"):
            raise GhostEdgeError(
                f"{file} uses the op {node.op_type} of {node.domain}, which is not in the ONNX standard: "
                "export it again with standard ops alone, before any runtime optimises it."
            )
        if "Quantize" in node.op_type or "Integer" in node.op_type or "QLinear" in node.op_type:
            raise GhostEdgeError(
                f"{file} is quantized already ({node.op_type}): give the float model that it was made "
                "from, and --int8."
            )
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    # Files of IR version 3 and before list every constant among the inputs.
    inputs = [value for value in graph.input if value.name not in constants]
    ends = " and ".join(f"{value.name} {_text(value)}" for value in inputs)
    if len(inputs) != 1 or len(graph.output) != 1:
        outputs = ", ".join(value.name for value in graph.output)
        raise GhostEdgeError(
            f"{file} maps {ends or 'nothing'} to {outputs}, where one image is to be mapped to one tensor "
            "of scores: export the classifier alone."
        )
    del graph.input[:]
    graph.input.append(inputs[0])  # a copy
    kind = graph.input[0].type.tensor_type
    sides = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    layouts = [
        last
        for last, channels in ((False, 1), (True, 3))
        if len(sides) == 4 and sides[channels] == 3
    ]
    if kind.elem_type != TensorProto.FLOAT or not layouts:
        raise GhostEdgeError(
            f"{file} takes {ends}, which is no batch of RGB images: float32 [batch, 3, height, width] or "
            "[batch, height, width, 3] is needed."
        )
    scores = graph.output[0].type.tensor_type
    if scores.elem_type != TensorProto.FLOAT:
        raise GhostEdgeError(
            f"{file} gives {_text(graph.output[0])}, where float32 scores are needed: export it again in "
            "float32."
        )
    first = kind.shape.dim[0]
    if first.dim_value <= 0:  # as some write a free one
        first.ClearField("dim_value")
    elif first.dim_value > LARGEST_BATCH:
        raise GhostEdgeError(
            f"{file} takes {ends}: batches of more than {LARGEST_BATCH} are not for devices."
        )
    channels_last = layouts[0]
    height, width = sides[1:3] if channels_last else sides[2:4]
    size = _size(file, height, width, size)
    for axis in (1, 2) if channels_last else (2, 3):
        kind.shape.dim[axis].dim_value = size
    del graph.value_info[:]  # sizes from before, as are those of the output
    rank = len(scores.shape.dim) or 2
    del scores.shape.dim[:]
    scores.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in range(rank))
    named = {p.key: p.value for p in model.metadata_props}.get("labels")
    try:
        return OnnxNet(model, size, channels_last, label_lines(named) if named else None)
    except Exception as error:  # ONNX Runtime's error classes share no other base
        raise GhostEdgeError(
            f"ONNX Runtime cannot run {file} on {size}x{size} images ({in_a_line(error)}): give another "
            "--imgsz, or export it again."
        ) from error


def _load(file: Path) -> onnx.ModelProto:
    if not file.is_file():
        raise GhostEdgeError(f"There is no file {file}: check its name and folder.")
    if file.stat().st_size > LARGEST:
        raise GhostEdgeError(
            f"{file} has {file.stat().st_size / 1e9:.1f} GB: nets of more than 1 GB are not for devices."
        )
    try:
        model = onnx.load(file, load_external_data=False)
        if not model.graph.node:
            raise ValueError("there is no graph in it")
        _check_places(model, file.parent)
        external_data_helper.load_external_data_for_model(model, str(file.parent))
        # Also what an IR version that is newer than the runtime would be refused for.
        model.ir_version = helper.find_min_ir_version_for(list(model.opset_import), True)
        model = inliner.inline_local_functions(model)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, the checker and the file system raise unrelated errors
        raise GhostEdgeError(
            f"{file} is not a whole ONNX model, or its data is not beside it ({in_a_line(error)}): "
            "export or copy it again."
        ) from error
    if model.ByteSize() > LARGEST:
        raise GhostEdgeError(
            f"{file} holds {model.ByteSize() / 1e9:.1f} GB with its data: nets of more than 1 GB are not "
            "for devices."
        )
    if not LOWEST <= _opset(model) <= onnx.defs.onnx_opset_version():
        raise GhostEdgeError(
            f"{file} has ONNX opset {_opset(model)}, where {LOWEST} to {onnx.defs.onnx_opset_version()} "
            "can be read: export it again with opset 17."
        )
    return model


def _check_places(model: onnx.ModelProto, folder: Path) -> None:
    """Raise ValueError where the model's data lies outside its folder; onnx itself follows links."""
    for tensor in external_data_helper._get_all_tensors(model):
        for entry in tensor.external_data:
            place = folder / entry.value
            if entry.key == "location" and folder.resolve() not in place.resolve().parents:
                raise ValueError(f"{entry.value} is outside its folder")


def _size(file: Path, height: int | None, width: int | None, wanted: int | None) -> int:
    size = height or width or wanted
    if size is None:
        raise GhostEdgeError(
            f"{file} takes images of any size: say which one with --imgsz, as it was trained."
        )
    if (height or size) != (width or size):
        raise GhostEdgeError(
            f"{file} takes images of {height}x{width} pixels, where only square ones are exported."
        )
    if wanted not in (None, size):
        raise GhostEdgeError(
            f"{file} takes images of {size}x{size} pixels, not {wanted}: leave out --imgsz, or export it "
            "again with a free height and width."
        )
    return size


def peeled(
    net: OnnxNet, pixels: PixelContract
) -> tuple[onnx.ModelProto, tuple[float, ...], tuple[float, ...]]:
    """Return the simplified graph without arithmetic on its input, and what mean and std that makes.

    A file may subtract, divide and so on by constants before its first layer: then `pixels`, the
    contract of its input, and these steps are one contract together.
    """
    model = to_onnx.simplified(net.model)
    _free_batch(model, net.batch)
    _ease(model)
    view = Graph(model)
    mean, std = (np.array(values, np.float64) for values in (pixels.mean, pixels.std))
    name = net.input.name
    while True:
        readers = view.consumers(name)
        if readers is None or len(readers) != 1 or readers[0].op_type not in _AFFINE:
            break
        node = readers[0]
        other = [read for read in node.input if read != name]
        constant = view.constant(other[0]) if len(other) == 1 else None
        values = None if constant is None else _per_channel(constant, net.channels_last)
        swapped = node.op_type in ("Sub", "Div") and node.input[0] != name
        if values is None or swapped or (node.op_type in ("Mul", "Div") and (values <= 0).any()):
            break
        mean, std = _AFFINE[node.op_type](mean, std, values.astype(np.float64))
        name = node.output[0]
        view.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [net.input.name if read == name else read for read in node.input]
    return model, tuple(mean.tolist()), tuple(std.tolist())


# What (pixel - mean) / std becomes after an op with a constant.
_AFFINE = {
    "Sub": lambda mean, std, c: (mean + c * std, std),
    "Add": lambda mean, std, c: (mean - c * std, std),
    "Mul": lambda mean, std, c: (mean, std / c),
    "Div": lambda mean, std, c: (mean, std * c),
}


def _per_channel(constant: np.ndarray, channels_last: bool) -> np.ndarray | None:
    """Return a constant as three values, None where it is not one value or one a channel."""
    if constant.dtype != np.float32 or constant.ndim > 4:
        return None
    full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
    if not channels_last:
        full = full.transpose(0, 2, 3, 1)
    if full.shape[:3] != (1, 1, 1) or full.shape[3] not in (1, 3):
        return None
    return np.broadcast_to(full[0, 0, 0], 3)


def core(
    graph: onnx.ModelProto,
    net: OnnxNet,
    pixels: PixelContract,
    classes: int,
    opset: int,
    softmax: bool,
) -> onnx.ModelProto:
    """Return (batch, 3, size, size) values `(pixel - 128) / 64` -> (batch, classes) probabilities.

    `graph` is what `peeled` gave, `pixels` what it reads. The batch axis is free; `softmax` adds one.
    Raises GhostEdgeError where onnx cannot convert the opset or the graph fixes the batch.
    """
    try:
        model = version_converter.convert_version(graph, opset) if opset != net.opset else graph
    except Exception as error:  # the C++ converter's errors share no base
        raise GhostEdgeError(
            f"The model cannot be converted from ONNX opset {net.opset} to {opset} ({in_a_line(error)}): "
            f"export it again with opset {opset}."
        ) from error
    # Its names cannot be ours then.
    model = onnx.compose.add_prefix(model, "net/", inplace=False)
    first, last = model.graph.input[0].name, model.graph.output[0].name
    front, name = [], IMAGE
    if not pixels.is_default:
        weight, bias = pixels.from_default()
        values = (("reading/weight", weight.reshape(3, 1, 1, 1)), ("reading/bias", bias))
        for key, value in values:
            model.graph.initializer.append(numpy_helper.from_array(value, key))
        inputs = [name, "reading/weight", "reading/bias"]
        front.append(helper.make_node("Conv", inputs, ["read"], "reading", group=3))
        name = "read"
    if net.channels_last:
        front.append(helper.make_node("Transpose", [name], ["nhwc"], "to_nhwc", perm=[0, 2, 3, 1]))
        name = "nhwc"
    for node in model.graph.node:
        node.input[:] = [name if read == first else read for read in node.input]
        if not softmax:
            node.output[:] = [PROBABILITIES if made == last else made for made in node.output]
            node.input[:] = [PROBABILITIES if read == last else read for read in node.input]
    for index, node in enumerate(front):
        model.graph.node.insert(index, node)
    if softmax:
        model.graph.node.append(
            helper.make_node("Softmax", [last], [PROBABILITIES], "softmax", axis=1)
        )
    shapes: dict[str, list[str | int | None]] = {
        IMAGE: ["batch", 3, net.size, net.size],
        PROBABILITIES: ["batch", classes],
    }
    for values, title in ((model.graph.input, IMAGE), (model.graph.output, PROBABILITIES)):
        del values[:]
        values.append(helper.make_tensor_value_info(title, TensorProto.FLOAT, shapes[title]))
    del model.graph.value_info[:], model.metadata_props[:]
    model.ir_version = helper.find_min_ir_version_for(list(model.opset_import))
    return model


def _free_batch(model: onnx.ModelProto, batch: int | None) -> None:
    """Free the batch axis, in place: constant shapes that begin with the batch take the input's."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    if batch is None:
        return
    view = Graph(model)
    for node in view.nodes("Reshape"):
        shape = view.constant(node.input[1])
        if shape is None or not shape.size:  # none for a scalar
            continue
        if shape[0] == batch and not attributes(node).get("allowzero", 0):
            node.input[1] = view.new_constant(f"{node.input[1]}/free", np.array([0, *shape[1:]]))
    image = model.graph.input[0]
    sides = [d.dim_value for d in image.type.tensor_type.shape.dim]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), _quiet())
        session.run(None, {image.name: np.zeros((batch + 1, *sides[1:]), np.float32)})
    except Exception as error:  # ONNX Runtime's error classes share no other base
        raise GhostEdgeError(
            f"The model computes with a fixed batch of {batch} inside ({in_a_line(error)}): export it again "
            "with a free batch axis."
        ) from error


def _ease(model: onnx.ModelProto) -> None:
    """Remove what onnx's conversion of opsets trips over, in place.

    Attributes at their defaults, which older opsets may not know, and integers stored as raw bytes:
    it takes the axes of a ReduceMean in them for an empty list.
    """
    opset = _opset(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64 and tensor.HasField("raw_data"):
            values = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.int64_data.extend(values.ravel().tolist())
    for node in model.graph.node:
        known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        for attribute in list(node.attribute):
            default = known[attribute.name].default_value
            if default.type and helper.get_attribute_value(attribute) == (
                helper.get_attribute_value(default)
            ):
                node.attribute.remove(attribute)


def count(model: onnx.ModelProto) -> dict[str, int]:
    """Return a simplified graph's deployed_parameters and macs, with a batch of one."""
    view, macs = Graph(model), 0
    for node in model.graph.node:
        shape = view.shape(node.output[0]) or ()
        outputs = math.prod(side or 1 for side in shape)
        if node.op_type == "MatMul":  # of two computed tensors too, as in attention
            left = view.constants.get(node.input[0])
            sides = view.shape(node.input[0]) if left is None else left.dims
            macs += outputs * ((sides or (1,))[-1] or 1)
        if len(node.input) < 2 or node.input[1] not in view.constants:
            continue
        weight = view.constants[node.input[1]].dims
        if node.op_type == "Conv":
            macs += outputs * math.prod(weight[1:])
        elif node.op_type == "Gemm":
            macs += outputs * weight[attributes(node).get("transB", 0)]
    return {"deployed_parameters": _parameters(model), "macs": macs}


def _parameters(model: onnx.ModelProto) -> int:
    """Count the float constants, without the scalars that arithmetic needs."""
    sizes = (math.prod(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    return sum(size for size in sizes if size > 1)


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    options.log_severity_level = 4
    return options


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def _opset(model: onnx.ModelProto) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _text(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    sides = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
    name = TensorProto.DataType.Name(kind.elem_type).lower()
    return f"{name} [{', '.join(map(str, sides))}]"
