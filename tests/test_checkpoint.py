from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ghostedge import checkpoint
from ghostedge.checkpoint import Checkpoint
from ghostedge.convert.plan import Limits
from ghostedge.errors import GhostEdgeError
from ghostedge.models import create
from ghostedge.pixels import PixelContract

torch.set_num_threads(1)

CARD = Checkpoint(
    architecture="ghostnetv3-small",
    arguments={"num_classes": 3, "width": 0.5, "branches": 2},
    labels=["cat", "dog", "Ente (männlich)"],
    pixels=PixelContract(48),
    training={"epochs": 3, "lr": 0.1},
    data={"name": "drawn", "fingerprint": "ab", "validation": {"fraction": 0.1, "seed": 0}},
    accuracy={"test": {"top1": 0.5, "images": 10}},
    versions={"torch": "2"},
    licence="Apache-2.0",
)

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    state = create(CARD.architecture, **CARD.arguments).state_dict()
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    return {**{k: v.numpy() for k, v in state.items()}, checkpoint.CALIBRATION: images}


@pytest.fixture
def file(tmp_path: Path, tensors: Tensors) -> Path:
    checkpoint.save(tmp_path / "net.safetensors", CARD, tensors)
    return tmp_path / "net.safetensors"


def test_read_returns_what_was_saved(file: Path, tensors: Tensors) -> None:
    card, stored = checkpoint.read(file)
    assert card == CARD
    assert card.name == "ghostnetv3-small-0.5x"
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        np.testing.assert_array_equal(stored[name], tensor)


def test_build_returns_the_network_in_eval_mode(file: Path, tensors: Tensors) -> None:
    card, net = checkpoint.build(str(file))
    assert card == CARD
    assert not net.training
    state = net.state_dict()
    assert state.keys() == tensors.keys() - {checkpoint.CALIBRATION}
    assert all(torch.equal(state[k], torch.from_numpy(tensors[k])) for k in state)
    assert net(torch.zeros(1, 3, 48, 48)).shape == (1, 3)


def backwards(mapping: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(mapping.items()))


def test_the_same_content_gives_the_same_bytes(file: Path, tensors: Tensors) -> None:
    again = file.with_name("again.safetensors")
    card = dataclasses.replace(CARD, arguments=backwards(CARD.arguments), data=backwards(CARD.data))
    checkpoint.save(again, card, backwards(tensors))
    assert again.read_bytes() == file.read_bytes()


def test_arrays_of_any_memory_layout(file: Path, tensors: Tensors) -> None:
    checkpoint.save(file, CARD, {k: np.asfortranarray(v) for k, v in tensors.items()})
    stored = checkpoint.read(file)[1]
    assert all((stored[k] == tensors[k]).all() for k in tensors)


def test_reading_needs_no_torch(file: Path) -> None:
    code = (
        "import sys; from ghostedge import checkpoint; checkpoint.read(sys.argv[1]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, file], check=True)


def test_a_failed_save_keeps_the_old_file(file: Path, tensors: Tensors) -> None:
    before = file.read_bytes()
    with pytest.raises(TypeError):
        checkpoint.save(file, dataclasses.replace(CARD, data={"name": object()}), tensors)
    with pytest.raises(GhostEdgeError, match="Cannot write"):
        checkpoint.save(file / "inside.safetensors", CARD, tensors)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def refused(path: Path | str) -> str:
    with pytest.raises(GhostEdgeError) as caught:
        checkpoint.build(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(file: Path, tensors: Tensors, **changes: object) -> Path:
    """Write the file again with another header: `changes`, of which a value of ... is left out."""
    header = {"format": 1, **CARD.to_json(), **changes}
    kept = {k: v for k, v in header.items() if v is not ...}
    save_file(tensors, file, metadata={"ghostedge": json.dumps(kept)})
    return file


@pytest.mark.parametrize("part", [0, 5, 100, 0.5, 0.999])
def test_a_truncated_file(part: float, file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    assert "is not a readable .safetensors file" in refused(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_foreign_safetensors_file(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"conv_stem.weight": torch.zeros(2, dtype=dtype)}, tmp_path / "x.safetensors")
    assert "ghostedge import" in refused(tmp_path / "x.safetensors")


def test_a_pickle(tmp_path: Path) -> None:
    torch.save({"conv_stem.weight": torch.zeros(2)}, tmp_path / "x.pth")
    assert "ghostedge import" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite(value: float, file: Path, tensors: Tensors) -> None:
    broken = {k: v.copy() for k, v in tensors.items()}
    broken["head.bias"][7] = value
    checkpoint.save(file, CARD, broken)
    message = refused(file)
    assert "head.bias" in message
    assert "NaN or infinity" in message


def test_labels_that_are_not_one_for_each_class(file: Path, tensors: Tensors) -> None:
    checkpoint.save(file, dataclasses.replace(CARD, labels=["cat", "dog"]), tensors)
    assert "2 labels for a network of 3 classes" in refused(file)


def test_tensors_of_another_network(file: Path, tensors: Tensors) -> None:
    arguments = {**CARD.arguments, "width": 1.0}
    checkpoint.save(file, dataclasses.replace(CARD, arguments=arguments), tensors)
    assert "do not fit ghostnetv3-small-1.0x" in refused(file)
    checkpoint.save(file, CARD, {k: v for k, v in tensors.items() if k != "head.bias"})
    assert "head.bias" in refused(file)


def test_an_unknown_architecture(file: Path, tensors: Tensors) -> None:
    checkpoint.save(file, dataclasses.replace(CARD, architecture="ghostnetv3-tiny"), tensors)
    assert "Did you mean" in refused(file)


PIXELS = CARD.pixels.to_json()


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ...},
        {"labels": None},
        {"labels": [1, 2, 3]},
        {"labels": ["\ud800", "b", "c"]},
        {"pixels": ...},
        {"pixels": {"size": 48}},
        {"pixels": {**PIXELS, "size": float("inf")}},
        {"pixels": {**PIXELS, "mean": [128.0, 128.0]}},
        {"pixels": {**PIXELS, "std": [0.0, 64.0, 64.0]}},
        {"format": ...},
        {"architecture": 3},
        {"arguments": []},
        {"arguments": {**CARD.arguments, "width": "1"}},
        {"arguments": {**CARD.arguments, "branches": 10**8}},
        {"licence": 3},
        {"accuracy": None},
        {"accuracy": {"test": 99.0}},
        {"accuracy": {"test": {"top1": "99", "images": 5}}},
        {"accuracy": {"int8": {"real": {}}}},
        {"data": "cifar10"},
        {"data": {"validation": 3}},
        {"data": {"validation": {"fraction": 0.1}}},
        {"data": {"pixels": [255]}},
    ],
)
def test_a_damaged_header(changes: dict[str, object], file: Path, tensors: Tensors) -> None:
    assert "is damaged" in refused(rewritten(file, tensors, **changes))


