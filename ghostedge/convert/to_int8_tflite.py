"""int8 for TFLite: a finished fp32 .tflite and a range for each of its tensors give the int8 file.

Weights are int8 per output channel, symmetric; biases int32; activations int8 per tensor, by the
given ranges (TFLite's 8-bit quantization specification). What no int8 kernel computes, and what the
caller names, stays in float between a DEQUANTIZE and a QUANTIZE.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from ghostedge.convert.ranges import Ranges
from ghostedge.convert.rewrites.flat import OPS, Flat, schema
from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.pixels import MIDDLE, STEP

TYPES = schema.TensorType


class Affine(NamedTuple):
    """What an int8 value q stands for: scale * (q - zero_point)."""

    scale: float
    zero_point: int


PIXEL = Affine(1.0, -128)
"""Of a raw pixel: q is the pixel minus 128."""

CHANNEL_AXIS = {OPS.CONV_2D: 0, OPS.DEPTHWISE_CONV_2D: 3, OPS.FULLY_CONNECTED: 0}
"""Ops with weights and a bias, and the axis of the weights that is the output's channels."""

FIXED = {OPS.LOGISTIC: Affine(1 / 256, -128), OPS.SOFTMAX: Affine(1 / 256, -128)}
"""Ops whose kernels know one output scale only."""

COPYING = frozenset(
    {
        OPS.CONCATENATION,
        OPS.RESHAPE,
        OPS.PAD,
        OPS.PADV2,
        OPS.TRANSPOSE,
        OPS.SLICE,
        OPS.STRIDED_SLICE,
        OPS.SPLIT,
        OPS.SPLIT_V,
        OPS.GATHER,
        OPS.SQUEEZE,
        OPS.EXPAND_DIMS,
        OPS.DEPTH_TO_SPACE,
        OPS.SPACE_TO_DEPTH,
        OPS.RESIZE_NEAREST_NEIGHBOR,
        OPS.RESIZE_BILINEAR,
        OPS.MAX_POOL_2D,
        OPS.AVERAGE_POOL_2D,
        OPS.MAXIMUM,
        OPS.MINIMUM,
    }
)
"""Ops whose kernels do not rescale: what they read and write shares one scale."""

VERSIONS = {
    **dict.fromkeys(COPYING | FIXED.keys(), 2),
    **dict.fromkeys((OPS.ADD, OPS.SUB, OPS.MUL, OPS.MEAN, OPS.RELU, OPS.RELU6, OPS.LEAKY_RELU), 2),
    **dict.fromkeys((OPS.RESHAPE, OPS.SQUEEZE, OPS.EXPAND_DIMS, OPS.QUANTIZE), 1),
    # 2 says int8 too, but BUILTIN_REF of LiteRT 2.1.0 registers 1 only.
    OPS.DEPTH_TO_SPACE: 1,
    OPS.CONV_2D: 3,
    OPS.DEPTHWISE_CONV_2D: 3,
    OPS.FULLY_CONNECTED: 4,
    OPS.DEQUANTIZE: 2,
}
"""Every op that is computed in int8, with the version of it that knows int8."""

FINEST = 2.0**-20
"""Smallest step of a sum, in steps of the output: finer ones change nothing, but where the weights of
a channel are near zero the int32 bias, counted in such steps, would overflow."""


def quantize(model: bytes, ranges: Ranges, io: str, in_float: Collection[str] = ()) -> bytes:
    """Return the int8 .tflite of a fp32 .tflite that takes raw pixels.

    Args:
        model: the fp32 file after `rewrites.finish`, batch and sizes fixed.
        ranges: lowest and highest value of every computed tensor, by name (`ranges.observe`).
        io: type of input and output, "uint8", "int8" or "float32" (raw pixels too).
        in_float: names of tensors whose op stays in float.

    The int8 input is the pixel minus 128, exactly, and a (pixel - 128) / 64 at the model's front
    is gone but for io "float32", where it is exact in int8. Sigmoid, softmax and the output have scale
    1/256. No QUANTIZE is inside but next to ops in float, and where a sigmoid is concatenated with
    something else. The same arguments give the same bytes.

    Raises GhostEdgeError for a model that is quantized already, for a tensor without a range, and for
    an unknown name in `in_float`.
    """
    flat = Flat(model)
    if any(tensor.type in (TYPES.INT8, TYPES.UINT8) for tensor in flat.tensors):
        raise GhostEdgeError("The .tflite to quantize has int8 tensors already: give the fp32 one.")
    _Quantizer(flat, ranges, io, in_float).run()
    return bytes(flat)


