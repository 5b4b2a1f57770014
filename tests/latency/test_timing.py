from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ghostedge.errors import GhostEdgeError
from ghostedge.latency import timing
from ghostedge.latency.timing import bench
from ghostedge.runtime import Classifier
from tests.runtime_fixtures import write_bundle, write_checkpoint, write_tflite


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("timing") / "bundle")


def test_bench(bundle: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "net.safetensors")
    batched = write_tflite(tmp_path / "batched.tflite", "float32", batch=5)
    models = [bundle / "model_fp32.tflite", bundle / "model.onnx", checkpoint, batched]
    result = bench(models, runs=30)
    assert [row.model for row in result.rows] == list(map(str, models))
    assert [row.runtime for row in result.rows] == ["litert", "onnxruntime", "torch", "litert"]
    assert [row.batch for row in result.rows] == [1, 1, 1, 5]
    for row in result.rows:
        assert 0 < row.min <= row.median <= row.p90 <= row.p99
        assert row.min <= row.mean
        assert row.ratio_low <= row.ratio <= row.ratio_high
    first = result.rows[0]
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert result.rows[2].ratio_low > 1  # hundreds of operations against five

    versions = result.machine["versions"]
    assert set(versions) >= {"ai-edge-litert", "onnxruntime", "torch", "numpy", "python"}
    assert result.machine["cpu"]
    assert result.machine["cores"] >= 1
    stored = json.loads(json.dumps(result.to_json()))
    assert len(stored["rows"]) == 4
    assert "bare invoke" in stored["protocol"]
    heading, rows = result.table()
    assert {len(row) for row in rows} == {len(heading)}


def test_each_number_of_threads_has_its_own_first_model(bundle: Path) -> None:
    models = [bundle / "model_int8.tflite", bundle / "model_fp32.tflite"]
    rows = bench(models, threads=(1, 2), runs=5).rows
    assert [row.threads for row in rows] == [1, 1, 2, 2]
    assert [row.ratio for row in rows[::2]] == [1, 1]


def test_a_bundle_is_timed_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["model.onnx", "model_fp32.tflite", "model_int8.tflite"]
    assert [Path(row.model).name for row in bench([bundle], runs=2).rows] == names
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert [Path(row.model).name for row in bench([bundle], runs=2).rows] == names[1:]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(GhostEdgeError, match="no model to time"):
        bench([bundle], runs=2)


def test_the_invoke_alone_is_timed_in_turn(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifiers = [Classifier(bundle / "model_fp32.tflite") for _ in range(3)]
    order: list[int] = []

    def invoke(index: int) -> None:
        order.append(index)
        time.sleep(0.001 * index)

    for index, classifier in enumerate(classifiers):
        monkeypatch.setattr(classifier.backend, "prepare", lambda images: time.sleep(0.02))
        monkeypatch.setattr(classifier.backend, "invoke", functools.partial(invoke, index))
    times = timing._rounds(classifiers, 4)
    turns = [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert order[3 * timing.WARM_UP :] == [turn for turn in turns for _ in ("untimed", "timed")]
    assert times.shape == (3, 4)
    assert (times.min(1) >= [0, 1, 2]).all()
    assert np.median(times) < 20


def test_interval_shrinks_what_all_share() -> None:
    random = np.random.default_rng(0)
    shared = random.choice([1.0, 3.0], 200)  # other work slows half of the rounds
    times = np.stack([shared * random.normal(scale, 0.02, 200) for scale in (1.0, 1.2)])
    low, high = timing._interval(timing._resampled_medians(times), 1, 0)
    assert low < 1.2 < high < 1.4
    assert low > 1.0


def test_int8_that_gains_nothing_is_said(bundle: Path) -> None:
    classifiers = [Classifier(bundle / f"model_{kind}.tflite") for kind in ("fp32", "int8")]
    names = ["float", "quantized"]
    random = np.random.default_rng(0)

    def said(factor: float) -> list[str]:
        times = random.normal([[1.0], [factor]], 0.02, (2, 100))
        return timing._not_faster(names, classifiers, timing._resampled_medians(times), 1)

    assert said(0.8) == []
    (sentence,) = said(1.2)
    assert "int8 is not faster than fp32 here: quantized takes 1." in sentence


def test_load_is_warned_of(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, warned in ((0.0, False), (1000.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        result = bench([bundle / "model.onnx"], runs=2)
        assert any("load average of 1000.0" in warning for warning in result.warnings) == warned


def test_what_cannot_be_timed(bundle: Path) -> None:
    with pytest.raises(GhostEdgeError, match="at least one run"):
        bench([bundle], runs=0)
    with pytest.raises(GhostEdgeError, match="one thread"):
        bench([bundle], threads=(0,))
    with pytest.raises(GhostEdgeError, match="no model"):
        bench([])
    with pytest.raises(GhostEdgeError, match="no file"):
        bench(["nowhere.onnx"])
