"""Shipped models on emulated arm64: the same answers as here, for no more instructions than recorded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ghostedge.convert import Bundle, export
from ghostedge.deploy import deploy
from ghostedge.runtime import Classifier

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "arm64"
WEIGHTS = "ghostnetv3-small-1.0x"
GROWTH = 1.02
CASES = [
    ("model_int8.tflite", "cortex-a72"),
    ("model_int8.tflite", "cortex-a76"),
    ("model_fp32.tflite", "cortex-a72"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARK / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulator() -> ModuleType:
    module = load("emulator")
    reason = module.unavailable()
    if reason is not None:
        pytest.skip(reason)
    try:
        module.set_up()
    except RuntimeError as error:  # no package registry within reach
        pytest.skip(f"the arm64 emulation could not be set up: {error}")
    return module


@pytest.fixture(scope="module")
def bundle(emulator: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("arm64") / "bundle"
    return export(WEIGHTS, output, int8=True, format="tflite")


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> np.ndarray:
    with np.load(bundle.path / "golden.npz") as golden:
        return golden["images"][:4]


@pytest.fixture(scope="module")
def recorded(emulator: ModuleType) -> dict[str, Any]:
    stored = json.loads((BENCHMARK / "results.json").read_text())
    if stored["versions"]["ai-edge-litert"] != emulator.versions()["ai-edge-litert"]:
        pytest.skip("the counts were recorded with another version of LiteRT")
    rows = [row for row in stored["rows"] if row["network"] == WEIGHTS]
    return {(row["model"], row["cpu"]): row["instructions"] for row in rows}


@pytest.mark.parametrize(("name", "cpu"), CASES)
def test_no_more_instructions_and_the_same_answers(
    emulator: ModuleType,
    bundle: Bundle,
    images: np.ndarray,
    recorded: dict[str, Any],
    name: str,
    cpu: str,
) -> None:
    found = emulator.run(bundle.path / name, cpu, images)
    assert found.instructions <= GROWTH * recorded[name, cpu]
    here = Classifier(bundle.path / name)
    expected = here.raw(images).astype(np.float64)
    assert (found.outputs.argmax(1) == expected.argmax(1)).all()
    allowed = 1e-5 if here.step is None else 1
    assert np.abs(found.outputs - expected).max() <= allowed


def test_reference_kernels_give_the_same_bytes_and_a_count_repeats(
    emulator: ModuleType, bundle: Bundle, images: np.ndarray
) -> None:
    model = bundle.path / "model_int8.tflite"
    first, second = (emulator.run(model, "cortex-a53", images[:2], reference=2) for _ in range(2))
    expected = Classifier(model, kernels="reference").raw(images[:2])
    np.testing.assert_array_equal(first.reference, expected)
    assert first.instructions == second.instructions
    assert first.by_symbol == second.by_symbol
    assert sum(first.by_symbol.values()) == pytest.approx(1)
    assert any("dwconv" in symbol for symbol in first.by_symbol)


def test_the_deployed_program_passes_its_check_on_a_pi(
    emulator: ModuleType, bundle: Bundle, tmp_path: Path
) -> None:
    folder = deploy("raspberry-pi", bundle.path, tmp_path / "pi")
    result = json.loads(emulator.python("cortex-a72", folder / "classify.py", "--check"))
    assert result["same_class"] == result["images"]
    assert result["largest_step"] <= 1
    print(result)


def test_where_it_cannot_be_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = load("emulator")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "needs Linux on x86-64" in module.unavailable()
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    assert "is set up by root" in module.unavailable()
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install qemu-user" in module.unavailable()
    with pytest.raises(RuntimeError, match="there is no qemu-aarch64"):
        module.set_up()
