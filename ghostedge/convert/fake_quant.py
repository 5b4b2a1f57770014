"""An ONNX classifier as a torch module, whose int8 arithmetic can be simulated and trained.

The simulation quantizes what the int8 files quantize: weights, symmetric per output channel with 127
steps a side; every tensor that an operation writes, asymmetric with 256 steps, but for those that a
fused activation swallows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from ghostedge.convert.ranges import Ranges
from ghostedge.convert.rewrites.graph import attributes
from ghostedge.errors import GhostEdgeError

LINEAR = ("Conv", "Gemm")
COPIES = frozenset(
    "Concat DepthToSpace Flatten Gather Identity MaxPool Pad Reshape Resize Slice Split Squeeze "
    "Transpose Unsqueeze".split()
)
"""Operations that read and write in one scale."""
FIXED = {"Sigmoid": (0.0, 255 / 256), "Softmax": (0.0, 255 / 256)}
"""The output range that TFLite's kernels know, and no other."""

Watch = Callable[[str, Tensor], Tensor]


class Graph(nn.Module):
    """Runs a simplified ONNX graph node by node, on float32 tensors in NCHW.

    Its float initializers are parameters, which `weight` and `bias` find. `quantized` are the names
    of the tensors that int8 files hold in int8. Raises GhostEdgeError for an operation that it does
    not know.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        unknown = sorted({node.op_type for node in graph.node} - {*_OPS, "Constant"})
        if unknown:
            raise GhostEdgeError(f"The corrections of int8 do not know the operation {unknown[0]}.")
        self.input, self.output = graph.input[0].name, graph.output[0].name
        self.constants: dict[str, np.ndarray] = {}
        self.weights = nn.ParameterDict()
        for tensor in graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.dtype == np.float32 and value.ndim:
                self.weights[_key(tensor.name)] = nn.Parameter(torch.from_numpy(value.copy()))
            else:
                self.constants[tensor.name] = value
        self.nodes: list[tuple[onnx.NodeProto, dict[str, Any]]] = []
        for node in graph.node:
            stated = attributes(node)
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(stated["value"])
            else:
                self.nodes.append((node, stated))
        self.reads = Counter(name for node, _ in self.nodes for name in node.input)
        only = {node.input[0]: node for node, _ in self.nodes if self.reads[node.input[0]] == 1}
        self.quantized = {self.input}
        for node, _ in self.nodes:
            after = only.get(node.output[0])
            fused = after is not None and after.op_type in ("Relu", "Clip")
            self.quantized |= set() if fused else set(node.output)

    def is_linear(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is a convolution or dense layer with weights of its own."""
        own = len(node.input) > 1 and self.reads[node.input[1]] == 1
        return node.op_type in LINEAR and own and _key(node.input[1]) in self.weights

    def weight(self, node: onnx.NodeProto, stated: dict[str, Any]) -> Tensor:
        """Return a view of a linear node's weights, output channels first."""
        weights = self.weights[_key(node.input[1])].data
        turned = node.op_type == "Gemm" and not stated.get("transB")
        return weights.T if turned else weights

    def bias(self, node: onnx.NodeProto) -> Tensor | None:
        """Return a linear node's bias, None where it has none of its own."""
        name = node.input[2] if len(node.input) > 2 else ""
        key = _key(name)
        return self.weights[key].data if self.reads[name] == 1 and key in self.weights else None

    def with_swallowed(self, names: Collection[str]) -> set[str]:
        """Return the names of tensors, and those that go into them by a fused activation alone."""
        found = set(names)
        for node, _ in reversed(self.nodes):
            if found & set(node.output):
                found |= set(node.input) - self.quantized - self.constants.keys()
        return found

    def compute(
        self, node: onnx.NodeProto, stated: dict[str, Any], values: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Return a node's outputs from the `values` by name and the graph's own constants."""
        inputs = [
            values[name]
            if name in values
            else self.weights[_key(name)]
            if _key(name) in self.weights
            else self.constants.get(name)
            for name in node.input
        ]
        results = _OPS[node.op_type](stated, *inputs)
        return list(results) if isinstance(results, (tuple, list)) else [results]

    def forward(
        self, images: Tensor, watch: Watch | None = None, weigh: Watch | None = None
    ) -> Tensor:
        """Return the graph's output for images (images, 3, size, size).

        `watch` is called with name and value of every tensor, and `weigh` of every linear layer's
        weights; what they return is used instead.
        """
        watch = watch or (lambda name, value: value)
        values = {self.input: watch(self.input, images)}
        left = Counter(self.reads)
        for node, stated in self.nodes:
            given = dict(values)
            if weigh and self.is_linear(node):
                given[node.input[1]] = weigh(node.input[1], self.weights[_key(node.input[1])])
            for name, result in zip(node.output, self.compute(node, stated, given), strict=False):
                values[name] = watch(name, result)
            for name in node.input:
                left[name] -= 1
                if not left[name]:
                    values.pop(name, None)
        return values[self.output]


class Simulation(nn.Module):
    """A graph with the rounding of int8 in it, and gradients that pass straight through.

    One scale for each group of tensors that must share one is a parameter, as its logarithm, trained
    as in LSQ (Esser et al. 2020); zero points stay. `ranges` has one for each of `graph.quantized`.
    The graph's output is not rounded: it is the same for every correction.
    """

    def __init__(self, graph: Graph, ranges: Ranges) -> None:
        super().__init__()
        self.graph = graph
        self.group = _shared(graph)
        spans: Ranges = {}
        for name, key in self.group.items():
            low, high = spans.get(key, (0.0, 0.0))
            spans[key] = min(low, ranges[name][0]), max(high, ranges[name][1])
        kinds = {name: node.op_type for node, _ in graph.nodes for name in node.output}
        fixed = {key for name, key in self.group.items() if kinds.get(name) in FIXED}
        fixed.add(self.group[graph.input])
        self.zeros: dict[str, int] = {}
        self.logs = nn.ParameterDict()
        for key, (low, high) in spans.items():
            scale = (high - low or 1.0) / 255
            self.zeros[key] = round(-low / scale)
            log = torch.tensor(math.log(scale))
            self.logs[_key(key)] = nn.Parameter(log, requires_grad=key not in fixed)

    def ranges(self) -> Ranges:
        """Return the range of every quantized tensor."""
        found = {}
        for name, key in self.group.items():
            scale, zero = math.exp(self.logs[_key(key)].item()), self.zeros[key]
            found[name] = -zero * scale, (255 - zero) * scale
        return found

    def operations(self) -> dict[str, set[str]]:
        """Return what each operation, a fused activation included, reads and writes, by its output.

        Copies are left out: they round nothing of their own.
        """
        found: dict[str, set[str]] = {}
        swallowed: dict[str, list[str]] = {}
        for node, _ in self.graph.nodes:
            output, reads = node.output[0], list(node.input)
            for name in node.input:
                reads += swallowed.get(name, [])
            if output not in self.graph.quantized:
                swallowed[output] = reads
            elif node.op_type not in COPIES and output != self.graph.output:
                found[output] = {*reads, output}
        return found

    def forward(
        self, images: Tensor, watch: Watch | None = None, only: Collection[str] | None = None
    ) -> Tensor:
        """Return the simulated output.

        `watch` sees every tensor before it is rounded; `only` names the tensors and weights that are
        rounded, all by default.
        """
        weights = round_weights(self.graph)

        def rounded(name: str, value: Tensor) -> Tensor:
            value = watch(name, value) if watch else value
            key = self.group.get(name)
            spared = only is not None and name not in only
            if key is None or name == self.graph.output or spared:
                return value
            return _Round.apply(value, self.logs[_key(key)], self.zeros[key])

        def weighed(name: str, value: Tensor) -> Tensor:
            return value if only is not None and name not in only else weights(name, value)

        return self.graph(images, rounded, weighed)


class _Round(torch.autograd.Function):
    """torch's own learnable fake-quantize takes twenty times as long on a CPU (here, 1.6 M values)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, log: Tensor, zero: int) -> Tensor:
        scale = math.exp(log.item())
        result = (value / scale).round_().clamp_(-zero, 255 - zero).mul_(scale)
        ctx.save_for_backward(value, result)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        value, result = ctx.saved_tensors
        error = result - value
        outside = error.abs().gt_(0.501 * ctx.scale)
        # d result / d log(scale): the rounding error inside the range, the bound itself outside.
        slope = torch.addcmul(error, value, outside)
        return (
            torch.addcmul(gradient, gradient, outside, value=-1),
            slope.mul_(gradient).sum(),
            None,
        )


def round_weights(graph: Graph) -> Watch:
    """Return the function that rounds weights to 127 steps a side, for each output channel."""
    dense = {n.input[1] for n, s in graph.nodes if n.op_type == "Gemm" and not s.get("transB")}

    def rounded(name: str, value: Tensor) -> Tensor:
        axis = 1 if name in dense else 0
        others = [other for other in range(value.ndim) if other != axis]
        scale = (value.detach().abs().amax(others) / 127).clamp_min(1e-12)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(value, scale, zeros, axis, -127, 127)

    return rounded


def _shared(graph: Graph) -> dict[str, str]:
    """Return for every quantized tensor the first of those that must share its scale."""
    first = {name: name for name in graph.quantized}

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    for node, _ in graph.nodes:
        if node.op_type in COPIES:
            a, *rest = [name for name in (*node.input, *node.output) if name in first]
            for b in rest:
                first[root(b)] = root(a)
    return {name: root(name) for name in sorted(first)}


def _key(name: str) -> str:
    """Return a tensor's name as that of a parameter, which may hold no dot."""
    return name.replace(".", "|")


def _pads(stated: dict[str, Any], x: Tensor, window: tuple[int, ...]) -> list[int]:
    """Return the padding as torch's F.pad takes it: left, right, top, bottom."""
    top, left, bottom, right = stated.get("pads", (0, 0, 0, 0))
    kind = stated.get("auto_pad", "NOTSET")
    if kind.startswith("SAME"):
        strides = stated.get("strides", (1, 1))
        missing = [
            max(0, (-(-side // step) - 1) * step + k - side)
            for side, step, k in zip(x.shape[2:], strides, window, strict=True)
        ]
        less, more = [m // 2 for m in missing], [m - m // 2 for m in missing]
        first, last = (less, more) if kind == "SAME_UPPER" else (more, less)
        (top, left), (bottom, right) = first, last
    return [left, right, top, bottom]


def _conv(stated: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    left, right, top, bottom = pads = _pads(stated, x, tuple(weight.shape[2:]))
    symmetric = left == right and top == bottom
    return F.conv2d(
        x if symmetric else F.pad(x, pads),
        weight,
        bias,
        tuple(stated.get("strides", (1, 1))),
        (top, left) if symmetric else 0,
        tuple(stated.get("dilations", (1, 1))),
        stated.get("group", 1),
    )


def _gemm(stated: dict[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    if stated.get("transA"):
        a = a.T
    if stated.get("transB"):
        b = b.T
    result = stated.get("alpha", 1.0) * (a @ b)
    return result if c is None else result + stated.get("beta", 1.0) * c


def _average_pool(stated: dict[str, Any], x: Tensor) -> Tensor:
    window = tuple(stated["kernel_shape"])
    pads = _pads(stated, x, window)
    strides = tuple(stated.get("strides", (1, 1)))
    ceil = bool(stated.get("ceil_mode"))
    sums = F.avg_pool2d(F.pad(x, pads), window, strides, ceil_mode=ceil)
    if stated.get("count_include_pad") or not any(pads):
        return sums
    return sums / F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), pads), window, strides)


def _max_pool(stated: dict[str, Any], x: Tensor) -> Tensor:
    window = tuple(stated["kernel_shape"])
    padded = F.pad(x, _pads(stated, x, window), value=-torch.inf)
    strides = tuple(stated.get("strides", (1, 1)))
    return F.max_pool2d(padded, window, strides, ceil_mode=bool(stated.get("ceil_mode")))


def _resize(stated: dict[str, Any], x: Tensor, *rest: Any) -> Tensor:
    sizes = rest[2] if len(rest) > 2 else None
    sides = (
        [int(s) for s in sizes[2:]]
        if sizes is not None and len(sizes)
        else [int(side * f) for side, f in zip(x.shape[2:], rest[1][2:], strict=True)]
    )
    if stated.get("mode", "nearest") != "nearest":
        return F.interpolate(x, sides, mode="bilinear", align_corners=False)
    return F.interpolate(x, sides, mode="nearest")


def _reduce_mean(stated: dict[str, Any], x: Tensor, axes: np.ndarray | None = None) -> Tensor:
    over = stated["axes"] if axes is None else axes.tolist()
    return x.mean(tuple(over), keepdim=bool(stated.get("keepdims", 1)))


def _clip(stated: dict[str, Any], x: Tensor, *bounds: Any) -> Tensor:
    low, high = (None if b is None else float(b) for b in (*bounds, None, None)[:2])
    return x.clamp(stated.get("min", low), stated.get("max", high))


def _reshape(stated: dict[str, Any], x: Tensor, shape: np.ndarray) -> Tensor:
    sides = [x.shape[i] if side == 0 else int(side) for i, side in enumerate(shape)]
    return x.reshape(sides)


def _axes(stated: dict[str, Any], axes: np.ndarray | None) -> list[int]:
    return list(stated["axes"]) if axes is None else axes.tolist()


def _squeeze(stated: dict[str, Any], x: Tensor, axes: np.ndarray | None = None) -> Tensor:
    return x.squeeze(tuple(_axes(stated, axes)))


def _unsqueeze(stated: dict[str, Any], x: Tensor, axes: np.ndarray | None = None) -> Tensor:
    for axis in sorted(_axes(stated, axes)):
        x = x.unsqueeze(axis)
    return x


def _slice(stated: dict[str, Any], x: Tensor, *parts: Any) -> Tensor:
    starts, ends = parts[:2]
    axes = parts[2] if len(parts) > 2 and parts[2] is not None else range(len(starts))
    steps = parts[3] if len(parts) > 3 else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        part = slice(int(start), int(end), int(step))
        if step > 0:
            index[axis] = part
        else:  # torch's own slices do not go backwards
            x = x.index_select(int(axis), torch.tensor(range(x.shape[axis])[part]))
    return x[tuple(index)]


def _split(stated: dict[str, Any], x: Tensor, sizes: np.ndarray | None = None) -> Any:
    axis = stated.get("axis", 0)
    if sizes is None and "split" not in stated:
        return x.chunk(stated["num_outputs"], axis)
    return x.split([int(s) for s in (stated["split"] if sizes is None else sizes)], axis)


def _depth_to_space(stated: dict[str, Any], x: Tensor) -> Tensor:
    block = stated["blocksize"]
    if stated.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


_OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda s, a, b: _tensor(a) + _tensor(b),
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda s, *parts: torch.cat([_tensor(p) for p in parts], s["axis"]),
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": lambda s, a, b: _tensor(a) / _tensor(b),
    "Flatten": lambda s, x: x.flatten(s.get("axis", 1)),
    "Gather": lambda s, x, i: x.index_select(s.get("axis", 0), _tensor(i).reshape(-1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda s, x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda s, x: (s.get("alpha", 0.2) * x + s.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda s, x: F.hardswish(x),
    "Identity": lambda s, x: x,
    "LeakyRelu": lambda s, x: F.leaky_relu(x, s.get("alpha", 0.01)),
    "MatMul": lambda s, a, b: _tensor(a) @ _tensor(b),
    "MaxPool": _max_pool,
    "Mul": lambda s, a, b: _tensor(a) * _tensor(b),
    "ReduceMean": _reduce_mean,
    "Relu": lambda s, x: x.relu(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Sigmoid": lambda s, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda s, x: x.softmax(s.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda s, a, b: _tensor(a) - _tensor(b),
    "Tanh": lambda s, x: x.tanh(),
    "Transpose": lambda s, x: x.permute(s["perm"]),
    "Unsqueeze": _unsqueeze,
}
