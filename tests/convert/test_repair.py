from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ghostedge import checkpoint
from ghostedge.convert import Bundle, export, to_onnx, tune
from ghostedge.convert import repair as repairs
from ghostedge.convert.check import Parity, Stage
from ghostedge.convert.fake_quant import Graph
from ghostedge.convert.plan import Limits
from ghostedge.convert.repair import Files, Variant, cached, few_images, ladder, match, repair
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.data.drawn import drawn_source
from ghostedge.errors import CheckFailed, GhostEdgeError
from ghostedge.models import fold
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier
from tests.export_fixtures import hostile


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return drawn_source(4, 8, 5).read(32).pixels


@pytest.fixture
def files(bundle: Bundle, trained: Path, pixels: np.ndarray, tmp_path: Path) -> Files:
    card, tensors = checkpoint.read(trained)
    net = fold(checkpoint.network(card, tensors, str(trained)))
    core = to_onnx.core(net, card.pixels, to_onnx.TFLITE_OPSET)
    fp32 = bundle.path / "model_fp32.tflite"
    return Files(core, bundle.path / "model.onnx", fp32, pixels, 1, "uint8", tmp_path)


def scales(file: Path) -> dict[str, float]:
    """Return the scale of each computed int8 tensor of a .tflite."""
    flat = Flat(file.read_bytes())
    made = [t for op in flat.graph.operators for t in op.outputs]
    found = {flat.name(t): flat.tensors[t].quantization for t in made}
    return {n: float(q.scale[0]) for n, q in found.items() if q is not None and q.scale is not None}


def test_most_tensors_of_the_tflite_are_found_in_the_graph(files: Files) -> None:
    graph = Graph(to_onnx.simplified(files.core))
    content = files.fp32.read_bytes()
    same = match(graph, content, files.calibration, 1)
    flat = Flat(content)
    computed = {flat.name(op.outputs[0]) for op in flat.graph.operators}
    assert len(computed & set(same)) > 0.6 * len(computed)
    assert graph.output in same.values()


def test_ranges_of_the_graph_reach_both_files(files: Files) -> None:
    graph = Graph(to_onnx.simplified(files.core))
    content = files.fp32.read_bytes()
    files.converted = (
        to_onnx.simplified(files.core).SerializeToString(deterministic=True),
        content,
    )
    images = tune.core_input(torch.from_numpy(files.calibration))
    observed = tune.observe(graph, images)
    doubled = {name: (2 * low, 2 * high) for name, (low, high) in observed.items()}
    plain, wide = (
        scales(files.make("model_int8.tflite", Variant("x", graph, ranges)))
        for ranges in (observed, doubled)
    )
    ratios = np.array([wide[name] / plain[name] for name in plain if name in wide])
    assert (np.isclose(ratios, 2, rtol=1e-3)).mean() > 0.6

    def constants(ranges: dict[str, tuple[float, float]]) -> list[float]:
        model = onnx.load(files.make("model_int8.onnx", Variant("x", graph, ranges)))
        values = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        nodes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        return [float(values[n.input[1]]) for n in nodes if values[n.input[1]].ndim == 0]

    pairs = zip(constants(observed), constants(doubled), strict=True)
    assert np.mean([np.isclose(b / a, 2, rtol=1e-3) for a, b in pairs]) > 0.6


def test_operations_in_float_are_said(files: Files, pixels: np.ndarray) -> None:
    graph = Graph(to_onnx.simplified(files.core))
    content = files.fp32.read_bytes()
    files.converted = (
        to_onnx.simplified(files.core).SerializeToString(deterministic=True),
        content,
    )
    head = [node.output[0] for node, _ in graph.nodes if node.op_type == "Gemm"]
    variant = Variant("head in float", graph, in_float=tuple(head))
    whole = files.make("model_int8.tflite", Variant("x", graph))
    partly = files.make("model_int8.tflite", variant)
    kinds = [
        sum(flat.tensors[op.outputs[0]].type == 0 for op in flat.graph.operators)  # FLOAT32
        for flat in (Flat(file.read_bytes()) for file in (whole, partly))
    ]
    assert kinds[0] == 0 < kinds[1]
    assert Classifier(partly)(pixels).shape == (len(pixels), 4)
    smaller = files.make("model_int8.onnx", Variant("x", graph)).stat().st_size
    assert files.make("model_int8.onnx", variant).stat().st_size > smaller


