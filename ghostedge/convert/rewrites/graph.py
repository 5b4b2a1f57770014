"""What the passes ask of an ONNX graph, and the one change they make: a node for others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Graph:
    """A view of a model's main graph; tensors inside the bodies of If and Loop are not rewritten."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.values = {value.name: value for value in _typed(model)}
        fed = {value.name for value in self.graph.input}  # a default there, no constant
        self.constants = {t.name: t for t in self.graph.initializer if t.name not in fed}
        self.names = set(self.values) | {t.name for t in self.graph.initializer}
        self.names |= {name for node in self.graph.node for name in (*node.input, *node.output)}

    def nodes(self, op: str) -> list[onnx.NodeProto]:
        return [n for n in self.graph.node if n.op_type == op and n.domain in ("", "ai.onnx")]

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a tensor that is always the same, None for any other."""
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def weights(self, conv: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a Conv's weights and its bias, zeros where it has none; None where they are computed."""
        weight = self.constant(conv.input[1])
        biased = len(conv.input) > 2 and conv.input[2] != ""
        bias = self.constant(conv.input[2]) if biased else None
        if weight is None or (biased and bias is None):
            return None
        return weight, np.zeros(len(weight), weight.dtype) if bias is None else bias

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return a tensor's shape, None in it for a free axis; None where nothing is known."""
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        sides = value.type.tensor_type.shape.dim
        return tuple(side.dim_value if side.HasField("dim_value") else None for side in sides)

    def is_float(self, name: str) -> bool:
        """Return whether a tensor is known to be float32."""
        value = self.values.get(name)
        return value is not None and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT

    def producer(self, name: str) -> onnx.NodeProto | None:
        return next((node for node in self.graph.node if name in node.output), None)

    def consumers(self, name: str) -> list[onnx.NodeProto] | None:
        """Return the nodes that read a tensor, None where something outside of them does too.

        That is a graph output, or the body of an If or a Loop. A node that reads it twice is there
        twice.
        """
        if any(value.name == name for value in self.graph.output):
            return None
        if any(name in captured(node) for node in self.graph.node):
            return None
        return [node for node in self.graph.node for read in node.input if read == name]

    def new_constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer; return its name, made unique."""
        name = self.new_name(name)
        tensor = numpy_helper.from_array(value, name)
        self.graph.initializer.append(tensor)
        self.constants[name] = tensor
        return name

    def new_name(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def replace(self, node: onnx.NodeProto, others: list[onnx.NodeProto]) -> None:
        """Put nodes in the place of one; the last of them makes the tensor that it made."""
        index = next(i for i, n in enumerate(self.graph.node) if n.output[:] == node.output[:])
        del self.graph.node[index]
        for offset, other in enumerate(others):
            self.graph.node.insert(index + offset, other)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes that a node states, strings as str."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _typed(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    yield from (*graph.input, *graph.value_info, *graph.output)


def captured(node: onnx.NodeProto) -> set[str]:
    """Return the names that the bodies of an If, Loop or Scan use, some of them from outside."""
    found: set[str] = set()
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            found |= {output.name for output in body.output}
            for inner in body.node:
                found |= set(inner.input) | captured(inner)
    return found
