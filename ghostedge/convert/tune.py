"""Corrections that make a float graph lose less in int8.

They change initializers of the simplified core ONNX graph (`to_onnx`) and nothing else, so that one
result serves the int8 TFLite and the int8 ONNX file. Images are the core's input: float32
(images, 3, size, size), `(pixel - 128) / 64`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

from ghostedge.convert.fake_quant import COPIES, Graph, Simulation, _key
from ghostedge.convert.ranges import Ranges
from ghostedge.pixels import MIDDLE, STEP

BATCH = 100
STRENGTH = 0.85
"""Share of the equalisation that goes to activations, the rest to the weights that read them: of 0.5,
0.7, 0.85 and 1 the best on 2,000 images in simulation (shipped 1.0x). Rounding of activations is the larger
part of what int8 loses, as weights have a scale for each output channel."""
RATE, RANGE_RATE, TRAIN_BATCH = 5e-5, 5e-3, 100
INNER = 0.9999
"""Share of the values that ranges keep."""
FLOOR = 1e-6
"""Channels this much smaller than the largest are dead on these images."""


def changed(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Return a copy of a model that has the graph's weights by name, with the graph's values."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if _key(tensor.name) in graph.weights:
            value = graph.weights[_key(tensor.name)].detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return result


def prepare(graph: Graph, images: Tensor) -> Ranges:
    """Equalise channels and correct biases, in place; return the ranges that this is for."""
    equalize(graph, images)
    ranges = observe(graph, images, INNER)
    correct_biases(graph, ranges, images)
    return ranges


def observe(graph: Graph, images: Tensor, inner: float = 1.0) -> Ranges:
    """Return the range of every quantized tensor that holds a share `inner` of its values, and zero.

    Below 1, as the mean over batches of the values that leave half of the rest on each side.
    """
    seen: dict[str, list[tuple[float, float]]] = {}

    def see(name: str, value: Tensor) -> Tensor:
        if name in graph.quantized:
            rest = max(1, round(value.numel() * (1 - inner) / 2))
            ends = [rest - 1, value.numel() - rest]
            low, high = np.partition(value.numpy(), ends, None)[ends].tolist()
            seen.setdefault(name, []).append((low, high))
        return value

    _run(graph, images, see)
    ranges = {}
    for name, spans in seen.items():
        lows, highs = zip(*spans, strict=True)
        low, high = (min(lows), max(highs)) if inner == 1 else (np.mean(lows), np.mean(highs))
        ranges[name] = min(0.0, float(low)), max(0.0, float(high))
    # A pixel's whole range, whatever the images hold: the int8 input is the pixel minus 128.
    ranges[graph.input] = -2.0, 127 / 64
    return ranges


def equalize(graph: Graph, images: Tensor) -> None:
    """Scale channels, in place, so that those of a tensor span like ranges; the function is the same.

    Cross-layer equalisation (Nagel et al. 2019), balanced between activations and weights as in
    SmoothQuant (Xiao et al. 2023). What must share a scale is found first: see `_classes`.
    """
    labels, count = _classes(graph, images[:1])
    peaks: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        if name in graph.quantized:
            peak = value.abs().amax(0)
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)
        return value

    _run(graph, images, see)
    logs, tensors = np.zeros(count), np.zeros(count)
    for name, peak in peaks.items():
        highest = np.zeros(count)
        np.maximum.at(highest, labels[name][0], peak.numpy())
        present = np.unique(labels[name])
        share = highest[present] / max(highest.max(), 1e-30)
        present, share = present[share > FLOOR], share[share > FLOOR]
        logs[present] += np.log(share)
        tensors[present] += 1
    activations = np.exp(logs / np.maximum(tensors, 1))
    weights, dense = np.zeros(count), np.zeros(count, bool)
    linear = [(node, stated) for node, stated in graph.nodes if graph.is_linear(node)]
    for node, stated in linear:
        columns = graph.weight(node, stated).abs()
        if columns.shape[1] > 1:  # a depthwise channel has its own scale, whatever its size
            columns = columns.reshape(*columns.shape[:2], -1).amax(2)
            share = columns / columns.amax(1, keepdim=True).clamp_min(1e-30)
            inputs = _inputs(labels[node.input[0]], stated.get("group", 1), len(columns))
            np.maximum.at(weights, inputs, share.numpy())
            dense[inputs] = True
    weights = np.where(weights > FLOOR, weights, 1)
    scales = np.where(dense, weights ** (1 - STRENGTH) / activations**STRENGTH, 1 / activations)
    dead = dense & (tensors == 0)
    alive = dense & ~dead
    if alive.any():
        # Nothing is known of their values; but their weights may not set the scale of the others'.
        scales[dead] = weights[dead] / np.exp(np.log(weights[alive] / scales[alive]).mean())
    scales[0] = 1
    for node, stated in linear:
        weight = graph.weight(node, stated)
        made = torch.from_numpy(_channels(labels[node.output[0]]))
        read = torch.from_numpy(_inputs(labels[node.input[0]], stated.get("group", 1), len(weight)))
        ratio = torch.from_numpy(scales)[made][:, None] / torch.from_numpy(scales)[read]
        weight *= ratio.reshape(*ratio.shape, *[1] * (weight.ndim - 2)).float()
        bias = graph.bias(node)
        if bias is not None:
            bias *= torch.from_numpy(scales)[made].float()


SPATIAL = ("AveragePool", "GlobalAveragePool", "MaxPool", "Resize")
MOVING = COPIES - {*SPATIAL, "Identity", "Pad"}


def _classes(graph: Graph, image: Tensor) -> tuple[dict[str, np.ndarray], int]:
    """Return the class of every value of every tensor, and one more than the highest class.

    Values of one class must be scaled by one positive factor for the graph to stay exact, different
    classes may be scaled freely; those of class 0 must stay as they are. So channels are free after a
    convolution; relu, pools and resizing keep a class; concat, split and reshape move it; a sum
    joins two; a product with something that must stay, as a gate, keeps it. Else it is 0.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, value: Tensor) -> Tensor:
        shapes[name] = tuple(value.shape)
        return value

    _run(graph, image, see)
    parent = [0]

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    def tie(a: np.ndarray, b: np.ndarray | int) -> None:
        pairs = np.stack([x.ravel() for x in np.broadcast_arrays(a, b)])
        for pair in np.unique(pairs, axis=1).T.tolist():
            low, high = sorted(map(root, pair))
            parent[high] = low

    def alike(values: np.ndarray) -> np.ndarray:
        """Tie the classes of each channel over space, and return them with sides of 1."""
        first = values.reshape(*values.shape[:2], -1)[:, :, :1]
        tie(values.reshape(*values.shape[:2], -1), first)
        return first

    labels = {graph.input: np.zeros(shapes[graph.input], int)}
    for node, stated in graph.nodes:
        kind, shape = node.op_type, shapes[node.output[0]]
        known = [name for name in node.input if name in labels]
        values = [labels[name] for name in known]
        found: list[np.ndarray] | None = None
        if graph.is_linear(node) and known == [node.input[0]]:
            alike(values[0])
            if graph.bias(node) is not None or len(node.input) < 3:
                first = len(parent)
                parent += range(first, first + shape[1])
                free = np.arange(first, len(parent)).reshape(1, -1, *[1] * (len(shape) - 2))
                found = [np.broadcast_to(free, shape)]
        elif kind in ("Relu", "LeakyRelu", "Identity"):
            found = values
        elif kind in SPATIAL or (kind == "ReduceMean" and len(shape) == 4 and shape[2:] == (1, 1)):
            found = [np.broadcast_to(alike(values[0])[..., None], shape)]
        elif kind in MOVING and (kind != "Concat" or len(known) == len(node.input)):
            given = {name: torch.from_numpy(labels[name].copy()) for name in known}
            found = [moved.numpy() for moved in graph.compute(node, stated, given)]
        elif kind == "Add" and len(known) == 2:
            a, b = (np.broadcast_to(value, shape) for value in values)
            tie(a, b)
            found = [a]
        elif kind == "Mul":
            stay = [name for name in known if not any(map(root, np.unique(labels[name])))]
            gate = next(iter(stay), known[-1]) if len(known) == 2 else None
            if gate is not None:
                tie(labels[gate], 0)
            found = [np.broadcast_to(labels[name], shape) for name in known if name != gate][:1]
        if not found:
            for value in values:
                tie(value, 0)
            found = [np.zeros(shapes[name], int) for name in node.output if name in shapes]
        labels.update(zip(node.output, found, strict=False))
    tie(labels[graph.output], 0)
    roots = np.array([root(index) for index in range(len(parent))])
    return {name: roots[value] for name, value in labels.items()}, len(parent)


