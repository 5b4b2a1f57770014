"""int8 for ONNX Runtime: what its own optimizer makes of the file, and what the file computes."""

from __future__ import annotations

import collections
import functools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from ghostedge.convert import to_int8_onnx, to_onnx
from ghostedge.convert.rewrites import ORT_INT8, rewrite
from ghostedge.convert.to_int8_onnx import Ranges, front, quantize
from ghostedge.errors import GhostEdgeError
from ghostedge.models.ghostnetv3 import GhostNetV3
from ghostedge.pixels import PixelContract
from tests.convert.test_rewrites import TINY, lively

SIZE = 32


def unit(cin: int, cout: int, kernel: int = 1, stride: int = 1, group: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=group)
    return nn.Sequential(conv, nn.ReLU())


class Inverted(nn.Module):
    """MobileNetV2's block, with its residual add where the shape stays."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        wide = 4 * cin
        layers = unit(cin, wide), unit(wide, wide, 3, stride, wide), nn.Conv2d(wide, cout, 1)
        self.layers = nn.Sequential(*layers)
        self.keeps = cin == cout and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return x + y if self.keeps else y


def mobile() -> nn.Module:
    blocks = [Inverted(12, 20, 2), Inverted(20, 20, 1), Inverted(20, 24, 2), Inverted(24, 24, 1)]
    stem = unit(3, 16, 3), unit(16, 16, 3, 1, 16), nn.Conv2d(16, 12, 1)
    end = unit(24, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5)
    return nn.Sequential(*stem, *blocks, *end)


def dense() -> nn.Module:
    body = unit(3, 16, 3), unit(16, 16, 3), unit(16, 32, 3, 2), unit(32, 64, 3, 2)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))


def ghost() -> nn.Module:
    return lively(GhostNetV3(TINY, num_classes=5, branches=1), SIZE)


NETS = {"mobile": mobile, "dense": dense, "ghost": ghost}


class Case:
    """A random net as model.onnx, and images of blurred noise for it."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        core = to_onnx.core(NETS[name]().eval(), PixelContract(SIZE), 17)
        self.name, self.folder, self.model = name, folder, folder / "model.onnx"
        onnx.save(to_onnx.simplified(to_onnx.with_raw_pixels(core)), self.model)
        noise = np.random.default_rng(0).uniform(0, 256, (32, SIZE // 4, SIZE // 4, 3))
        self.images = noise.repeat(4, 1).repeat(4, 2).astype(np.uint8)

    def quantize(self, ranges: Ranges | None = None, in_float: Collection[str] = ()) -> Path:
        output = self.folder / "model_int8.onnx"
        quantize(self.model, output, self.images, ranges, in_float)
        onnx.checker.check_model(onnx.load(output), full_check=True)
        return output

    @functools.cached_property
    def plain(self) -> Path:
        return self.quantize().rename(self.folder / "plain_int8.onnx")

    def logits(self, file: Path) -> np.ndarray:
        x = self.images.transpose(0, 3, 1, 2).astype(np.float32)
        return np.log(onnxruntime.InferenceSession(file).run(None, {"image": x})[0])

    def node(self, op: str, last: bool = False) -> onnx.NodeProto:
        found = [node for node in onnx.load(self.model).graph.node if node.op_type == op]
        return found[-1 if last else 0]


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def run_by_runtime(file: Path) -> collections.Counter[str]:
    """Return the operators that ONNX Runtime makes of a file, by type."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(file.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    return collections.Counter(node.op_type for node in optimized.graph.node)


def test_one_region_of_int8(case: Case) -> None:
    found = run_by_runtime(case.plain)
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
    assert found["QLinearConv"] > 0 and found["QGemm"] == 1
    slow = ("Resize", "QLinearConcat", "QLinearAveragePool", "HardSigmoid", "Clip")
    assert not [op for op in slow if found[op]]
    assert found["Transpose"] <= 2


def test_it_computes_the_same(case: Case) -> None:
    expected, found = case.logits(case.model), case.logits(case.plain)
    assert np.ptp(expected) > 0.1
    assert np.abs(found - expected).max() < 0.1 * np.ptp(expected)


def test_same_bytes_again_and_model_untouched(case: Case) -> None:
    before = case.model.read_bytes()
    assert case.quantize().read_bytes() == case.plain.read_bytes()
    assert case.model.read_bytes() == before


def kernels(file: Path) -> dict[str, bool]:
    """Return for each Conv and Gemm, by name, whether its weights are int8."""
    graph = onnx.load(file).graph
    whole = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return {node.name: node.input[1] not in whole for node in layers}


def test_what_is_named_stays_in_float(case: Case) -> None:
    conv, gemm = case.node("Conv", last=True).name, case.node("Gemm").name
    plain = kernels(case.plain)
    assert plain[conv] and plain[gemm]
    changed = kernels(case.quantize(in_float=[conv, gemm]))
    assert changed == {**plain, conv: False, gemm: False}
    with pytest.raises(GhostEdgeError, match="no node conv99"):
        case.quantize(in_float=["conv99"])


def test_given_ranges_overrule(case: Case) -> None:
    name = case.node("GlobalAveragePool", last=True).output[0]
    graph = onnx.load(case.quantize({name: (-1.0, 50.0)})).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    (pair,) = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == name]
    assert constants[pair.input[1]] == pytest.approx(51 / 255)
    assert constants[pair.input[2]] == 5
    with pytest.raises(GhostEdgeError, match="no tensor t99"):
        case.quantize({"t99": (0, 1)})


def test_the_front_ends_where_int8_pays(case: Case) -> None:
    model = rewrite(onnx.load(case.model), ORT_INT8)
    names = front(model)
    nodes = list(model.graph.node)[: len(names)]
    assert names[:2] == ["centre", "normalize"] == [node.name for node in nodes[:2]]
    sizes = {t.name: t.dims for t in model.graph.initializer}
    convs = [sizes[node.input[1]] for node in nodes if node.op_type == "Conv"]
    assert {"mobile": 3, "dense": 1}.get(case.name, len(convs)) == len(convs) > 0
    assert all(w[0] <= 32 and w[1] * w[2] * w[3] <= 32 for w in convs)


def test_the_front_holds_few_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_int8_onnx, "SHARE", 1e-6)
    assert front(onnx.load(case.model)) == ["centre", "normalize"]
