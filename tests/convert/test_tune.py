from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from ghostedge import checkpoint
from ghostedge.convert import to_onnx, tune
from ghostedge.convert.fake_quant import Graph, Simulation
from ghostedge.data.drawn import drawn_source
from ghostedge.errors import GhostEdgeError
from ghostedge.models import fold
from ghostedge.pixels import PixelContract
from tests.export_fixtures import hostile


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tune.core_input(torch.from_numpy(drawn_source(4, 12, 5).read(32).pixels))


def core_of(file: Path) -> onnx.ModelProto:
    card, tensors = checkpoint.read(file)
    net = fold(checkpoint.network(card, tensors, str(file)))
    return to_onnx.simplified(to_onnx.core(net, card.pixels, 17))


@pytest.fixture(scope="module")
def core(trained: Path) -> onnx.ModelProto:
    return core_of(trained)


@pytest.fixture(scope="module")
def hostile_core(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return core_of(hostile(trained, tmp_path_factory.mktemp("hostile") / "net.safetensors"))


class Various(nn.Module):
    """Shuffled, split, joined and gated channels, strides, pools and all kinds of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left, self.right = nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.Conv2d(8, 8, 1, groups=2)
        self.six, self.swish, self.grouped = nn.ReLU6(), nn.Hardswish(), nn.Conv2d(8, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        a, b = x.chunk(2, 1)
        x = torch.cat([self.left(a), b], 1)
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = x + self.right(x)
        x = self.grouped(x).relu() * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = self.swish(x) - self.six(x)
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def various() -> onnx.ModelProto:
    torch.manual_seed(0)
    return to_onnx.simplified(to_onnx.core(Various().eval(), PixelContract(32), 17))


def outputs(model: onnx.ModelProto, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"image": images.numpy()})[0]


def simulated(graph: Graph, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return Simulation(graph, tune.observe(graph, images))(images).numpy()


@pytest.mark.parametrize("name", ["core", "various"])
def test_graph_computes_what_onnx_runtime_does(
    name: str, images: Tensor, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    with torch.no_grad():
        found = Graph(model)(images).numpy()
    np.testing.assert_allclose(found, outputs(model, images), atol=1e-5)


class Turned(nn.Module):
    """A network that reads BGR: a Slice backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x.flip(1)).relu().mean((2, 3)))


def test_slices_may_go_backwards(images: Tensor) -> None:
    torch.manual_seed(0)
    model = to_onnx.simplified(to_onnx.core(Turned().eval(), PixelContract(32), 17))
    assert "Slice" in {node.op_type for node in model.graph.node}
    with torch.no_grad():
        found = Graph(model)(images).numpy()
    np.testing.assert_allclose(found, outputs(model, images), atol=1e-5)


def test_an_unknown_operation_is_named() -> None:
    node = onnx.helper.make_node("Det", ["image"], ["out"])
    ends = [onnx.helper.make_tensor_value_info(n, 1, [1, 2, 2]) for n in ("image", "out")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    with pytest.raises(GhostEdgeError, match="do not know the operation Det"):
        Graph(onnx.helper.make_model(graph))


@pytest.mark.parametrize("name", ["core", "hostile_core", "various"])
def test_equalisation_is_exact(name: str, images: Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    graph = Graph(model)
    tune.equalize(graph, images)
    result = tune.changed(model, graph)
    assert result != model
    np.testing.assert_allclose(outputs(result, images), outputs(model, images), atol=2e-5)


def test_equalisation_repairs_scales_over_three_decades(
    core: onnx.ModelProto, hostile_core: onnx.ModelProto, images: Tensor
) -> None:
    expected = outputs(core, images)
    graph = Graph(hostile_core)
    before = np.abs(simulated(graph, images) - expected).mean()
    tune.equalize(graph, images)
    after = np.abs(simulated(graph, images) - expected).mean()
    easy = np.abs(simulated(Graph(core), images) - expected).mean()
    assert before > 4 * easy
    assert after < 1.5 * easy


def test_biases_are_corrected_towards_float_means(core: onnx.ModelProto, images: Tensor) -> None:
    graph = Graph(core)
    ranges = tune.observe(graph, images)
    # Coarse ranges, so that the shift of means stands out from noise.
    ranges = {name: (8 * low, 8 * high) for name, (low, high) in ranges.items()}
    logits = next(node.input[0] for node, _ in graph.nodes if node.op_type == "Softmax")

    def mean(net: Graph | Simulation) -> Tensor:
        seen = []

        def see(name: str, value: Tensor) -> Tensor:
            if name == logits:
                seen.append(value.mean(0))
            return value

        with torch.no_grad():
            net(images, see)
        return seen[0]

    wanted = mean(graph)
    before = (mean(Simulation(graph, ranges)) - wanted).abs().mean()
    tune.correct_biases(graph, ranges, images)
    after = (mean(Simulation(graph, ranges)) - wanted).abs().mean()
    assert after < 0.2 * before


def test_training_brings_int8_nearer_to_float_and_repeats(
    core: onnx.ModelProto, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RANGE_RATE", 0.05)  # far to go in few steps
    pixels = drawn_source(4, 12, 6).read(32).pixels
    graph = Graph(core)
    ranges = {n: (4 * a, 4 * b) for n, (a, b) in tune.observe(graph, images).items()}
    ranges[graph.input] = -2.0, 127 / 64
    expected = outputs(core, images)

    def apart(net: Graph, spans: dict[str, tuple[float, float]]) -> float:
        with torch.no_grad():
            return float(np.abs(Simulation(net, spans)(images).numpy() - expected).mean())

    trained = [copy.deepcopy(graph) for _ in range(2)]
    learned = [tune.fine_tune(net, ranges, pixels, 20, seed=3) for net in trained]
    assert learned[0] == learned[1]
    for key, weight in trained[0].weights.items():
        assert torch.equal(weight, trained[1].weights[key])
    assert learned[0][graph.input] == pytest.approx((-2.0, 127 / 64))
    narrower = [learned[0][n][1] < high for n, (_, high) in ranges.items() if n != graph.input]
    assert np.mean(narrower) > 0.5
    assert apart(trained[0], learned[0]) < 0.8 * apart(graph, ranges)


def test_the_worst_operations_of_a_hostile_net_are_found(
    hostile_core: onnx.ModelProto, images: Tensor
) -> None:
    graph = Graph(hostile_core)
    order = tune.sensitivity(graph, tune.observe(graph, images), images)
    assert len(order) > 50
    # What stands between the last convolution, the head and the classifier.
    assert {"/0/GlobalAveragePool_output_0", "/0/Relu_1_output_0"} <= set(order[:5])
