"""Every pass computes the same, changes what it says and leaves alone what it cannot prove."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ghostedge.convert import to_onnx, to_tflite
from ghostedge.convert.rewrites import ORT_INT8, TFLITE, finish, rewrite
from ghostedge.convert.rewrites.average_pool import average_pool
from ghostedge.convert.rewrites.full_lanes import full_lanes
from ghostedge.convert.rewrites.gather_upsample import gather_upsample
from ghostedge.convert.rewrites.hard_sigmoid import hard_sigmoid
from ghostedge.convert.rewrites.hard_sigmoid_clip import hard_sigmoid_clip
from ghostedge.convert.rewrites.nearest_upsample import nearest_upsample
from ghostedge.convert.rewrites.strided_concat import strided_concat
from ghostedge.convert.rewrites.thin_concat import thin_concat
from ghostedge.convert.rewrites.wide_concat import wide_concat
from ghostedge.models import create, fold
from ghostedge.models.ghostnetv3 import GhostNetV3, Row, Spec
from ghostedge.pixels import PixelContract
from tests.convert.flat_fixtures import operators, run

Change = Callable[[onnx.ModelProto], int]


class Builder:
    """A graph under construction; `x` is its input, random constants come from a seed."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0, opset: int = 17) -> None:
        self.shape, self.opset = shape, opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    def conv(self, x: str, cin: int, cout: int, kernel: int = 1, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        weight = self.random.normal(size=(cout, cin // group, kernel, kernel)).astype(np.float32)
        bias = self.random.normal(size=cout).astype(np.float32)
        given = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel], **attributes}
        return self.node("Conv", x, self.constant(weight), self.constant(bias), **given)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def outputs(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {model.graph.input[0].name: x})


def same(before: onnx.ModelProto, after: onnx.ModelProto, seed: int = 0) -> None:
    """Compare on random values, to 1e-5 of each output's range."""
    shape = [side.dim_value for side in before.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).uniform(-2, 2, shape).astype(np.float32)
    for old, new in zip(outputs(before, x), outputs(after, x), strict=True):
        assert old.shape == new.shape
        assert np.abs(old - new).max() <= 1e-5 * max(float(np.ptp(old)), 1e-3)


def check(model: onnx.ModelProto, change: Change, sites: int) -> collections.Counter[str]:
    """Apply one pass, expect it at so many sites; return the operators of the result."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert change(copy) == sites
    untouched = model.SerializeToString()
    after = rewrite(model, [change])
    assert model.SerializeToString() == untouched
    if sites == 0:
        assert after.graph.node == model.graph.node
    same(model, after)
    used = {name for node in after.graph.node for name in node.input}
    assert {tensor.name for tensor in after.graph.initializer} <= used
    return kinds(after)


def kinds(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


# --- nearest_upsample


@pytest.mark.parametrize(
    ("mode", "nearest"),
    [
        ("asymmetric", "floor"),
        ("asymmetric", "round_prefer_floor"),
        ("half_pixel", "round_prefer_floor"),
        ("half_pixel", "round_prefer_ceil"),
        ("pytorch_half_pixel", "round_prefer_floor"),
    ],
)
@pytest.mark.parametrize("form", ["scales", "sizes"])
def test_upsample_by_two(mode: str, nearest: str, form: str) -> None:
    build = Builder((2, 3, 4, 5))
    build.node("Relu", "x")
    wanted = np.array([1, 1, 2, 2], np.float32) if form == "scales" else np.array([2, 3, 8, 10])
    given = ["", build.constant(wanted)] if form == "scales" else ["", "", build.constant(wanted)]
    attributes = {"coordinate_transformation_mode": mode, "nearest_mode": nearest}
    y = build.node("Resize", "Relu0", *given, mode="nearest", **attributes)
    found = check(build.model(y), nearest_upsample, 1)
    assert found == {"Relu": 1, "Concat": 1, "DepthToSpace": 1}


@pytest.mark.parametrize(
    ("wanted", "attributes"),
    [
        ([1, 1, 3, 3], {}),
        ([1, 1, 2, 1], {}),
        ([1, 1, 2.5, 2], {}),
        ([1, 1, 2, 2], {"mode": "linear"}),
        ([1, 1, 2, 2], {"nearest_mode": "ceil"}),
        ([1, 1, 2, 2], {"nearest_mode": "round_prefer_ceil"}),
        ([1, 1, 2, 2], {"coordinate_transformation_mode": "align_corners"}),
    ],
)
def test_another_resize_stays(wanted: list[float], attributes: dict[str, str]) -> None:
    build = Builder((1, 3, 4, 5))
    plain = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    scales = build.constant(np.array(wanted, np.float32))
    y = build.node("Resize", "x", "", scales, **{"mode": "nearest", **plain, **attributes})
    check(build.model(y), nearest_upsample, 0)


def test_an_upsample_to_an_odd_size_stays() -> None:
    build = Builder((1, 3, 4, 4))
    plain = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    y = build.node("Resize", "x", "", "", build.constant(np.array([1, 3, 9, 9])), **plain)
    check(build.model(y), nearest_upsample, 0)


# --- average_pool


@pytest.mark.parametrize("size", [(6, 8), (7, 9), (3, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_average_pool_of_any_size(size: tuple[int, int], seed: int) -> None:
    build = Builder((1, 5, *size), seed)
    y = build.node("AveragePool", build.conv("x", 5, 5), kernel_shape=[2, 2], strides=[2, 2])
    assert check(build.model(y), average_pool, 1) == {"Conv": 2}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2]},
        {"kernel_shape": [2, 2]},
        {"kernel_shape": [2, 2], "strides": [2, 1]},
        {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    ],
)
def test_another_pool_stays(attributes: dict[str, Any]) -> None:
    build = Builder((1, 4, 7, 7))
    check(build.model(build.node("AveragePool", "x", **attributes)), average_pool, 0)


# --- hard_sigmoid

SIXTH = {"alpha": 1 / 6, "beta": 0.5}


def squeeze_excite(build: Builder, channels: int) -> tuple[str, str, str]:
    """Return what is weighted, its weights' conv, and the product."""
    x = build.conv("x", 3, channels, 3)
    weights = build.conv(build.node("GlobalAveragePool", x), channels, channels)
    return x, weights, build.node("Mul", x, build.node("HardSigmoid", weights, **SIXTH))


@pytest.mark.parametrize("seed", range(3))
def test_hard_sigmoid_folds_into_its_convs(seed: int) -> None:
    build = Builder((1, 3, 6, 6), seed)
    _, _, product = squeeze_excite(build, 8)
    y = build.conv(product, 8, 4, 3)
    z = build.conv(product, 8, 8, 3, group=8)
    found = check(build.model(y, z), hard_sigmoid, 1)
    assert found == {"Conv": 4, "GlobalAveragePool": 1, "Clip": 1, "Mul": 1}


def test_a_shared_weight_keeps_its_value() -> None:
    build = Builder((1, 4, 6, 6))
    weight = build.constant(build.random.normal(size=(4, 4, 1, 1)).astype(np.float32))
    bias = build.constant(build.random.normal(size=4).astype(np.float32))
    x = build.node("Conv", "x", weight, bias)
    gate = build.node("HardSigmoid", build.node("Conv", x, weight, bias), **SIXTH)
    y = build.node("Conv", build.node("Mul", gate, x), weight, bias)
    assert check(build.model(y), hard_sigmoid, 1)["Clip"] == 1


def test_a_conv_without_bias_gets_one() -> None:
    build = Builder((1, 4, 6, 6))
    weight = build.constant(build.random.normal(size=(4, 4, 1, 1)).astype(np.float32))
    gate = build.node("HardSigmoid", build.node("Conv", "x", weight), **SIXTH)
    y = build.conv(build.node("Mul", "x", gate), 4, 4)
    assert check(build.model(y), hard_sigmoid, 1) == {"Conv": 2, "Clip": 1, "Mul": 1}


@pytest.mark.parametrize("reader", ["Relu", "output", "product", "body"])
def test_hard_sigmoid_with_other_readers_is_not_folded(reader: str) -> None:
    build = Builder((1, 3, 6, 6))
    _, weights, product = squeeze_excite(build, 8)
    ends = [build.conv(product, 8, 4)]
    if reader == "Relu":  # of the conv before: no bias may change
        ends.append(build.node("Relu", weights))
    if reader == "output":  # the product itself: no weight may change
        ends.append(product)
    if reader == "product":  # something else that reads it
        ends.append(build.node("Sigmoid", product))
    if reader == "body":
        inner = helper.make_node("Relu", [weights], ["inner"])
        info = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 8, 1, 1])
        body = helper.make_graph([inner], "body", [], [info])
        ends.append(
            build.node("If", build.constant(np.array(True)), then_branch=body, else_branch=body)
        )
    found = check(build.model(*ends), hard_sigmoid, 1)
    assert (found["Add"], found["Mul"]) == ((1, 1) if reader in ("Relu", "body") else (0, 2))