class _Quantizer:
    def __init__(self, flat: Flat, ranges: Ranges, io: str, in_float: Collection[str]) -> None:
        self.flat, self.ranges, self.io = flat, ranges, io
        (self.image,), (self.scores,) = flat.graph.inputs, flat.graph.outputs
        self.fixed: dict[int, Affine] = {self.scores: FIXED[OPS.SOFTMAX]}
        """Scales that are given, that of the scores whatever op ends in them."""
        self.normalization(keep=io == "float32")
        for op in flat.operators(OPS.HARD_SWISH):
            if flat.name(op.outputs[0]) not in in_float:
                self.expand_hard_swish(op)
        self.ops: list[Any] = list(flat.graph.operators)
        names = {flat.name(op.outputs[0]) for op in self.ops}
        for name in sorted(set(in_float) - names):
            raise GhostEdgeError(f"No op computes a tensor {name!r}.{nearest(name, names)}")
        self.floats = {
            id(op) for op in self.ops if flat.name(op.outputs[0]) in in_float or not self.known(op)
        }
        """The operators that stay in float, by identity."""
        self.widen_islands()
        self.made: list[Any] = []
        """The operators of the result."""
        self.copies: dict[tuple[int, Any], int] = {}
        """Tensors added, by what they are copies of and in what form."""

    def normalization(self, keep: bool) -> None:
        """Give (pixel - 128) / 64 at the front its exact scales, or take it out of the model.

        The converter folds the 1/64 into the first weights where it can. The int8 input then has
        scale 1/64 again, as the pixel contract says, and those weights are multiplied by 64.
        """
        flat = self.flat
        self.fixed[self.image] = PIXEL
        centre = self.only_reader(self.image, OPS.SUB, MIDDLE)
        if centre is None:
            return
        chain = [centre]
        scaling = self.only_reader(centre.outputs[0], OPS.MUL, 1 / STEP)
        if scaling is not None:
            chain.append(scaling)
        if keep:
            for op, scale in zip(chain, (1.0, 1 / STEP), strict=False):
                self.fixed[op.outputs[0]] = Affine(scale, 0)
            return
        last = chain[-1].outputs[0]
        readers = flat.readers(last) or []
        scale = 1 / STEP
        if scaling is None:
            if all(flat.kind(op) in CHANNEL_AXIS and op.inputs[0] == last for op in readers):
                for op in readers:
                    weights = self.constant(op.inputs[1]) * np.float32(STEP)
                    op.inputs[1] = self.copy_of(op.inputs[1])
                    flat.set_data(op.inputs[1], weights)
            else:
                scale = 1.0
        for op in readers:
            op.inputs = [self.image if tensor == last else tensor for tensor in op.inputs]
        for op in chain:
            flat.graph.operators.remove(op)
        self.fixed[self.image] = Affine(scale, 0)

    def expand_hard_swish(self, op: Any) -> None:
        """Turn hard_swish(x) into x * clip(x / 6 + 0.5, 0, 1), where the scale of the sum does the clip.

        XNNPACK has no int8 kernel of HARD_SWISH.
        """
        flat = self.flat
        (source,), (target,) = op.inputs, op.outputs
        low, high = self.range(source)
        sixth, gate = self.copy_of(source, "sixth"), self.copy_of(source, "gate")
        self.ranges = {**self.ranges, flat.name(sixth): (low / 6, high / 6)}
        self.fixed[gate] = Affine(1 / 255, -128)
        operators = [
            self.binary(OPS.MUL, source, self.number(source, 1 / 6), sixth),
            self.binary(OPS.ADD, sixth, self.number(source, 0.5), gate),
            self.binary(OPS.MUL, source, gate, target),
        ]
        place = flat.graph.operators.index(op)
        flat.graph.operators[place : place + 1] = operators

    def number(self, like: int, value: float) -> int:
        added = self.copy_of(like, "number")
        entry = self.flat.tensors[added]
        entry.shape, entry.shapeSignature = np.array([1], np.int32), None
        self.flat.set_data(added, np.array([value], np.float32))
        return added

    def binary(self, kind: int, left: int, right: int, target: int) -> Any:
        op = self.operator(kind, left, target)
        op.inputs = [left, right]
        name = {OPS.MUL: "MulOptions", OPS.ADD: "AddOptions"}[kind]
        op.builtinOptions = getattr(schema, f"{name}T")()
        op.builtinOptionsType = getattr(schema.BuiltinOptions, name)
        return op

    def only_reader(self, tensor: int, kind: int, constant: float) -> Any | None:
        """Return the op that alone reads a tensor, where it is of a kind and with that constant."""
        readers = self.flat.readers(tensor)
        if readers is None or len(readers) != 1 or self.flat.kind(readers[0]) != kind:
            return None
        (op,) = readers
        data = self.flat.data(op.inputs[1])
        if op.inputs[0] != tensor or data is None or op.builtinOptions.fusedActivationFunction:
            return None
        return op if (data.view(np.float32) == constant).all() else None

    def known(self, op: Any) -> bool:
        """Return whether an op has an int8 kernel, as it stands here."""
        kind = self.flat.kind(op)
        if kind in CHANNEL_AXIS:
            constants = [
                self.flat.data(tensor) is not None for tensor in op.inputs[1:] if tensor >= 0
            ]
            return all(constants)
        return kind in VERSIONS

    def widen_islands(self) -> None:
        """Let an op that only copies stay in float between ops in float."""
        flat, grown = self.flat, True
        while grown:
            before = len(self.floats)
            for op in self.ops:
                if flat.kind(op) in COPYING:
                    around = [flat.producer(tensor) for tensor in self.values(op.inputs)]
                    around += [op for tensor in op.outputs for op in flat.readers(tensor) or [None]]
                    if all(id(other) in self.floats for other in around):
                        self.floats.add(id(op))
            grown = len(self.floats) > before

    def values(self, tensors: Collection[int]) -> list[int]:
        """Return those of an op's tensors that are computed floats."""
        return [
            t
            for t in tensors
            if t >= 0 and self.flat.tensors[t].type == TYPES.FLOAT32 and self.flat.data(t) is None
        ]

    def constants(self, op: Any) -> list[int]:
        return [
            t
            for t in op.inputs
            if t >= 0
            and self.flat.tensors[t].type == TYPES.FLOAT32
            and self.flat.data(t) is not None
        ]

    def constant(self, tensor: int) -> np.ndarray:
        data = self.flat.data(tensor)
        assert data is not None
        return data.view(np.float32).reshape(self.flat.tensors[tensor].shape)

    def run(self) -> None:
        flat = self.flat
        self.requantize_fixed()
        self.scales = self.shared_scales()
        self.held_in_int8 = {t for op in self.ops if id(op) not in self.floats for t in op.outputs}
        if self.io != "float32":
            self.held_in_int8.add(self.image)
        for op in self.ops:
            kind = flat.kind(op)
            if id(op) in self.floats:
                values = {t: self.in_float(t) for t in self.values(op.inputs)}
            else:
                values = {t: self.in_int8(t) for t in self.values(op.inputs)}
                if kind in CHANNEL_AXIS:
                    self.quantize_weights(op, CHANNEL_AXIS[kind])
                else:
                    for t in self.constants(op):
                        values[t] = self.quantized_constant(t, op)
                flat.set_kind(op, kind, VERSIONS[kind])
            op.inputs = [values.get(t, t) for t in op.inputs]
            self.made.append(op)
        self.ends()
        for tensor in self.held_in_int8:
            self.set_type(tensor, TYPES.INT8, self.scales[tensor])
        flat.graph.operators = self.made
        flat.prune()

    def requantize_fixed(self) -> None:
        """Put a QUANTIZE before a concatenation of something of a fixed scale with something else."""
        flat = self.flat
        for op in list(self.ops):
            if flat.kind(op) in FIXED:
                self.fixed[op.outputs[0]] = FIXED[flat.kind(op)]
            if id(op) in self.floats or flat.kind(op) not in COPYING:
                continue
            values = self.values(op.inputs)
            if len({*values, *self.constants(op)}) == 1 and self.fixed.keys() >= set(values):
                self.fixed.update(dict.fromkeys(op.outputs, self.fixed[values[0]]))
                continue
            for tensor in sorted({t for t in values if t in self.fixed}):
                free = self.copy_of(tensor)
                self.ranges = {**self.ranges, flat.name(free): self.range(tensor)}
                op.inputs = [free if t == tensor else t for t in op.inputs]
                self.ops.insert(self.ops.index(op), self.operator(OPS.QUANTIZE, tensor, free))

    def shared_scales(self) -> dict[int, Affine]:
        """Return the scale of every tensor: one for all that ops which do not rescale connect."""
        parent: dict[int, int] = {}

        def root(tensor: int) -> int:
            while parent.setdefault(tensor, tensor) != tensor:
                tensor = parent[tensor]
            return tensor

        tensors = self.values([self.image, *(t for op in self.ops for t in op.outputs)])
        # A copy has the range of what it is a copy of; a padding may be as low as no other value.
        copied: set[int] = set()
        for op in self.ops:
            if id(op) not in self.floats and self.flat.kind(op) in COPYING:
                first, *rest = self.values(op.inputs) + self.constants(op) + list(op.outputs)
                for tensor in rest:
                    parent[root(tensor)] = root(first)
                copied.update(op.outputs)
                if self.flat.kind(op) == OPS.PADV2:
                    copied.update(self.constants(op))
        members: dict[int, list[int]] = {}
        for tensor in sorted({*tensors, *parent}):
            members.setdefault(root(tensor), []).append(tensor)
        scales = {}
        for group in members.values():
            known = [self.fixed[tensor] for tensor in group if tensor in self.fixed]
            sources = (self.range(tensor) for tensor in group if tensor not in copied)
            scales.update(dict.fromkeys(group, known[0] if known else _affine(*sources)))
        return scales

    def range(self, tensor: int) -> tuple[float, float]:
        if self.flat.data(tensor) is not None:
            values = self.constant(tensor)
            return float(values.min()), float(values.max())
        name = self.flat.name(tensor)
        if name not in self.ranges:
            raise GhostEdgeError(f"There is no range for the tensor {name!r}: observe this model.")
        return self.ranges[name]

    def quantize_weights(self, op: Any, axis: int) -> None:
        """Replace an op's weights and bias by int8 and int32 ones."""
        image, weights = op.inputs[0], self.constant(op.inputs[1])
        scale_in, scale_out = self.scales[image].scale, self.scales[op.outputs[0]].scale
        rest = tuple(other for other in range(weights.ndim) if other != axis)
        scale = np.abs(weights.astype(np.float64)).max(rest) / 127
        scale = np.maximum(scale, FINEST * scale_out / scale_in).astype(np.float32)
        shape = [-1 if other == axis else 1 for other in range(weights.ndim)]
        steps = np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8)
        op.inputs[1] = self.stored(op.inputs[1], steps, scale, axis)
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            unit = (scale_in * scale.astype(np.float64)).astype(np.float32)
            bias = np.rint(self.constant(op.inputs[2]).astype(np.float64) / unit)
            limit = np.iinfo(np.int32).max
            bias = np.clip(bias, -limit, limit).astype(np.int32)
            op.inputs[2] = self.stored(op.inputs[2], bias, unit, 0)

    def quantized_constant(self, tensor: int, op: Any) -> int:
        values = self.constant(tensor)
        shared = self.flat.kind(op) in COPYING
        affine = self.scales[op.outputs[0]] if shared else _affine(self.range(tensor))
        steps = np.rint(values.astype(np.float64) / affine.scale) + affine.zero_point
        steps = np.clip(steps, -128, 127).astype(np.int8)
        return self.stored(tensor, steps, np.array([affine.scale]), 0, affine.zero_point)

    def stored(
        self, tensor: int, steps: np.ndarray, scale: np.ndarray, axis: int, zero_point: int = 0
    ) -> int:
        """Return a tensor of quantized constants; equal ones are stored once."""
        key = (tensor, (steps.tobytes(), scale.tobytes()))
        if key not in self.copies:
            self.copies[key] = self.copy_of(tensor)
            entry = self.flat.tensors[self.copies[key]]
            entry.type = TYPES.INT8 if steps.dtype == np.int8 else TYPES.INT32
            entry.quantization = _parameters(scale, np.full(len(scale), zero_point), axis)
            self.flat.set_data(self.copies[key], steps)
        return self.copies[key]

    def in_int8(self, tensor: int) -> int:
        """Return a tensor as int8, with a QUANTIZE where it is computed in float."""
        if tensor in self.held_in_int8:
            return tensor
        key = (tensor, TYPES.INT8)
        if key not in self.copies:
            self.copies[key] = self.copy_of(tensor, "int8")
            self.set_type(self.copies[key], TYPES.INT8, self.scales[tensor])
            self.made.append(self.operator(OPS.QUANTIZE, tensor, self.copies[key]))
        return self.copies[key]

    def in_float(self, tensor: int) -> int:
        """Return a tensor as floats, with a DEQUANTIZE where it is computed in int8."""
        if tensor not in self.held_in_int8:
            return tensor
        key = (tensor, TYPES.FLOAT32)
        if key not in self.copies:
            self.copies[key] = self.copy_of(tensor, "float")
            self.made.append(self.operator(OPS.DEQUANTIZE, tensor, self.copies[key]))
        return self.copies[key]

    def ends(self) -> None:
        """Give the model the input and output type that was asked for."""
        graph = self.flat.graph
        inside = self.image
        result = (self.in_float if self.io == "float32" else self.in_int8)(self.scores)
        graph.inputs, graph.outputs = [inside], [result]
        if self.io == "uint8":
            graph.inputs = [self.as_uint8(inside)]
            graph.outputs = [self.as_uint8(result)]
            self.made.insert(0, self.operator(OPS.QUANTIZE, graph.inputs[0], inside))
            self.made.append(self.operator(OPS.QUANTIZE, result, graph.outputs[0]))
        for signature in self.flat.model.signatureDefs or []:
            signature.inputs[0].tensorIndex = graph.inputs[0]
            signature.outputs[0].tensorIndex = graph.outputs[0]

    def as_uint8(self, tensor: int) -> int:
        """Return a tensor for the same values, in uint8."""
        added = self.copy_of(tensor, "uint8")
        scale = self.scales[self.image if tensor == self.image else self.scores]
        self.set_type(added, TYPES.UINT8, scale._replace(zero_point=scale.zero_point + 128))
        return added

    def copy_of(self, tensor: int, what: str = "copy") -> int:
        entry = copy.copy(self.flat.tensors[tensor])
        entry.name = f"{self.flat.name(tensor)}_{what}_{len(self.flat.tensors)}"
        return self.flat.add(entry)

    def set_type(self, tensor: int, kind: int, affine: Affine) -> None:
        entry = self.flat.tensors[tensor]
        entry.type = kind
        entry.quantization = _parameters(np.array([affine.scale]), np.array([affine.zero_point]), 0)

    def operator(self, kind: int, source: int, target: int) -> Any:
        op = schema.OperatorT()
        op.inputs, op.outputs = [source], [target]
        self.flat.set_kind(op, kind, VERSIONS[kind])
        return op


def _affine(*ranges: tuple[float, float]) -> Affine:
    """Return the scale and zero point for values of all the ranges, and for an exact zero."""
    low = min(0.0, *(low for low, _ in ranges))
    high = max(0.0, *(high for _, high in ranges))
    if low == high:  # a tensor that was zero throughout
        high = 1.0
    scale = (high - low) / 255
    return Affine(float(np.float32(scale)), int(np.clip(round(-128 - low / scale), -128, 127)))


def _parameters(scale: np.ndarray, zero_point: np.ndarray, axis: int) -> Any:
    result = schema.QuantizationParametersT()
    result.scale = scale.astype(np.float32)
    result.zeroPoint = zero_point.astype(np.int64)
    result.quantizedDimension = axis
    return result
