from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jsonschema
import onnx
import pytest

from ghostedge.errors import GhostEdgeError
from ghostedge.latency import results, runner, timing
from ghostedge.latency.profile import add_profiles
from ghostedge.latency.timing import bench
from tests.runtime_fixtures import (
    rewrite_manifest,
    write_bundle,
    write_checkpoint,
    write_onnx,
    write_tflite,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_bundle(tmp_path_factory.mktemp("timing") / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    parity = {"test": {"top1": 81.5, "images": 400}, "validation": {"top1": 83.0, "images": 300}}
    manifest["stages"] = [
        {"name": "folded", "parity": parity},
        {"name": "model_fp32.tflite", "parity": {"synthetic": {"top1": None}, **parity}},
        {"name": "model_int8.tflite", "parity": {"validation": parity["validation"]}},
        {"name": "model.onnx", "parity": {"synthetic": {"top1": None, "images": 8}}},
    ]
    rewrite_manifest(folder, manifest)
    return folder


def test_bench(bundle: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "net.safetensors")
    batched = write_tflite(tmp_path / "batched.tflite", "float32", batch=5)
    models = [bundle / "model_fp32.tflite", bundle / "model.onnx", checkpoint, batched]
    result = bench(models, runs=5)
    rows = result["rows"]
    assert [row["model"] for row in rows] == list(map(str, models))
    assert [row["runtime"] for row in rows] == ["litert", "onnxruntime", "torch", "litert"]
    assert [row["batch"] for row in rows] == [1, 1, 1, 5]
    assert list(map(runner.called, rows)) == [*map(str, models[:3]), f"{batched} (5 images)"]
    assert [row["partitions"] for row in rows] == [1, None, None, 1]
    assert rows[0]["verdict"] == "base" and rows[2]["verdict"] == "slower"
    assert rows[2]["ratio_low"] > 1  # hundreds of operations against five
    versions = result["machine"]["versions"]
    assert set(versions) >= {"ai-edge-litert", "onnxruntime", "torch", "numpy", "python"}
    assert rows[0]["accuracy"] == {"top1": 81.5, "set": "test", "images": 400}
    assert rows[1]["accuracy"] is rows[2]["accuracy"] is None
    jsonschema.validate(json.loads(results.writer(Path("x.json"))([result])), results.schema())


def test_profiles_travel_with_a_result(bundle: Path, tmp_path: Path) -> None:
    names = ["model_int8.tflite", "model.onnx"]
    result = bench([bundle / name for name in names], threads=(1, 2), runs=1)
    add_profiles(result)
    assert [Path(p["file"]).name for p in result["profiles"]] == names
    results.write([result], tmp_path / "bench.json")
    (again,) = results.read(tmp_path / "bench.json")
    titles = [title for title, *_ in results.profiles(again)]
    assert [title.rpartition(" ")[2] for title in titles] == ["block", "operator", "operator"]
    for _, heading, rows in results.profiles(again):
        assert {len(row) for row in rows} == {len(heading)}
        assert 95 <= sum(int(row[-1].rstrip("%")) for row in rows) <= 105
    for ending in (".md", ".html"):
        text = results.writer(Path(f"x{ending}"))([again])
        assert all(part["name"] in text for p in again["profiles"] for part in p["kinds"])
        assert "ONNX Runtime's own profiler" in text.replace("&#x27;", "'")


def test_threads_and_against(bundle: Path, tmp_path: Path) -> None:
    older = write_tflite(tmp_path / "model_int8.tflite", "int8")
    other = write_tflite(tmp_path / "other.tflite", "float32")
    models = [bundle / "model_int8.tflite", bundle / "model_fp32.tflite"]
    rows = bench(models, against=[other, older], threads=(1, 2), runs=1)["rows"]
    assert [row["threads"] for row in rows] == [1] * 4 + [2] * 4
    against = [str(other), str(older), str(older), str(other)]  # of the same name, else the first
    assert [row["against"] for row in rows] == 2 * against
    assert [row["verdict"] == "base" for row in rows] == 2 * [True, True, False, False]
    with pytest.raises(GhostEdgeError, match="Every model is one of --against"):
        bench([other], against=[other], runs=1)


def test_a_bundle_is_timed_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def names(on: str | None = None, runtimes: list[str] | None = None) -> list[str]:
        monkeypatch.setattr(
            timing.boards,
            "run",
            lambda on, files, *_: {"rows": [{"sha256": ""} for _ in files], "f": files},
        )
        return [path.name for path, _ in bench([bundle], on=on, runtimes=runtimes)["f"]]

    whole = ["model.onnx", "model_fp32.tflite", "model_int8.tflite"]
    assert names() == whole
    assert names(runtimes=["litert"]) == whole[1:]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert names() == whole[1:]
    assert names(on="board") == whole  # where it may be installed
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(GhostEdgeError, match="no model to time"):
        names()


def test_a_bundle_knows_the_precision(bundle: Path, tmp_path: Path) -> None:
    """Its manifest may call a quantized .onnx mixed, of which the runner sees int8."""
    shutil.copytree(bundle, tmp_path / "mine")
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    manifest["artefacts"]["model.onnx"]["precision"] = "mixed"
    rewrite_manifest(tmp_path / "mine", manifest)
    rows = bench([tmp_path / "mine" / "model.onnx", write_onnx(tmp_path / "a.onnx")], runs=1)[
        "rows"
    ]
    assert [row["precision"] for row in rows] == ["mixed", "fp32"]
    assert rows[0]["accuracy"] is None
    replaced = tmp_path / "mine" / "model_fp32.tflite"  # by another, of which it knows nothing
    shutil.copyfile(bundle / "model_int8.tflite", replaced)
    (row,) = bench([replaced], runs=1)["rows"]
    assert row["precision"] == "int8" and row["accuracy"] is None


def test_what_cannot_be_timed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GhostEdgeError, match="at least one run"):
        bench([bundle], runs=0)
    with pytest.raises(GhostEdgeError, match="one thread"):
        bench([bundle], threads=(0,))
    with pytest.raises(GhostEdgeError, match="no model"):
        bench([])
    with pytest.raises(GhostEdgeError, match="no file"):
        bench(["nowhere.onnx"])
    with pytest.raises(GhostEdgeError, match="no runtime 'tvm': choose of litert"):
        bench([bundle], runtimes=["tvm"])
    for runtimes in (None, ["torch"]):
        with pytest.raises(GhostEdgeError, match="no model to time: a board runs"):
            bench(["ghostnetv3-small-1.0x"], on="board", runtimes=runtimes)
    apart = tmp_path / "apart.onnx"
    net = onnx.load(bundle / "model.onnx")
    onnx.save(net, apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    monkeypatch.setattr(timing.boards, "run", None)  # nothing is sent or run
    for host in (None, "board"):
        with pytest.raises(GhostEdgeError, match=f"{apart} keeps its weights in another file"):
            bench([bundle, apart], on=host)
    monkeypatch.undo()
    for suffix in (".tflite", ".onnx", ".safetensors"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"x" * 100)
        with pytest.raises(GhostEdgeError, match=f"broken{suffix}"):
            bench([broken])