def test_hard_swish_and_no_conv_around() -> None:
    build = Builder((1, 8, 5, 5))
    x = build.conv("x", 8, 8)
    y = build.node("Mul", x, build.node("HardSigmoid", x, **SIXTH))
    z = build.node("HardSigmoid", "x", **SIXTH)
    assert check(build.model(y, z), hard_sigmoid, 2) == {"Conv": 1, "Add": 2, "Clip": 2, "Mul": 3}


def test_another_hard_sigmoid_stays() -> None:
    build = Builder((1, 8, 5, 5))
    check(build.model(build.node("HardSigmoid", build.conv("x", 8, 8))), hard_sigmoid, 0)


# --- thin_concat


def ghost(build: Builder, half: int, relu: bool, kernel: int = 3) -> str:
    p = build.conv("x", 6, half)
    p = build.node("Relu", p) if relu else p
    c = build.conv(p, half, half, kernel, group=half)
    c = build.node("Relu", c) if relu else c
    return build.node("Concat", p, c, axis=1)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("half", [1, 4, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_thin_ghost_module(relu: bool, half: int, kernel: int) -> None:
    build = Builder((1, 6, 7, 8), half)
    y = build.conv(ghost(build, half, relu, kernel), 2 * half, 5)
    found = check(build.model(y), thin_concat, 1)
    assert found == {"Conv": 3} | ({"Relu": 2} if relu else {})


def test_a_thin_module_may_be_the_output() -> None:
    build = Builder((1, 6, 7, 8))
    check(build.model(ghost(build, 4, True)), thin_concat, 1)


@pytest.mark.parametrize("reason", ["wide", "order", "reader", "one relu", "stride", "grouped"])
def test_another_concat_stays(reason: str) -> None:
    build = Builder((1, 8, 7, 8))
    half = 12 if reason == "wide" else 8
    q = build.conv("x", 8, half, group=8 if reason == "grouped" else 1)
    p = build.node("Relu", q)
    kernel = {"strides": [2, 2]} if reason == "stride" else {}
    c = build.conv(p, half, half, 3, group=half, **kernel)
    c = c if reason == "one relu" else build.node("Relu", c)
    first = build.node("MaxPool", p, kernel_shape=[1, 1], strides=[2, 2]) if kernel else p
    pair = [c, first] if reason == "order" else [first, c]
    ends = [build.node("Concat", *pair, axis=1)] + ([q] if reason == "reader" else [])
    check(build.model(*ends), thin_concat, 0)


# --- strided_concat


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_concat_moves_behind_a_strided_depthwise_conv(size: tuple[int, int], kernel: int) -> None:
    build = Builder((1, 3, *size))
    joined = build.node("Concat", build.conv("x", 3, 6), build.conv("x", 3, 4), "x", axis=1)
    y = build.conv(joined, 13, 13, kernel, group=13, strides=[2, 2])
    found = check(build.model(y), strided_concat, 1)
    assert found == {"Conv": 5, "Concat": 1}


@pytest.mark.parametrize("reason", ["stride", "dense", "reader"])
def test_concat_stays_before_another_conv(reason: str) -> None:
    build = Builder((1, 3, 8, 8))
    joined = build.node("Concat", build.conv("x", 3, 5), "x", axis=1)
    strides = [1, 1] if reason == "stride" else [2, 2]
    y = build.conv(joined, 8, 8, 3, group=1 if reason == "dense" else 8, strides=strides)
    check(build.model(y, *([joined] if reason == "reader" else [])), strided_concat, 0)


# --- for ONNX Runtime: wide_concat, hard_sigmoid_clip, gather_upsample, full_lanes


@pytest.mark.parametrize(("half", "sites"), [(4, 1), (20, 1), (64, 1), (65, 0)])
def test_wide_ghost_module(half: int, sites: int) -> None:
    build = Builder((1, 6, 5, 5))
    model = build.model(build.conv(ghost(build, half, True), 2 * half, 5))
    check(model, wide_concat, sites)
    after = rewrite(model, [wide_concat])
    assert {node.name for node in after.graph.node} <= {node.name for node in model.graph.node}


@pytest.mark.parametrize("settings", [SIXTH, {}, {"alpha": 0.3, "beta": 0.6}])
@pytest.mark.parametrize("bias", [True, False])
def test_hard_sigmoid_becomes_a_clip(settings: dict[str, float], bias: bool) -> None:
    build = Builder((1, 3, 6, 6))
    gate = build.conv("x", 3, 4)
    if not bias:
        del build.nodes[-1].input[2]
    y = build.node("HardSigmoid", gate, **settings)
    assert check(build.model(y), hard_sigmoid_clip, 1) == {"Conv": 1, "Clip": 1}


def test_a_hard_sigmoid_of_what_others_read_stays() -> None:
    build = Builder((1, 3, 6, 6))
    gate = build.conv("x", 3, 3)
    y = build.node("Mul", gate, build.node("HardSigmoid", gate))
    check(build.model(y, build.node("HardSigmoid", build.node("Relu", gate))), hard_sigmoid_clip, 0)


@pytest.mark.parametrize("factors", [[1, 1, 2, 2], [1, 1, 3, 3], [1, 1, 2, 1]])
def test_upsample_by_gathers(factors: list[int]) -> None:
    build = Builder((2, 3, 4, 5))
    scales = build.constant(np.array(factors, np.float32))
    plain = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    y = build.node("Resize", "x", "", scales, mode="nearest", **plain)
    double = factors == [1, 1, 2, 2]
    found = check(build.model(y), gather_upsample, int(double))
    assert found == ({"Transpose": 2, "Gather": 2} if double else {"Resize": 1})


def widths(model: onnx.ModelProto) -> list[int]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return [constants[n.input[1]].dims[0] for n in model.graph.node if n.op_type == "Conv"]


def residual(build: Builder, channels: int, group: int | None = None) -> str:
    """A depthwise Conv of a Conv of x, added to what it reads, gated by its mean."""
    x = build.conv("x", 3, channels)
    y = build.node("Add", x, build.conv(x, channels, channels, 3, group=group or channels))
    squeezed = build.conv(build.node("GlobalAveragePool", y), channels, 5)
    return build.node("Mul", y, build.node("Sigmoid", build.conv(squeezed, 5, channels)))


@pytest.mark.parametrize(("channels", "filled"), [(20, 32), (2, 16), (16, 16), (40, 48)])
def test_lanes_are_filled(channels: int, filled: int) -> None:
    build = Builder((1, 3, 6, 6))
    model = build.model(build.conv(residual(build, channels), channels, 7, 3))
    check(model, full_lanes, 0 if channels == filled else 5)
    assert widths(rewrite(model, [full_lanes])) == [filled, filled, 5, filled, 7]


@pytest.mark.parametrize("reason", ["output", "grouped", "constant", "sizes", "softmax", "dense"])
def test_lanes_stay(reason: str) -> None:
    build = Builder((1, 3, 6, 6))
    y = residual(build, 20, 4 if reason == "grouped" else 1 if reason == "dense" else None)
    if reason == "constant":
        y = build.node("Mul", y, build.constant(np.arange(20, dtype=np.float32).reshape(20, 1, 1)))
    if reason == "sizes":
        y = build.node("Resize", y, "", "", build.constant(np.array([1, 20, 12, 12])))
    if reason == "softmax":
        y = build.node("Softmax", y, axis=1)
    check(build.model(y if reason == "output" else build.conv(y, 20, 7)), full_lanes, 0)


# --- whole networks


def lively(net: nn.Module, size: int) -> nn.Module:
    """Return a random net's deployed form, its BatchNorms as after training: no bias is zero."""
    random = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics become those of one batch
            module.bias.data.normal_(0, 0.3, generator=random)
    with torch.no_grad():
        net.train()(torch.randn(16, 3, size, size, generator=random))
    return fold(net)


@pytest.mark.parametrize(
    ("name", "width", "size", "upsamples"),
    [
        ("ghostnetv3-small", 0.5, 32, 8),
        ("ghostnetv3-small", 1.0, 32, 8),
        ("ghostnetv3-small", 1.0, 33, 0),
        ("ghostnetv3-small", 0.25, 24, 8),
        ("ghostnetv3", 0.5, 32, 14),
    ],
)
def test_networks(name: str, width: float, size: int, upsamples: int) -> None:
    torch.manual_seed(0)
    net = lively(create(name, width=width, num_classes=7, branches=1), size)
    core = to_onnx.simplified(to_onnx.core(net, PixelContract(size), 17), 1)
    after = rewrite(core)
    found = kinds(after)
    assert found["HardSigmoid"] == found["AveragePool"] == 0
    assert kinds(core)["AveragePool"] == kinds(core)["Resize"]
    assert found["DepthToSpace"] == upsamples
    for seed in range(3):
        same(core, after, seed)
    same(core, rewrite(after))
    for change in TFLITE:
        same(core, rewrite(core, [change]))
    for_int8 = rewrite(core, [*ORT_INT8, gather_upsample])
    same(core, for_int8)
    found = kinds(for_int8)
    assert found["Gather"] == 2 * upsamples
    assert found["HardSigmoid"] == found["AveragePool"] == 0


# --- the converted file

TINY = Spec(
    stages=(
        (Row(3, 16, 16, 0, 1),),
        (Row(3, 24, 20, 0, 2),),
        (Row(3, 40, 24, 0.25, 1),),
        (Row(3, 40, 24, 0, 1),),
    ),
    last=32,
)


def converted(model: onnx.ModelProto) -> dict[str, bytes]:
    return to_tflite.convert(model, ["fp32", "fp16"], before=(), after=())


FORBIDDEN = {"TRANSPOSE", "AVERAGE_POOL_2D", "RESIZE_NEAREST_NEIGHBOR", "RELU_0_TO_1"}
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3}


def test_converted_network() -> None:
    torch.manual_seed(1)
    net = lively(GhostNetV3(TINY, num_classes=6, branches=1), 24)
    pixels = PixelContract(24)
    core = to_onnx.simplified(to_onnx.core(net, pixels, 17), 1)
    images = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), np.uint8)
    with torch.inference_mode():
        values = torch.from_numpy(pixels.normalize(images).transpose(0, 3, 1, 2))
        expected = net(values).softmax(1).numpy()
    for precision, content in converted(rewrite(core)).items():
        finished = finish(content)
        assert finish(finished) == finish(content) == finished
        names = operators(finished)
        assert names["DELEGATE"] == 1, precision
        assert not FORBIDDEN & set(names)
        assert "DEPTH_TO_SPACE" not in names
        assert precision == "fp16" or "DEQUANTIZE" not in names
        depthwise = sum(m.groups > 1 for m in net.modules() if isinstance(m, nn.Conv2d))
        # Two pools more, and the strided concat makes one depthwise convolution two.
        assert names["DEPTHWISE_CONV_2D"] == depthwise + 2 + 1
        assert np.abs(run(finished, images) - expected).max() < TOLERANCES[precision], precision
        assert np.array_equal(run(finished, images), run(content, images))
        found = run(finished, images, reference=True)
        assert np.abs(found - expected).max() < TOLERANCES[precision], precision


