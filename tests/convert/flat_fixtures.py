"""fp32 .tflite files made by hand, op by op: no converter, so milliseconds each; what a file does."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.convert.rewrites.flat import OPS, Flat, schema
from ghostedge.runtime import Classifier, interpreter

TYPES = schema.TensorType


def run(content: bytes, images: np.ndarray, reference: bool = False) -> np.ndarray:
    """Return the probabilities that a .tflite file's content gives."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        file.write_bytes(content)
        return Classifier(file, kernels="reference" if reference else "default")(images)


def operators(content: bytes) -> collections.Counter[str]:
    """Count a .tflite file's operators by name, and as DELEGATE the partitions that XNNPACK makes."""
    return collections.Counter(op["op_name"] for op in interpreter(content)._get_ops_details())


class Net:
    """A .tflite under construction: `image` is its input, raw pixels; random weights from a seed.

    Every method adds an op and returns the index of its output; `bytes` closes with `outputs`.
    """

    def __init__(self, size: int = 8, batch: int = 1, seed: int = 0) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.operatorCodes, self.model.buffers = [], [schema.BufferT()]
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.subgraphs = [self.graph]
        self.random = np.random.default_rng(seed)
        self.image = self.tensor([batch, size, size, 3], "image")
        # As Flat, whose methods serve here too.
        self.flat = Flat.__new__(Flat)
        self.flat.model, self.flat.graph = self.model, self.graph
        self.flat.tensors = self.graph.tensors

    def tensor(self, shape: list[int], name: str | None = None) -> int:
        entry = schema.TensorT()
        entry.shape, entry.type = np.array(shape, np.int32), TYPES.FLOAT32
        entry.name = name or f"t{len(self.graph.tensors)}"
        entry.buffer = 0
        self.graph.tensors.append(entry)
        return len(self.graph.tensors) - 1

    def constant(self, values: Any) -> int:
        array = np.asarray(values)
        index = self.tensor(list(array.shape))
        if array.dtype.kind == "i":
            self.graph.tensors[index].type, array = TYPES.INT32, array.astype(np.int32)
        else:
            array = array.astype(np.float32)
        self.flat.set_data(index, array)
        return index

    def shape(self, tensor: int) -> list[int]:
        return [int(side) for side in self.graph.tensors[tensor].shape]

    def op(
        self, kind: int, inputs: list[int], *shapes: list[int], options: str = "", **values: Any
    ) -> Any:
        """Add an op; `options` is the schema's name of its options, `values` go into them."""
        op = schema.OperatorT()
        op.inputs, op.outputs = inputs, [self.tensor(shape) for shape in shapes]
        if options:
            op.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            op.builtinOptions = getattr(schema, f"{options}T")()
            for name, value in values.items():
                setattr(op.builtinOptions, name, value)
        self.flat.set_kind(op, kind, 1)
        self.graph.operators.append(op)
        return op.outputs[0] if len(shapes) == 1 else op.outputs

    def normalized(self) -> int:
        """(pixel - 128), whose 1/64 is in the first weights, as the converter leaves it."""
        return self.arithmetic(OPS.SUB, self.image, self.constant(np.float32(128)))

    def arithmetic(self, kind: int, first: int, second: int) -> int:
        name = {OPS.ADD: "AddOptions", OPS.SUB: "SubOptions", OPS.MUL: "MulOptions"}[kind]
        return self.op(kind, [first, second], self.shape(first), options=name)

    def conv(self, x: int, channels: int, kernel: int = 1, relu: bool = False) -> int:
        inputs = self.shape(x)[3]
        gain = 1 / np.sqrt(kernel * kernel * inputs) / (64 if inputs == 3 else 1)
        weights = self.random.normal(0, gain, (channels, kernel, kernel, inputs))
        return self.weighted(x, weights, self.random.normal(0, 0.3, channels), relu)

    def weighted(self, x: int, weights: np.ndarray, bias: np.ndarray, relu: bool = False) -> int:
        batch, height, width, _ = self.shape(x)
        ends = [x, self.constant(weights), self.constant(bias)]
        shape = [batch, height, width, len(weights)]
        options = {"strideW": 1, "strideH": 1, "fusedActivationFunction": int(relu)}
        return self.op(OPS.CONV_2D, ends, shape, options="Conv2DOptions", **options)

    def depthwise(self, x: int) -> int:
        shape = self.shape(x)
        weights = self.constant(self.random.normal(0, 0.4, (1, 3, 3, shape[3])))
        ends = [x, weights, self.constant(self.random.normal(0, 0.3, shape[3]))]
        options = {"strideW": 1, "strideH": 1, "depthMultiplier": 1}
        name = "DepthwiseConv2DOptions"
        return self.op(OPS.DEPTHWISE_CONV_2D, ends, shape, options=name, **options)

    def concat(self, *tensors: int) -> int:
        *sides, _ = self.shape(tensors[0])
        shape = [*sides, sum(self.shape(t)[-1] for t in tensors)]
        return self.op(OPS.CONCATENATION, [*tensors], shape, options="ConcatenationOptions", axis=3)

    def head(self, x: int, classes: int = 5) -> int:
        """Mean over the image, a linear layer, softmax."""
        batch, _, _, channels = self.shape(x)
        axes = self.constant(np.array([1, 2]))
        kept = {"options": "ReducerOptions", "keepDims": True}
        mean = self.op(OPS.MEAN, [x, axes], [batch, 1, 1, channels], **kept)
        weights = self.constant(self.random.normal(0, 1, (classes, channels)))
        bias = self.constant(self.random.normal(0, 0.1, classes))
        ends = [mean, weights, bias]
        logits = self.op(
            OPS.FULLY_CONNECTED, ends, [batch, classes], options="FullyConnectedOptions"
        )
        return self.op(OPS.SOFTMAX, [logits], [batch, classes], options="SoftmaxOptions", beta=1.0)

    def bytes(self, output: int) -> bytes:
        self.graph.inputs, self.graph.outputs = [self.image], [output]
        return bytes(self.flat)

    def name(self, tensor: int) -> str:
        return self.flat.name(tensor)
