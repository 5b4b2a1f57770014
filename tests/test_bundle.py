from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ghostedge
from ghostedge.bundle import is_bundle, read_manifest, verify, write_manifest
from ghostedge.errors import CheckFailed, GhostEdgeError
from tests.runtime_fixtures import LABELS, rewrite_manifest, write_bundle, write_onnx


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "bundle")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = read_manifest(bundle)
    change(manifest)
    write_manifest(bundle, manifest)


def edit_golden(bundle: Path, **arrays: np.ndarray) -> None:
    """Change golden.npz and its hash with it."""
    with np.load(bundle / "golden.npz") as file:
        golden = {**file, **{name.replace("__", "."): array for name, array in arrays.items()}}
    np.savez(bundle / "golden.npz", **golden)
    rewrite_manifest(bundle, read_manifest(bundle))


def test_an_unchanged_bundle_passes(bundle: Path) -> None:
    result = ghostedge.verify(bundle)
    assert result.ok
    assert result.failure is None
    assert result.skipped == []
    assert [(row.artefact, row.kernels, row.images) for row in result.rows] == [
        ("model.onnx", "default", 6),
        ("model_fp32.tflite", "default", 6),
        ("model_int8.tflite", "default", 6),
        ("model_int8.tflite", "reference", 6),
    ]
    assert all(row.exact == 1 and row.difference == 0 for row in result.rows)


def test_a_difference_is_measured(bundle: Path) -> None:
    with np.load(bundle / "golden.npz") as file:
        steps = file["model_int8.tflite:reference"].copy()
    steps[2, 1] ^= 1
    edit_golden(bundle, **{"model_int8__tflite:reference": steps})
    result = verify(bundle)
    assert not result.ok
    assert [row.ok for row in result.rows] == [True, True, True, False]
    row = result.rows[3]
    assert (row.exact, row.difference, row.unit, row.tolerance) == (23 / 24, 1, "step", 0)
    assert result.failure is not None
    assert "model_int8.tflite with reference kernels differs" in result.failure

    edit(bundle, lambda m: m["golden"]["expected"][3].update(unit="probability", tolerance=0.004))
    assert verify(bundle).rows[3].difference == 1 / 256
    assert verify(bundle).ok