def test_a_hostile_net_calibrated_on_real_images_is_corrected_first(
    trained: Path, tmp_path: Path
) -> None:
    file = hostile(trained, tmp_path / "hostile.safetensors")
    made = export(file, tmp_path / "out", int8=True, data="drawn", max_drop=1.0)
    rows = [row for row in made.manifest["attempts"] if row["file"] == "model_int8.tflite"]
    assert [row["tried"] for row in rows] == ["channels equalised, biases corrected"]
    for name in ("model_int8.onnx", "model_int8.tflite"):
        drop = made.parity[name]["validation"]["drop"]
        assert drop is not None and drop <= 1
    assert "labelled images only" in " ".join(made.manifest["warnings"])


def test_a_hostile_net_is_repaired_without_images_and_the_attempts_are_listed(
    trained: Path, tmp_path: Path
) -> None:
    file = hostile(trained, tmp_path / "hostile.safetensors")
    lines: list[str] = []
    made = export(
        file,
        tmp_path / "out",
        int8=True,
        format=["onnx", "tflite"],
        say=lines.append,
    )
    for name in ("model_int8.onnx", "model_int8.tflite"):
        rows = [row for row in made.manifest["attempts"] if row["file"] == name]
        assert len(rows) > 1
        assert float(rows[0]["same class"].rstrip("%")) < 90
        assert float(rows[-1]["same class"].rstrip("%")) >= 90
        assert any(name in line and "too much" in line for line in lines)
    page = (made.path / "report.md").read_text()
    assert all(row["tried"] in page for row in made.manifest["attempts"])


def stage(name: str, drop: float, images: int = 500) -> Stage:
    parity = Parity(images, 0.9, 1.0, 0.1, 80.0, drop, 1.2)
    return Stage(name, "int8", {"validation": parity})


def test_each_file_stops_at_its_first_success(tmp_path: Path) -> None:
    drops = {("a", "one"): 3.0, ("a", "two"): 0.2, ("b", "one"): 0.1}
    asked = []

    def make(name: str, variant: Variant) -> Path:
        (tmp_path / variant.name).write_bytes(bytes(1500))
        return tmp_path / variant.name

    def measure(name: str, path: Path) -> Stage:
        asked.append((name, path.name))
        return stage(name, drops[name, path.name])

    attempts = iter([Variant("one"), Variant("two"), Variant("three")])
    done, rows = repair(["a", "b"], attempts, make, measure, Limits(), lambda line: None)
    assert asked == [("a", "one"), ("b", "one"), ("a", "two")]
    assert set(done) == {"a", "b"}
    assert [row["points lost"] for row in rows] == ["3.00 ± 1.20", "0.10 ± 1.20", "0.20 ± 1.20"]
    assert next(attempts).name == "three", "what is not needed is not prepared"


def test_a_failure_carries_the_table(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1500))
    with pytest.raises(
        CheckFailed, match=r"(?s)loses 3.00 .*\n.*one.*3.00.*\n.*two.*3.00"
    ) as found:
        repair(
            ["a"],
            iter([Variant("one"), Variant("two")]),
            lambda *_: tmp_path / "file",
            lambda name, path: stage(name, 3.0),
            Limits(),
            lambda line: None,
        )
    assert found.value.exit_code == 1
    assert len(found.value.table.splitlines()) == 3


def test_what_would_be_repaired_wrongly_is_not(pixels: np.ndarray) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    net(torch.zeros(1, 3, 32, 32))
    core, said = to_onnx.core(net.eval(), PixelContract(32), 17), []
    tried = ladder(core, pixels, True, None, 0, 0, said.append)
    assert [variant.name for variant in tried if not variant.suffix] == ["plain"]
    assert "do not compute what this network does" in said[0]


