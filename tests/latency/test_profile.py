from __future__ import annotations

import math
from pathlib import Path

import pytest

from ghostedge.convert import Bundle
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.errors import GhostEdgeError
from ghostedge.latency.profile import blocks, profile
from tests.runtime_fixtures import free_size, write_onnx, write_tflite


def test_blocks_and_operators_of_a_tflite(bundle: Bundle) -> None:
    file = bundle.path / "model_int8.tflite"
    found = profile(file)
    audit = bundle.manifest["artefacts"][file.name]["audit"]
    counts = {kind: n for kinds in audit["operators"].values() for kind, n in kinds.items()}
    assert {part.name: part.operators for part in found.kinds} == counts
    for parts in (found.blocks, found.kinds):
        assert sum(part.operators for part in parts) == sum(counts.values())
        assert sum(part.macs or 0 for part in parts) == audit["macs"]
    assert sum(part.milliseconds for part in found.blocks) == pytest.approx(found.whole)
    assert len(found.blocks) == 12  # stem, ten bottlenecks, head
    assert all(part.error is not None and part.error >= 0 for part in found.blocks)
    alone = sum(part.milliseconds for part in found.kinds)
    assert 0.3 < alone / found.whole < 3
    times = [part.milliseconds for part in found.kinds]
    assert times == sorted(times, reverse=True) and times[-1] >= 0
    assert found.to_json()["blocks"][0]["name"] == "1 to 32x32x4"


def test_unpacked_weights_of_fp16_take_no_part(bundle: Bundle) -> None:
    fp32, fp16 = (profile(bundle.path / f"model_{kind}.tflite") for kind in ("fp32", "fp16"))
    assert [part.name for part in fp16.blocks] == [part.name for part in fp32.blocks]
    counts = [{part.name: part.operators for part in found.kinds} for found in (fp32, fp16)]
    assert counts[0] == counts[1]


def test_operators_of_an_onnx(bundle: Bundle) -> None:
    found = profile(bundle.path / "model.onnx")
    assert found.blocks == []
    assert found.whole > 0
    assert sum(part.operators for part in found.kinds if "Conv" in part.name) >= 80
    assert math.isfinite(sum(part.milliseconds for part in found.kinds))
    assert "profiler" in found.method


def test_blocks_of_a_chain(tmp_path: Path) -> None:
    model = Flat(write_tflite(tmp_path / "model.tflite", "float32").read_bytes())
    assert blocks(model) == [len(model.graph.operators)]


def test_what_cannot_be_profiled(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name in ("model.safetensors", "none.tflite"):
        with pytest.raises(GhostEdgeError, match="cannot be profiled"):
            profile(tmp_path / name)
    for model in (
        write_onnx(tmp_path / "model.onnx"),
        write_tflite(tmp_path / "model.tflite", "float32"),
    ):
        with pytest.raises(GhostEdgeError, match=r"model\.\w+ takes images of any size"):
            profile(free_size(model))