def test_converted_graph_of_odd_size_and_batch_two() -> None:
    build = Builder((2, 3, 15, 15))
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    x = build.node("Relu", build.conv("x", 3, 12, 3))
    y = build.node("Add", x, build.conv(x, 12, 12))
    z = build.node("AveragePool", build.node("AveragePool", y, **pool), **pool)
    scales = build.constant(np.array([1, 1, 2, 2], np.float32))
    plain = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    z = build.node("Resize", build.node("Sigmoid", z), "", scales, **plain)
    z = build.node("HardSigmoid", build.node("GlobalAveragePool", z), **SIXTH)
    model = build.model(build.node("Softmax", build.node("Flatten", z)))
    images = np.random.default_rng(0).integers(0, 256, (10, 15, 15, 3), np.uint8)
    values = PixelContract(32).normalize(images).transpose(0, 3, 1, 2)
    expected = np.concatenate([outputs(model, np.stack([v, v]))[0][:1] for v in values])
    after = rewrite(model)
    same(model, after)
    for precision, content in converted(after).items():
        finished = finish(content)
        names = operators(finished)
        assert not FORBIDDEN & set(names)
        assert names["DEPTHWISE_CONV_2D"] == 2
        assert names["DEPTH_TO_SPACE"] == 1  # nothing is multiplied by it
        for reference in (False, True):
            found = run(finished, images, reference)
            assert np.abs(found - expected).max() < TOLERANCES[precision], precision
