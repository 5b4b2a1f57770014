"""The int8 .tflite computes what the fp32 one does, in the structure and with the scales it must have."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import pytest

from ghostedge.convert import Bundle
from ghostedge.convert.ranges import observe
from ghostedge.convert.rewrites.flat import OPS, Flat
from ghostedge.convert.to_int8_tflite import quantize
from ghostedge.errors import GhostEdgeError
from tests.convert.flat_fixtures import TYPES, Net, operators, run

STEP = 1 / 256


def pixels(count: int = 40, size: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8)


def small(batch: int = 1) -> tuple[Net, bytes, dict[str, str]]:
    """A ghost module with a gate, an SE gate, a shortcut and a head, and the names of some tensors."""
    net = Net(batch=batch)
    stem = net.conv(net.normalized(), 8, 3, relu=True)
    primary = net.conv(stem, 8, relu=True)
    cheap = net.depthwise(primary)
    joined = net.concat(primary, cheap)
    gate = net.op(OPS.LOGISTIC, [net.conv(stem, 16)], net.shape(joined))
    gated = net.arithmetic(OPS.MUL, joined, gate)
    projected = net.conv(gated, 8)
    total = net.arithmetic(OPS.ADD, projected, stem)
    content = net.bytes(net.head(total))
    found = {"primary": primary, "cheap": cheap, "joined": joined, "gate": gate, "gated": gated}
    found |= {"projected": projected, "total": total, "stem": stem}
    return net, content, {key: net.name(tensor) for key, tensor in found.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_are_those_of_float_in_every_io(batch: int) -> None:
    _, model, _ = small(batch)
    images = pixels()
    expected = run(model, images)
    assert expected.std(0).mean() > 0.02, "the net tells the images apart too little to test with"
    ranges = observe(model, images)
    found = {io: quantize(model, ranges, io) for io in ("uint8", "int8", "float32")}
    for reference in (False, True):
        outputs = {io: run(content, images, reference) for io, content in found.items()}
        assert np.abs(outputs["uint8"] - expected).max() < 6 * STEP
        assert np.array_equal(outputs["uint8"], outputs["int8"])
        assert np.array_equal(outputs["uint8"], outputs["float32"])
    # XNNPACK has no int8 softmax: only what is behind it is a second partition.
    assert [operators(found[io])["DELEGATE"] for io in ("uint8", "int8", "float32")] == [1, 1, 2]
    assert operators(found["int8"])["QUANTIZE"] == 0
    assert operators(found["uint8"])["QUANTIZE"] == 2
    assert operators(found["uint8"])["SUB"] == 0
    assert operators(found["float32"])["DEQUANTIZE"] == 1
    assert quantize(model, ranges, "uint8") == found["uint8"]


def test_scales_are_what_kernels_and_contract_demand() -> None:
    _, model, names = small()
    flat = Flat(quantize(model, observe(model, pixels()), "int8"))
    of = {
        flat.name(index): (float(t.quantization.scale[0]), int(t.quantization.zeroPoint[0]))
        for index, t in enumerate(flat.tensors)
        if t.quantization is not None and t.quantization.scale is not None
    }
    assert of[names["primary"]] == of[names["cheap"]] == of[names["joined"]]
    assert of[names["gate"]] == (1 / 256, -128)
    assert of[flat.name(flat.graph.inputs[0])] == (1 / 64, 0)
    assert of[flat.name(flat.graph.outputs[0])] == (1 / 256, -128)
    assert of[names["stem"]][1] == -128
    for kind, axis in ((OPS.CONV_2D, 0), (OPS.DEPTHWISE_CONV_2D, 3), (OPS.FULLY_CONNECTED, 0)):
        for op in flat.operators(kind):
            image, weights, bias = (flat.tensors[t] for t in op.inputs)
            assert (weights.type, bias.type) == (TYPES.INT8, TYPES.INT32)
            assert weights.quantization.quantizedDimension == axis
            assert len(weights.quantization.scale) == weights.shape[axis]
            product = image.quantization.scale[0] * weights.quantization.scale
            np.testing.assert_allclose(bias.quantization.scale, product, rtol=1e-6)


def test_nothing_of_the_floats_is_left() -> None:
    net = Net(32)
    x = net.conv(net.conv(net.normalized(), 64, 3), 128, 3)
    model = net.bytes(net.head(x))
    content = quantize(model, observe(model, pixels(4, 32)), "uint8")
    assert len(content) < len(model) / 3.5
    assert all(t.type != TYPES.FLOAT32 for t in Flat(content).tensors)


def test_input_without_the_normalization_is_the_raw_pixel() -> None:
    net = Net()
    model = net.bytes(net.head(net.conv(net.image, 8, 3)))
    images = pixels()
    found = quantize(model, observe(model, images), "uint8")
    assert Flat(found).tensors[-2].name
    assert np.abs(run(found, images) - run(model, images)).max() < 6 * STEP


def test_normalization_in_two_ops_is_exact_too() -> None:
    net = Net()
    scaled = net.arithmetic(OPS.MUL, net.normalized(), net.constant(np.float32(1 / 64)))
    first = net.weighted(scaled, net.random.normal(0, 0.3, (8, 3, 3, 3)), np.zeros(8))
    model = net.bytes(net.head(first))
    images = pixels()
    ranges = observe(model, images[:1])  # which do not reach to 0 and 255
    found = [run(quantize(model, ranges, io), images) for io in ("int8", "float32")]
    assert np.array_equal(*found)
    assert operators(quantize(model, ranges, "int8"))["MUL"] == 0


def test_ops_named_stay_in_float() -> None:
    _, model, names = small()
    ranges = observe(model, pixels())
    found = quantize(model, ranges, "uint8", [names["cheap"]])
    assert (operators(found)["DEQUANTIZE"], operators(found)["QUANTIZE"]) == (1, 3)
    assert np.abs(run(found, pixels()) - run(model, pixels())).max() < 6 * STEP


def test_neighbours_in_float_are_one_island() -> None:
    """The concatenation between them goes along, and what leaves is quantized once."""
    _, model, names = small()
    ranges = observe(model, pixels())
    chosen = [names[name] for name in ("primary", "cheap", "gate", "gated", "projected")]
    found = quantize(model, ranges, "int8", chosen)
    flat = Flat(found)
    types = {flat.name(index): tensor.type for index, tensor in enumerate(flat.tensors)}
    assert types[names["joined"]] == TYPES.FLOAT32
    # The stem, and the convolution before the gate, which nobody named.
    assert (operators(found)["DEQUANTIZE"], operators(found)["QUANTIZE"]) == (2, 1)


def test_all_in_float_is_the_float_model() -> None:
    _, model, _ = small()
    flat = Flat(model)
    every = [flat.name(op.outputs[0]) for op in flat.graph.operators]
    found = quantize(model, observe(model, pixels(2)), "float32", every)
    assert np.array_equal(run(found, pixels()), run(model, pixels()))
    assert not {"QUANTIZE", "DEQUANTIZE"} & operators(found).keys()


def test_ops_without_an_int8_kernel_stay_in_float() -> None:
    net = Net()
    x = net.conv(net.normalized(), 8, 3)
    y = net.op(OPS.SIN, [x], net.shape(x))
    model = net.bytes(net.head(net.arithmetic(OPS.ADD, x, y)))
    found = quantize(model, observe(model, pixels()), "int8")
    assert (operators(found)["DEQUANTIZE"], operators(found)["QUANTIZE"]) == (1, 1)
    assert np.abs(run(found, pixels()) - run(model, pixels())).max() < 6 * STEP


def test_sigmoid_concatenated_with_something_else_is_requantized() -> None:
    net = Net()
    x = net.conv(net.normalized(), 8, 3)
    gate = net.op(OPS.LOGISTIC, [x], net.shape(x))
    model = net.bytes(net.head(net.concat(gate, x)))
    found = quantize(model, observe(model, pixels()), "int8")
    assert operators(found)["QUANTIZE"] == 1
    assert np.abs(run(found, pixels()) - run(model, pixels())).max() < 6 * STEP


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_channels_near_zero_keep_their_bias(value: float) -> None:
    """Steps of such weights alone would make an int32 bias overflow, or round it away."""
    net = Net()
    weights = net.random.normal(0, 0.01, (6, 1, 1, 3))
    weights[::2] = value
    bias = np.array([3.0, 0.5, -2.0, 0.1, 1.0, 0.0])
    x = net.weighted(net.normalized(), weights, bias)
    model = net.bytes(net.head(x))
    ranges = observe(model, pixels())
    for reference in (False, True):
        found = run(quantize(model, ranges, "uint8"), pixels(), reference)
        assert np.abs(found - run(model, pixels())).max() < 6 * STEP


def test_weights_on_the_grid_stay_where_they_are() -> None:
    """What a rounding of its own put on the grid of max / 127 is not rounded again."""
    net = Net()
    steps = net.random.integers(-127, 128, (4, 3, 3, 3))
    steps[:, 0, 0, 0] = 127
    scale = np.array([1e-3, 2e-2, 0.3, 0.01]).reshape(4, 1, 1, 1)
    model = net.bytes(net.head(net.weighted(net.normalized(), steps * scale, np.zeros(4))))
    flat = Flat(quantize(model, observe(model, pixels(2)), "int8"))
    (op,) = flat.operators(OPS.CONV_2D)
    data = flat.data(op.inputs[1])
    assert data is not None
    assert np.array_equal(data.view(np.int8).reshape(steps.shape), steps)


OPERATORS: dict[str, Callable[[Net, int], int]] = {
    "add": lambda n, x: n.arithmetic(OPS.ADD, x, n.conv(x, 8)),
    "add constant": lambda n, x: n.arithmetic(OPS.ADD, x, n.constant(np.linspace(-1, 1, 8))),
    "subtract": lambda n, x: n.arithmetic(OPS.SUB, x, n.conv(x, 8)),
    "multiply": lambda n, x: n.arithmetic(OPS.MUL, x, n.conv(x, 8)),
    "multiply constant": lambda n, x: n.arithmetic(OPS.MUL, x, n.constant(np.linspace(0.2, 1, 8))),
    "concat constant": lambda n, x: n.concat(x, n.constant(np.ones((1, 8, 8, 2)))),
    "pad": lambda n, x: n.op(
        OPS.PAD,
        [x, n.constant(np.array([[0, 0], [1, 2], [2, 1], [0, 0]]))],
        [1, 11, 11, 8],
        options="PadOptions",
    ),
    "max pool of a padding with the lowest": lambda n, x: pool(n, lowest(n, x), OPS.MAX_POOL_2D),
    "max pool": lambda n, x: pool(n, x, OPS.MAX_POOL_2D),
    "average pool": lambda n, x: pool(n, x, OPS.AVERAGE_POOL_2D),
    "reshape": lambda n, x: n.op(
        OPS.RESHAPE, [x, n.constant(np.array([1, 4, 16, 8]))], [1, 4, 16, 8]
    ),
    "transpose": lambda n, x: n.op(
        OPS.TRANSPOSE, [x, n.constant(np.array([0, 2, 3, 1]))], [1, 8, 8, 8]
    ),
    "slice": lambda n, x: n.op(
        OPS.SLICE,
        [x, n.constant(np.array([0, 1, 0, 2])), n.constant(np.array([1, 7, 8, 4]))],
        [1, 7, 8, 4],
        options="SliceOptions",
    ),
    "strided slice": lambda n, x: n.op(
        OPS.STRIDED_SLICE,
        [x, *(n.constant(np.array(v)) for v in ([0, 0, 0, 4], [1, 8, 8, 8], [1, 1, 1, 1]))],
        [1, 8, 8, 4],
        options="StridedSliceOptions",
    ),
    "split": lambda n, x: n.op(
        OPS.SPLIT,
        [n.constant(np.array(3)), x],
        [1, 8, 8, 4],
        [1, 8, 8, 4],
        options="SplitOptions",
        numSplits=2,
    )[1],
    "gather": lambda n, x: n.op(
        OPS.GATHER,
        [x, n.constant(np.array([3, 1, 2]))],
        [1, 8, 8, 3],
        options="GatherOptions",
        axis=3,
    ),
    "relu": lambda n, x: n.op(OPS.RELU, [x], [1, 8, 8, 8]),
    "relu6": lambda n, x: n.op(OPS.RELU6, [x], [1, 8, 8, 8]),
    "leaky relu": lambda n, x: n.op(
        OPS.LEAKY_RELU, [x], [1, 8, 8, 8], options="LeakyReluOptions", alpha=0.1
    ),
    "hard swish": lambda n, x: n.op(OPS.HARD_SWISH, [x], [1, 8, 8, 8]),
    "maximum": lambda n, x: n.op(
        OPS.MAXIMUM, [x, n.conv(x, 8)], [1, 8, 8, 8], options="MaximumMinimumOptions"
    ),
    "depth to space": lambda n, x: n.op(
        OPS.DEPTH_TO_SPACE, [x], [1, 16, 16, 2], options="DepthToSpaceOptions", blockSize=2
    ),
    "space to depth": lambda n, x: n.op(
        OPS.SPACE_TO_DEPTH, [x], [1, 4, 4, 32], options="SpaceToDepthOptions", blockSize=2
    ),
    "nearest": lambda n, x: n.op(
        OPS.RESIZE_NEAREST_NEIGHBOR,
        [x, n.constant(np.array([16, 16]))],
        [1, 16, 16, 8],
        options="ResizeNearestNeighborOptions",
    ),
    "bilinear": lambda n, x: n.op(
        OPS.RESIZE_BILINEAR,
        [x, n.constant(np.array([16, 16]))],
        [1, 16, 16, 8],
        options="ResizeBilinearOptions",
    ),
}


def lowest(net: Net, x: int) -> int:
    """As ONNX pads before a max pool."""
    borders = net.constant(np.array([[0, 0], [1, 1], [1, 1], [0, 0]]))
    value = net.constant(np.float32(np.finfo(np.float32).min))
    return int(net.op(OPS.PADV2, [x, borders, value], [1, 10, 10, 8], options="PadV2Options"))


def pool(net: Net, x: int, kind: int) -> int:
    shape = [1, net.shape(x)[1] // 2, net.shape(x)[2] // 2, 8]
    sizes = {"strideW": 2, "strideH": 2, "filterWidth": 2, "filterHeight": 2}
    return int(net.op(kind, [x], shape, options="Pool2DOptions", **sizes))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_computes_in_int8(name: str) -> None:
    net = Net()
    x = OPERATORS[name](net, net.conv(net.normalized(), 8, 3))
    model = net.bytes(net.head(x))
    images = pixels()
    found = quantize(model, observe(model, images), "uint8")
    assert operators(found)["DEQUANTIZE"] == 0
    assert all(t.type != TYPES.FLOAT32 for t in Flat(found).tensors)
    expected = run(model, images)
    for reference in (False, True):
        assert np.abs(run(found, images, reference) - expected).max() < 8 * STEP


def test_what_cannot_be_quantized_is_a_sentence() -> None:
    _, model, names = small()
    ranges = observe(model, pixels(2))
    with pytest.raises(GhostEdgeError, match=r"No op computes a tensor 't999'"):
        quantize(model, ranges, "uint8", ["t999"])
    del ranges[names["cheap"]]
    with pytest.raises(GhostEdgeError, match=rf"no range for the tensor '{names['cheap']}'"):
        quantize(model, ranges, "uint8")
    ranges = observe(model, pixels(2))
    with pytest.raises(GhostEdgeError, match="int8 tensors already"):
        quantize(quantize(model, ranges, "uint8"), ranges, "uint8")


def test_exported_network_is_one_partition(bundle: Bundle) -> None:
    content = (bundle.path / "model_int8.tflite").read_bytes()
    found = operators(content)
    assert found["DELEGATE"] == 1
    assert (found["QUANTIZE"], found["DEQUANTIZE"], found["SUB"]) == (2, 0, 0)
    floats = operators((bundle.path / "model_fp32.tflite").read_bytes())
    assert found - collections.Counter(QUANTIZE=2) == floats - collections.Counter(SUB=1)