@pytest.mark.parametrize("shape", [(), (8,), (0, 24, 24, 3), (2, 24, 25, 3), (2, 24, 24, 1)])
def test_damaged_calibration_images(shape: tuple[int, ...], file: Path, tensors: Tensors) -> None:
    images = {checkpoint.CALIBRATION: np.zeros(shape, np.uint8)}
    checkpoint.save(file, CARD, {**tensors, **images})
    assert "is damaged" in refused(file)


@pytest.mark.parametrize("header", ["", "{", "null", "[]", '"text"', "1", "[" * 100_000])
def test_a_header_that_is_no_object(header: str, file: Path, tensors: Tensors) -> None:
    save_file(tensors, file, metadata={"ghostedge": header})
    assert "is damaged" in refused(file)


def test_a_newer_format(file: Path, tensors: Tensors) -> None:
    newer = rewritten(file, tensors, format=2, something_new=1)
    assert "has checkpoint format 2; this ghostedge reads 1" in refused(newer)


def test_shipped_weights_are_found_by_name(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(checkpoint, "WEIGHTS", folder)
    assert "none in this installation" in refused("ghostnetv3-small-0.5x")
    file.rename(folder / "ghostnetv3-small-0.5x.safetensors")
    assert list(checkpoint.shipped()) == ["ghostnetv3-small-0.5x"]
    assert checkpoint.read("ghostnetv3-small-0.5x")[0] == CARD
    message = refused("ghostnetv3-small-0.5")
    assert "ghostnetv3-small-0.5 is neither a file nor the name" in message
    assert "Did you mean ghostnetv3-small-0.5x?" in message


@pytest.mark.parametrize("name", checkpoint.shipped())
def test_shipped_weights_lose_little_to_int8(name: str) -> None:
    card, _ = checkpoint.read(name)
    assert card.name == name and card.licence == "Apache-2.0"
    assert (checkpoint.WEIGHTS / f"{name}.md").read_text().startswith(f"# {name}\n")
    for model in ("model_int8.tflite", "model_int8.onnx"):
        figures = card.accuracy["int8"]["real"][model]
        assert max(figures["validation_drop"], figures["test_drop"]) <= Limits().max_drop


def test_the_readme_has_the_figures_of_the_shipped_weights() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    named = re.findall(r"^\| \[`([^`]+)`\]\(ghostedge/weights/", readme, re.M)
    assert sorted(named) == list(checkpoint.shipped())
    for name in named:
        accuracy = checkpoint.read(name)[0].accuracy
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| [`{name}`]"))
        shown = [float(figure) for figure in re.findall(r"-?\d+\.\d\d", row.split("|", 5)[5])]
        int8 = (accuracy["int8"]["real"][f"model_int8.{kind}"] for kind in ("tflite", "onnx"))
        drops = [figure for f in int8 for figure in (f["test_drop"], f["test_interval"])]
        assert shown == pytest.approx(
            [accuracy["validation"]["top1"], accuracy["test"]["top1"], *drops]
        )


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        assert "is neither a file nor the name of shipped weights" in refused(path)