def test_narrow_weights_leave_a_bit(files: Files, pixels: np.ndarray) -> None:
    """As ONNX Runtime asks for on x86 without dot products, where 16-bit sums saturate."""
    wide, narrow = (
        onnx.load(files.make("model_int8.onnx", Variant("a name", narrow=narrow)))
        for narrow in (False, True)
    )

    def largest(model: onnx.ModelProto) -> int:
        weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
        return max(int(np.abs(w.astype(int)).max()) for w in weights if w.dtype == np.int8)

    assert largest(wide) == 127 and largest(narrow) <= 64
    path = files.scratch / "narrow.onnx"
    onnx.save(narrow, path)
    same = Classifier(path)(pixels).argmax(1) == Classifier(files.model)(pixels).argmax(1)
    assert same.mean() > 0.9


@pytest.mark.parametrize("narrow", [True, False])
def test_where_sums_saturate_all_is_tried_with_narrow_weights_too(
    files: Files, pixels: np.ndarray, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "saturates", lambda features: narrow)
    corrected = "channels equalised, biases corrected"
    for real, (first, then) in ((True, (corrected, "plain")), (False, ("plain", corrected))):
        tried = ladder(files.core, pixels, real, None, 0, 0, lambda line: None)
        assert [
            (variant.name, variant.narrow) for variant in itertools.islice(tried, 2 + 2 * narrow)
        ] == [
            (first, False),
            *[(f"{first}, weights in 7 bits", True)] * narrow,
            (then, False),
            *[(f"{then}, weights in 7 bits", True)] * narrow,
        ]


def test_a_variant_of_onnx_alone_is_not_tried_on_tflite(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1500))
    asked = []

    def measure(name: str, path: Path) -> Stage:
        asked.append(name)
        return stage(name, 3.0 if len(asked) < 4 else 0.1)

    attempts = iter([Variant("one"), Variant("two", suffix=".onnx"), Variant("three")])
    names = ["a.onnx", "a.tflite"]
    repair(names, attempts, lambda *_: tmp_path / "file", measure, Limits(), lambda line: None)
    assert asked == [*names, "a.onnx", *names]


def test_training_is_the_last_that_is_tried_and_is_kept(
    files: Files, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "sensitivity", lambda *_: [])
    monkeypatch.setattr(repairs, "saturates", lambda features: False)
    said: list[str] = []
    first, again = (
        list(ladder(files.core, pixels, True, pixels, 1, 0, said.append))[-1] for _ in range(2)
    )
    assert first.name == again.name == "equalised, 1 epochs of quantization-aware training"
    assert sum("epoch 1 of 1" in line for line in said) == 1, "the second comes from the cache"
    assert first.ranges == again.ranges and first.graph and again.graph
    for key, weight in first.graph.weights.items():
        torch.testing.assert_close(again.graph.weights[key], weight, rtol=0, atol=0)


def test_few_images_are_warned_of() -> None:
    warning = few_images([stage("a", 0.1)])
    assert warning is not None and "500 labelled images only" in warning and "± 1.2" in warning
    assert few_images([stage("a", 0.1, images=1000)]) is None


def test_cache_is_keyed_by_content_and_ignores_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make() -> dict[str, np.ndarray]:
        made.append(len(made))
        return {"value": np.array(made)}

    for content, count in ((b"a", 1), (b"a", 1), (b"b", 2)):
        cached("kind", (content,), make)
        assert len(made) == count
    first = sorted((tmp_path / "ghostedge").iterdir())
    assert len(first) == 2
    for file in first:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(content)
    assert len(cached("kind", (b"a",), make)["value"]) == 3
    for file in first:
        file.write_bytes(file.read_bytes()[:20])
    assert len(cached("kind", (b"a",), make)["value"]) == 4
    assert len(cached("kind", (b"a",), make)["value"]) == 4


def test_training_needs_images() -> None:
    with pytest.raises(GhostEdgeError, match="--qat trains on images of yours"):
        export("ghostnetv3-small-1.0x", int8=True, qat=2)