def test_nan_is_a_difference(bundle: Path) -> None:
    with np.load(bundle / "golden.npz") as file:
        outputs = file["model.onnx:default"] * np.float32("nan")
    edit_golden(bundle, **{"model__onnx:default": outputs})
    assert not verify(bundle).ok


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model_int8.tflite", "model"), ("labels.txt", "contract"), ("golden.npz", "contract")],
)
def test_a_changed_file_is_named(bundle: Path, name: str, kind: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(CheckFailed, match=f"The {kind} changed: {name} .* SHA-256") as error:
        verify(bundle)
    assert error.value.exit_code == 1
    (bundle / name).unlink()
    with pytest.raises(CheckFailed, match=f"{name} is missing"):
        verify(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model_fp32.tflite", "model_int8.tflite"])
def test_any_changed_byte_of_a_model(bundle: Path, name: str) -> None:
    any_changed_byte(bundle, name, "model")


@pytest.mark.parametrize("name", ["labels.txt", "golden.npz", "manifest.json"])
def test_any_changed_byte_of_the_contract(bundle: Path, name: str) -> None:
    any_changed_byte(bundle, name, "contract")


def any_changed_byte(bundle: Path, name: str, kind: str) -> None:
    """Change one byte at 40 places, the first and the last included; then add one and cut one."""
    content = (bundle / name).read_bytes()
    random = np.random.default_rng(0)
    places = np.linspace(0, len(content) - 1, 40).astype(int)
    changed = [
        content[:place] + bytes([content[place] ^ random.integers(1, 256)]) + content[place + 1 :]
        for place in places
    ]
    for other in (*changed, content + b"\n", content[:-1]):
        (bundle / name).write_bytes(other)
        with pytest.raises(GhostEdgeError) as error:
            verify(bundle)
        # A manifest that is not even one any more cannot say what it was of.
        if name != "manifest.json" or error.value.exit_code == 1:
            assert f"The {kind} changed: {name} in {bundle}" in str(error.value)
    (bundle / name).write_bytes(content)
    assert verify(bundle).ok


def test_a_changed_figure_in_the_manifest_is_named(bundle: Path) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tolerance": 2', '"tolerance": 9'))
    with pytest.raises(CheckFailed, match=r"The contract changed: manifest\.json"):
        verify(bundle)


def test_an_unlisted_model_fails(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("of no concern")
    assert verify(bundle).ok
    write_onnx(bundle / "model_better.onnx")
    with pytest.raises(CheckFailed, match=r"model_better\.onnx .* is not in its manifest"):
        verify(bundle)


def test_a_bundle_that_contradicts_itself(bundle: Path) -> None:
    def fails(match: str) -> None:
        with pytest.raises(CheckFailed, match=f"contradicts itself: {match}"):
            verify(bundle)

    before = (bundle / "manifest.json").read_text()
    edit(bundle, lambda m: m.update(labels=LABELS[::-1]))
    fails(r"labels\.txt and manifest\.json name different labels")
    edit(bundle, lambda m: m.update(labels=LABELS))
    edit(bundle, lambda m: m["golden"].update(images=5))
    fails(r"golden\.npz holds no uint8 images of the shape \(5, 24, 24, 3\)")
    edit(bundle, lambda m: m["golden"].update(images=6))
    edit(bundle, lambda m: m["golden"]["expected"].pop(0))
    fails(r"manifest\.json expects no outputs of model\.onnx")
    (bundle / "manifest.json").write_text(before)
    edit(bundle, lambda m: m["golden"]["expected"][1].update(key="lost"))
    fails(r"golden\.npz lacks the expected outputs lost")
    (bundle / "manifest.json").write_text(before)
    edit_golden(bundle, **{"model__onnx:default": np.zeros((6, 3), np.float32)})
    fails(r"model\.onnx:default in golden\.npz is float32 \(6, 3\) where")
    (bundle / "golden.npz").write_bytes(b"no zip")
    rewrite_manifest(bundle, read_manifest(bundle))
    fails(r"golden\.npz cannot be read")


def test_a_pickle_in_golden_is_not_run(bundle: Path) -> None:
    edit_golden(bundle, images=np.array([{"a": "dict"}], dtype=object))
    with pytest.raises(CheckFailed, match="cannot be read"):
        verify(bundle)


def test_missing_runtimes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = verify(bundle)
    assert result.ok
    assert result.skipped == [("model.onnx", "ONNX Runtime is not installed")]
    assert {row.artefact for row in result.rows} == {"model_fp32.tflite", "model_int8.tflite"}
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(GhostEdgeError, match="pip install ai-edge-litert or onnxruntime") as error:
        verify(bundle)
    assert error.value.exit_code == 2


def test_numpy_and_one_runtime_suffice(bundle: Path) -> None:
    absent = "torch tensorflow onnx onnxruntime typer rich PIL safetensors matplotlib".split()
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "import ghostedge\n"
        f"result = ghostedge.verify({str(bundle)!r})\n"
        "print(result.ok, len(result.rows), len(result.skipped))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True 3 1\n", "")


def test_what_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    def fails(path: Path, match: str) -> None:
        assert not is_bundle(path)
        with pytest.raises(GhostEdgeError, match=match) as error:
            verify(path)
        assert error.value.exit_code == 2

    assert is_bundle(bundle)
    fails(tmp_path / "nowhere", "is no bundle, it is no folder")
    fails(bundle / "model.onnx", "is no bundle, it is no folder")
    fails(tmp_path, r"is a folder without manifest\.json")
    manifest = bundle / "manifest.json"
    before = manifest.read_text()
    for text, match in (
        ("", "cannot be read"),
        (before[:300], "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "was not written by ghostedge"),
        ('{"short_name": "app"}', "was not written by ghostedge"),
        (before.replace('"format": 1', '"format": 2'), "has bundle format 2 .* reads 1"),
        (before.replace('"files"', '"flies"'), "is damaged .*files"),
        (before.replace('"shape"', '"sharp"'), "is damaged .*shape"),
        (before.replace('"step"', '"stride"'), "is damaged"),
        (before.replace('"stages"', '"pages"'), "is damaged .*stages"),
        (before.replace('"labels.txt"', '"../labels.txt"'), "is damaged .*outside"),
        (before.replace("onnxruntime", "caffe"), "is damaged .*runtime of model.onnx"),
    ):
        manifest.write_text(text)
        fails(bundle, match)