def _channels(labels: np.ndarray) -> np.ndarray:
    return labels[0].reshape(labels.shape[1], -1)[:, 0]


def _inputs(labels: np.ndarray, groups: int, outputs: int) -> np.ndarray:
    """Return the class that each weight (output channel, input channel) of a layer reads."""
    return np.repeat(_channels(labels).reshape(groups, -1), outputs // groups, axis=0)


def correct_biases(graph: Graph, ranges: Ranges, images: Tensor) -> None:
    """Shift biases, in place, by what int8 adds to the mean of each channel (Nagel et al. 2019).

    Layer after layer, so that each is measured with those before it corrected; for that all images run
    at once, fewer where they are large.
    """
    images = images[: max(32, 500 * 32**2 // images[0, 0].numel())]
    means: dict[str, Tensor] = {}
    linear = {node.output[0]: node for node, _ in graph.nodes if graph.bias(node) is not None}
    linear = {name: node for name, node in linear.items() if graph.is_linear(node)}

    def average(value: Tensor) -> Tensor:
        return value.mean([axis for axis in range(value.ndim) if axis != 1])

    def see(name: str, value: Tensor) -> Tensor:
        if name in linear:
            means[name] = average(value)
        return value

    def shift(name: str, value: Tensor) -> Tensor:
        if name in linear:
            error = average(value) - means[name]
            bias = graph.bias(linear[name])
            assert bias is not None
            bias -= error
            value = value - error.reshape(1, -1, *[1] * (value.ndim - 2))
        return value

    with torch.no_grad():
        graph(images, see)
        Simulation(graph, ranges)(images, shift)


def sensitivity(graph: Graph, ranges: Ranges, images: Tensor) -> list[str]:
    """Return the outputs of operations, the most sensitive first.

    Each operation alone is computed in int8: its weights and the tensors that it reads and writes are
    rounded, and the divergence of the probabilities from those in float counts. Copies are left out.
    """
    simulated = Simulation(graph, ranges)
    divergences = {}
    with torch.no_grad():
        expected = torch.cat([graph(part) for part in images.split(BATCH)])
        for output, around in simulated.operations().items():
            found = torch.cat([simulated(part, only=around) for part in images.split(BATCH)])
            apart = F.kl_div(found.clamp_min(1e-8).log(), expected, reduction="batchmean")
            divergences[output] = float(apart)
    return sorted(divergences, key=lambda name: -divergences[name])


def fine_tune(
    graph: Graph,
    ranges: Ranges,
    images: np.ndarray,
    epochs: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> Ranges:
    """Train weights, in place, and ranges with the rounding of int8 simulated; return the ranges.

    The graph as it is given is the teacher: the loss is the divergence from its probabilities
    (quantization-aware training by distillation). `images` are uint8 (images, size, size, 3), which
    are mirrored and shifted; no label is used.
    """
    teacher = copy.deepcopy(graph).eval()
    student = Simulation(graph, ranges)
    logs = [p for p in student.logs.values() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": list(graph.weights.values()), "lr": RATE}, {"params": logs, "lr": RANGE_RATE}]
    )
    steps = epochs * max(1, len(images) // TRAIN_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = np.random.default_rng(seed)
    for epoch in range(epochs):
        order, losses = generator.permutation(len(images)), []
        for start in range(0, max(1, len(images) - TRAIN_BATCH + 1), TRAIN_BATCH):
            part = torch.from_numpy(
                _augmented(images[order[start : start + TRAIN_BATCH]], generator)
            )
            values = core_input(part)
            with torch.no_grad():
                wanted = teacher(values)
            loss = F.kl_div(student(values).clamp_min(1e-8).log(), wanted, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        say(f"  epoch {epoch + 1} of {epochs}: divergence from float {np.mean(losses):.5f}")
    return student.ranges()


def _augmented(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mirror half of the images and shift all by up to an eighth of their size, edges mirrored."""
    mirrored = generator.random(len(images)) < 0.5
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    size = images.shape[1]
    reach = size // 8
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "reflect")
    corners = generator.integers(0, 2 * reach + 1, (len(images), 2))
    cut = [image[y : y + size, x : x + size] for image, (y, x) in zip(padded, corners, strict=True)]
    return np.stack(cut)


def core_input(pixels: Tensor) -> Tensor:
    """Return raw pixels, uint8 (images, size, size, 3), as what the core graph takes."""
    values = (pixels.permute(0, 3, 1, 2).float() - MIDDLE) / STEP
    return values.contiguous(memory_format=torch.channels_last)


def _run(net: Graph | Simulation, images: Tensor, watch: Callable[[str, Tensor], Tensor]) -> None:
    with torch.no_grad():
        for part in images.split(BATCH):
            net(part, watch)
