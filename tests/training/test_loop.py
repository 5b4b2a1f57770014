from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import ghostedge
from ghostedge import checkpoint
from ghostedge.data.sources import FolderSource, Source, open_data, split
from ghostedge.errors import GhostEdgeError, Paused
from ghostedge.files import held
from ghostedge.models import synthetic
from ghostedge.models.synthetic import synthesize
from ghostedge.training import Distillation, Recipe, loop, train
from ghostedge.training.processes import TORCHRUN, Processes
from tests.runtime_fixtures import Malicious

SIZE, EPOCHS = 24, 5
FLAGS = {"model": "ghostnetv3-small-0.1x", "imgsz": SIZE}
RECIPE = Recipe(epochs=EPOCHS, batch=16, lr=0.1, ema=0.9, cutout=0.2)


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Synthetic images are made anyhow: what they are worth is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "STEPS", 2)
        yield


def learn(data: Path | str, output: Path, **changes: Any) -> Path:
    console = Console(file=io.StringIO())
    options = {**FLAGS, "recipe": RECIPE, "console": console, **changes}
    return train(str(data), output, **options)


def refused(data: Path | str, output: Path, **changes: Any) -> str:
    with pytest.raises(GhostEdgeError) as caught:
        learn(data, output, **changes)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(drawn_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    output = tmp_path_factory.mktemp("training") / "run"
    assert learn(drawn_folder, output) == output / "best.safetensors"
    return output


def log(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(output: Path, name: str) -> list[tuple[int, float]]:
    """Return what TensorBoard shows: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = set()
    for file in (output / "tensorboard").iterdir():
        events = EventAccumulator(str(file)).Reload()
        if name in events.Tags()["scalars"]:
            found |= {(event.step, event.value) for event in events.Scalars(name)}
    return sorted(found)


def test_a_run_leaves_weights_and_logs(run: Path) -> None:
    assert {file.name for file in run.iterdir()} == {
        "best.safetensors",
        "curves.png",
        "last.safetensors",
        "log.csv",
        "state.pt",
        "tensorboard",
    }
    rows = log(run)
    assert [row["epoch"] for row in rows] == [str(n + 1) for n in range(EPOCHS)]
    assert set(rows[0]) == {"epoch", "loss", "train", "validation", "lr", "seconds"}
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    for name in ("loss", "train", "validation", "lr"):
        shown = scalars(run, name)
        assert [step for step, _ in shown] == list(range(EPOCHS))
        assert [v for _, v in shown] == pytest.approx([float(r[name]) for r in rows], rel=1e-6)


def test_the_checkpoint_tells_how_it_was_made(run: Path, drawn_folder: Path) -> None:
    card, tensors = checkpoint.read(run / "best.safetensors")
    assert card.name == "ghostnetv3-small-0.1x"
    assert card.arguments == {"num_classes": 4, "width": 0.1, "branches": 1}
    assert card.labels == ["circle", "cross", "square", "triangle"]
    assert card.pixels.size == SIZE
    assert card.training["recipe"] == dataclasses.asdict(RECIPE)
    sets = open_data(drawn_folder)
    assert sets.train is not None and sets.test is not None
    low, high = card.data.pop("pixels")
    assert 0 <= low < 20 and 235 < high <= 255
    assert card.data == {
        "name": drawn_folder.name,
        "fingerprint": sets.train.fingerprint,
        "val_fingerprint": None,
        "test_fingerprint": sets.test.fingerprint,
        "validation": {"fraction": 0.1, "seed": 0},
        "images": 88,
    }
    assert {part: figures["images"] for part, figures in card.accuracy.items()} == {
        "validation": 8,
        "test": 48,
    }
    images = tensors[checkpoint.CALIBRATION]
    assert (images.dtype, images.shape[1:]) == (np.uint8, (SIZE, SIZE, 3))


def test_the_accuracies_are_those_of_the_weights(run: Path, drawn_folder: Path) -> None:
    card, net = checkpoint.build(run / "best.safetensors")
    data = open_data(drawn_folder)
    assert data.train is not None and data.test is not None
    _, held_out = split(data.train, 0.1, 0)
    parts = {"validation": data.train.read(SIZE, held_out), "test": data.test.read(SIZE)}
    for part, images in parts.items():
        values = card.pixels.normalize(images.pixels).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            found = net(torch.from_numpy(values)).argmax(1).numpy()
        right = 100 * float((found == images.labels).mean())
        assert card.accuracy[part]["top1"] == pytest.approx(right)


def test_best_is_the_first_of_the_best_epochs(run: Path) -> None:
    validation = [float(row["validation"]) for row in log(run)]
    best, last = (checkpoint.read(run / f"{name}.safetensors")[0] for name in ("best", "last"))
    assert best.training["epoch"] == 1 + validation.index(max(validation))
    assert best.accuracy["validation"]["top1"] == max(validation)
    assert last.training["epoch"] == EPOCHS


def test_a_net_learns_the_drawn_figures(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch=20, lr=0.04)
    best = learn("drawn:10", tmp_path, model="ghostnetv3-small-0.2x", recipe=recipe)
    accuracy = checkpoint.read(best)[0].accuracy["test"]
    assert accuracy["images"] == 500
    assert accuracy["top1"] > 17, "chance is 10 with a standard deviation of 1.3"


def test_the_rate_rises_and_falls_to_zero(run: Path) -> None:
    rates = [float(row["lr"]) for row in log(run)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] <= RECIPE.lr
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_validation_images_are_never_trained_on_and_test_images_are_read_last(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads, held = Source.read, [], []

    def noted(self: Source, size: int, *rest: Any) -> Any:
        reads.append((self.name, (tmp_path / "log.csv").exists() and len(log(tmp_path))))
        return read(self, size, *rest)

    class Noted(loop.Batches):
        def __init__(self, images: np.ndarray, *rest: Any) -> None:
            super().__init__(images, *rest)
            held.append(images)

    monkeypatch.setattr(Source, "read", noted)
    monkeypatch.setattr(loop, "Batches", Noted)
    card, _ = checkpoint.read(learn(drawn_folder, tmp_path, recipe=Recipe(epochs=2, batch=16)))
    name = drawn_folder.name
    assert reads == [(f"{name}/train", False), (f"{name}/train", False), (f"{name}/test", 2)]

    source = open_data(drawn_folder).train
    assert source is not None
    sides = split(source, **card.data["validation"])
    for images, side in zip(held, sides, strict=False):
        np.testing.assert_array_equal(images, read(source, SIZE, side).pixels)
    trained, validated, _ = ({image.tobytes() for image in images} for images in held)
    assert not trained & validated


def test_a_folder_may_bring_its_own_validation_images(drawn_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.copytree(drawn_folder / "test", tmp_path / "data" / {"test": "val"}.get(part, part))
    recipe = Recipe(epochs=1, batch=16)
    card, _ = checkpoint.read(learn(tmp_path / "data", tmp_path / "run", recipe=recipe))
    assert card.data["validation"] is None
    assert card.data["images"] == 48
    assert list(card.accuracy) == ["validation"]
    assert card.accuracy["validation"]["images"] == 48


def start(data: Path, output: Path) -> subprocess.Popen[str]:
    """Start the run of `learn` on the command line and wait for the end of its first epoch."""
    # Where pytest runs in the background, Ctrl-C is ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ghostedge.cli import main; main()"
    )
    flags = ["--model", FLAGS["model"], "--imgsz", SIZE, "--epochs", EPOCHS, "--batch", 16]
    flags += ["--lr", 0.1, "--set", "ema=0.9", "--set", "cutout=0.2"]
    root = str(Path(ghostedge.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", code, "train", data, *map(str, flags), "--output", output],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    while not (output / "log.csv").exists() or len(log(output)) < 2:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.005)
    return child


def without_times(card: checkpoint.Checkpoint) -> dict[str, Any]:
    training = {k: v for k, v in card.training.items() if k != "seconds"}
    return {**card.to_json(), "training": training}


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit, but for how long it took."""
    for name in ("best.safetensors", "last.safetensors"):
        card, tensors = checkpoint.read(run / name)
        other_card, others = checkpoint.read(other / name)
        assert without_times(card) == without_times(other_card)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert tensor.tobytes() == others[key].tobytes(), f"{key} in {name}"
    rows, others_rows = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in log(folder)]
        for folder in (run, other)
    )
    assert rows == others_rows
    assert scalars(run, "loss") == scalars(other, "loss")


def test_a_killed_run_goes_on_as_if_unbroken(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    child = start(drawn_folder, tmp_path)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert 0 < len(log(tmp_path)) < EPOCHS
    learn(drawn_folder, tmp_path, resume=True)
    assert_same(tmp_path, run)


@pytest.mark.parametrize(
    ("device", "compile"),
    [
        ("cpu", "off"),
        *(
            pytest.param(
                "cuda",
                mode,
                marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            )
            for mode in ("off", "default")
        ),
    ],
)
def test_a_run_begun_on_a_cpu_learns_the_same_elsewhere(
    drawn_folder: Path, tmp_path: Path, device: str, compile: str
) -> None:
    options = {"recipe": dataclasses.replace(RECIPE, epochs=1, precision="fp32"), "branches": 3}
    learn(drawn_folder, tmp_path / "whole", **options)
    with pytest.raises(Paused):
        learn(drawn_folder, tmp_path / "moved", budget=1e-9, **options)
    learn(drawn_folder, tmp_path / "moved", resume=True, device=device, compile=compile, **options)
    whole, moved = (float(log(tmp_path / name)[0]["loss"]) for name in ("whole", "moved"))
    assert moved == pytest.approx(whole, rel=1e-12 if device == "cpu" else 0.02)


def test_a_run_killed_at_its_first_epochs_end_starts_anew(
    run: Path, drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are there, the state that counts the epoch is not."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ghostedge.training.state.Folder.save_table", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(drawn_folder, tmp_path)
    assert (tmp_path / "best.safetensors").exists()
    learn(drawn_folder, tmp_path, resume=True)
    assert_same(tmp_path, run)


def test_a_run_from_before_a_recipe_had_a_field(
    run: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Paused):
        learn(drawn_folder, tmp_path, budget=1e-9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    identity = json.loads(state["identity"])
    del identity["precision"]
    torch.save({**state, "identity": json.dumps(identity)}, tmp_path / "state.pt")
    learn(drawn_folder, tmp_path, resume=True)
    assert_same(tmp_path, run)


def test_a_run_among_its_images_is_refused(drawn_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(drawn_folder, tmp_path / "data"))
    for output in (data / "train" / "runs", data / "train" / "circle" / "runs" / "a"):
        assert "would take it for a class" in refused(data, output)
        assert not output.exists()
    flat = data / "train"
    assert f"is inside {flat}" in refused(flat, flat / "runs" / "a")
    (tmp_path / "link").symlink_to(flat)
    assert "would take it for a class" in refused(flat, tmp_path / "link" / "run")
    with pytest.raises(Paused):
        learn(data, data / "runs", budget=1e-9)  # beside the parts nothing is a class


def test_a_run_that_gets_no_better_says_that_it_stops(drawn_folder: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    still = dataclasses.replace(RECIPE, lr=1e-9, patience=1)
    learn(drawn_folder, tmp_path, recipe=still, console=console)
    assert "Stopped: no better validation for 1 epochs" in console.file.getvalue()  # type: ignore[attr-defined]
    assert len(log(tmp_path)) == 2


def test_too_little_memory(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any) -> None:
        torch.empty(2**62, dtype=torch.uint8)  # more than any machine has: torch's own error

    monkeypatch.setattr("ghostedge.training.loop.Batches", allocate)
    assert "memory is too small" in refused(drawn_folder, tmp_path / "run")


def test_ctrl_c_says_how_to_go_on(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    child = start(drawn_folder, output)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130
    last = said.splitlines()[-1]
    assert last == f"Stopped. The same command with --resume continues {output}."
    assert "Traceback" not in said
    assert not [file for file in output.iterdir() if file.name.startswith(".")]
    assert 0 < len(log(output)) < EPOCHS
    learn(drawn_folder, output, resume=True)
    assert_same(output, run)


def test_a_finished_run_resumes_to_the_same(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    learn(drawn_folder, tmp_path / "run", resume=True)
    assert_same(run, tmp_path / "run")


def test_parallel_branches_go_on_as_if_unbroken(drawn_folder: Path, tmp_path: Path) -> None:
    options = {"branches": 3, "recipe": dataclasses.replace(RECIPE, epochs=1)}
    learn(drawn_folder, tmp_path / "whole", **options)
    with pytest.raises(Paused):
        learn(drawn_folder, tmp_path / "cut", budget=1e-9, **options)
    learn(drawn_folder, tmp_path / "cut", resume=True, **options)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": dataclasses.replace(RECIPE, epochs=6)}, "another epochs: 5, not 6"),
        ({"recipe": dataclasses.replace(RECIPE, lr=0.2)}, "another lr: 0.1, not 0.2"),
        ({"recipe": dataclasses.replace(RECIPE, seed=1)}, "another seed: 0, not 1"),
        ({"model": "ghostnetv3-small-0.2x"}, "another width: 0.1, not 0.2"),
        ({"model": "ghostnetv3-0.1x"}, "another model: ghostnetv3-small, not ghostnetv3"),
        ({"branches": 3}, "another branches: 1, not 3"),
        ({"imgsz": 32}, "another imgsz: 24, not 32"),
    ],
)
def test_another_run_is_not_resumed(
    run: Path, drawn_folder: Path, changes: dict[str, Any], message: str
) -> None:
    before = {file: file.read_bytes() for file in run.glob("*.*")}
    assert f"{run} was started with {message}" in refused(drawn_folder, run, resume=True, **changes)
    assert {file: file.read_bytes() for file in run.glob("*.*")} == before


def test_other_data_is_not_resumed_on(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        copy = tmp_path / part / drawn_folder.name
        shutil.copytree(drawn_folder, copy)
        next((copy / part / "circle").iterdir()).unlink()
        assert "was started with another data" in refused(copy, run, resume=True)


def test_a_forgotten_flag_is_named(drawn_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Paused):
        learn(drawn_folder, tmp_path, branches=2, post_norm=True, budget=1e-9)
    said = refused(drawn_folder, tmp_path, branches=2, resume=True)
    assert "started with another post_norm: True, not None" in said


def test_a_class_that_cannot_be_read_is_refused(drawn_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(drawn_folder / "train", tmp_path / "data"))
    for file in (data / "circle").iterdir():
        file.write_bytes(b"no picture")
    said = refused(data, tmp_path / "run")
    assert "No image of the class 'circle' in data can be read (circle/" in said


def test_a_class_that_cannot_be_validated_is_refused(drawn_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(drawn_folder, tmp_path / "data")
    source = open_data(str(data)).train
    assert isinstance(source, FolderSource)
    for index in split(source, RECIPE.validation, RECIPE.seed)[1]:
        if source.labels[index] == 0:
            Path(source.files[index]).write_bytes(b"")
    assert f"No image of the class '{source.classes[0]}'" in refused(data, tmp_path / "run")


def test_test_images_that_cannot_be_read_do_not_cost_the_training(
    drawn_folder: Path, tmp_path: Path
) -> None:
    data, said = tmp_path / "data", io.StringIO()
    shutil.copytree(drawn_folder, data)
    broken = sorted((data / "test" / "circle").iterdir())
    broken[0].write_bytes(b"no picture")
    options = {"recipe": Recipe(epochs=1), "console": Console(file=said, width=200)}
    card, _ = checkpoint.read(learn(data, tmp_path / "one", **options))
    assert "Skipped 1 files" in said.getvalue() and card.accuracy["test"]["images"] == 47
    for file in broken:
        file.write_bytes(b"no picture")
    card, tensors = checkpoint.read(learn(data, tmp_path / "all", **options))
    assert "No test accuracy: No image of the class 'circle'" in said.getvalue()
    assert list(card.accuracy) == ["validation"] and checkpoint.CALIBRATION in tensors
    assert (tmp_path / "all" / "curves.png").exists()


def test_number_0_fetches_and_finishes_for_all(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, events = loop.open_data, []

    def open_(data: str, download: bool) -> Any:
        events.append(f"open, download={download}")
        return opened(data)

    monkeypatch.setattr(loop, "open_data", open_)
    monkeypatch.setattr(loop._Run, "to_the_end", lambda *_: events.append("train"))
    monkeypatch.setattr(loop, "_finish", lambda *_: events.append("finish"))
    monkeypatch.setattr(loop.Processes, "meet", lambda _: events.append("meet"))
    for rank, expected in (
        (0, ["open, download=True", "meet", "train", "finish", "meet"]),
        (1, ["meet", "open, download=False", "train", "meet"]),
    ):
        for name, value in zip(TORCHRUN, ("1", str(rank), "localhost", "0"), strict=True):
            monkeypatch.setenv(name, value)
        learn(drawn_folder, tmp_path / str(rank), download=True)
        assert events == expected
        events.clear()


def test_the_number_of_processes_alone_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some job systems set it for every process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Processes("cpu").size == 1


def test_a_run_folder_in_use(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    message = refused(drawn_folder, run)
    assert f"{run} holds a run already" in message
    assert "--resume" in message and "--output" in message
    assert "holds no run to resume" in refused(drawn_folder, tmp_path / "none", resume=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "last.safetensors").touch()  # all that is left of one
    assert "holds a run already" in refused(drawn_folder, tmp_path)


def test_two_runs_in_one_folder(drawn_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with held(output):
        assert f"Another run writes to {output}" in refused(drawn_folder, output)
        assert not any(output.iterdir())
    with pytest.raises(Paused):
        learn(drawn_folder, output, budget=1e-9)
    with held(output):
        assert "Another run writes to" in refused(drawn_folder, output, resume=True)


def test_a_picture_of_curves_is_not_overwritten(drawn_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_text("mine")
    assert "or its curves.png" in refused(drawn_folder, tmp_path)
    assert (tmp_path / "curves.png").read_text() == "mine"


def test_the_best_epoch_of_another_run(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(run, tmp_path / "run"))
    best = output / "best.safetensors"
    card, tensors = checkpoint.read(best)
    kept = best.read_bytes()
    for changes in ({"architecture": "densestride"}, {"training": {**card.training, "epoch": 99}}):
        checkpoint.save(best, dataclasses.replace(card, **changes), tensors)
        assert "is not the best epoch of this run" in refused(drawn_folder, output, resume=True)
    best.unlink()
    assert "is not the best epoch of this run" in refused(drawn_folder, output, resume=True)
    best.write_bytes(kept)
    learn(drawn_folder, output, resume=True)
    assert_same(output, run)


def test_names_that_are_no_utf8(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    data = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
    shutil.copytree(drawn_folder, data)
    teacher = shutil.copy(
        run / "best.safetensors", os.fsdecode(b"%s/t\xff" % os.fsencode(tmp_path))
    )
    taught = Distillation((teacher,))
    for changes in ({"distillation": taught}, {"from_": teacher, "model": None, "imgsz": None}):
        output = tmp_path / next(iter(changes))
        short = dataclasses.replace(RECIPE, epochs=1)
        card, _ = checkpoint.read(learn(data, output, recipe=short, **changes))
        assert card.data["name"] == "d\\xff"
    said = refused(drawn_folder, tmp_path / "new", licence="MIT \udcff")
    assert said == "The licence MIT \\xff is no UTF-8 text."


def test_a_damaged_state(run: Path, drawn_folder: Path, tmp_path: Path) -> None:
    output, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(run, output)
    whole = (output / "state.pt").read_bytes()
    net = torch.nn.Linear(1, 1).state_dict()
    for name, content in {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "foreign": pickle.dumps({"net": 1}),
        "malicious": pickle.dumps(Malicious(victim)),
    }.items():
        (output / "state.pt").write_bytes(content)
        message = refused(drawn_folder, output, resume=True)
        assert "state.pt cannot be resumed from" in message, name
    torch.save({"net": net}, output / "state.pt")
    assert "cannot be resumed from" in refused(drawn_folder, output, resume=True)
    assert not victim.exists()
    state = torch.load(run / "state.pt", weights_only=True)
    sums = torch.full_like(state["sums"], torch.nan)
    for damage in (
        {"optimizer": {}},
        *({"history": rows} for rows in ("abc", None, [{"x": 1.0}])),
        *({"step": step} for step in ("x", 99, -5)),
        {"best": "x"},
        {"seconds": None},
        {"sums": sums},
    ):
        torch.save({**state, **damage}, output / "state.pt")
        assert "cannot be resumed from" in refused(drawn_folder, output, resume=True), damage


def test_a_diverging_run_keeps_the_last_good_state(drawn_folder: Path, tmp_path: Path) -> None:
    # One step an epoch, so that a few epochs pass before the numbers run out.
    message = refused(drawn_folder, tmp_path, recipe=Recipe(epochs=9, batch=88, lr=1000))
    kept = len(log(tmp_path))
    assert 0 < kept < 9
    assert f"The training diverged in epoch {kept + 1}: " in message
    assert f"{tmp_path} keeps the epochs before it" in message
    assert "lower --lr" in message
    card, _ = checkpoint.build(tmp_path / "last.safetensors")
    assert card.training["epoch"] == kept
    checkpoint.build(tmp_path / "best.safetensors")


def test_a_run_that_diverges_at_once_keeps_nothing(drawn_folder: Path, tmp_path: Path) -> None:
    message = refused(drawn_folder, tmp_path, recipe=Recipe(epochs=2, batch=8, lr=1000))
    assert "The training diverged in epoch 1: " in message
    assert "keeps" not in message
    assert {file.name for file in tmp_path.iterdir()} <= {"tensorboard"}


def copies(folder: Path, target: Path, count: int, mode: str = "RGB", classes: int = 2) -> Path:
    """Copy `count` images of each of the first classes of a folder, in another mode."""
    for source in sorted(folder.iterdir())[:classes]:
        (target / source.name).mkdir(parents=True)
        for file in sorted(source.iterdir())[:count]:
            with Image.open(file) as image:
                image.convert(mode).save(target / source.name / file.name)
    return target


def test_weights_that_are_no_numbers_are_not_kept_by_a_budget(
    drawn_folder: Path, tmp_path: Path
) -> None:
    """The first step's loss is finite, the weights after it are not."""
    recipe = dataclasses.replace(RECIPE, lr=1000.0, weight_decay=1e37, warmup=0.0)
    said = refused(drawn_folder, tmp_path, recipe=recipe, budget=1e-9)
    assert "weights are no longer finite" in said
    assert not (tmp_path / "state.pt").exists()


def test_fewer_images_than_a_batch(drawn_folder: Path, tmp_path: Path) -> None:
    data = copies(drawn_folder / "train", tmp_path / "pets", 3)
    card, _ = checkpoint.read(learn(data, tmp_path / "run", recipe=Recipe(epochs=1)))
    assert card.training["recipe"]["batch"] == card.data["images"] == 4
    assert card.labels == ["circle", "cross"]
    assert list(card.accuracy) == ["validation"]


def test_too_few_images(drawn_folder: Path, tmp_path: Path) -> None:
    data = copies(drawn_folder / "train", tmp_path / "pets", 1)
    message = refused(data, tmp_path / "run")
    assert "pets has 2 images to train on and 0 to validate on" in message
    assert not (tmp_path / "run").exists()


def test_grey_images(drawn_folder: Path, tmp_path: Path) -> None:
    data = copies(drawn_folder / "train", tmp_path / "grey", 8, "L", classes=3)
    best = learn(data, tmp_path / "run", recipe=Recipe(epochs=1, batch=8))
    card, net = checkpoint.build(best)
    assert card.labels == ["circle", "cross", "square"]
    assert synthesize(net, card.pixels).shape[1:] == (SIZE, SIZE, 3)


def test_files_that_cannot_be_read_are_counted(drawn_folder: Path, tmp_path: Path) -> None:
    data = copies(drawn_folder / "train", tmp_path / "pets", 4)
    (data / "circle" / "broken.png").write_bytes(b"no picture")
    said = io.StringIO()
    best = learn(
        data, tmp_path / "run", recipe=Recipe(epochs=1), console=Console(file=said, width=200)
    )
    assert "Skipped 1 files, the first: circle/broken.png" in said.getvalue()
    assert f"Reading pets: {', '.join(sorted(p.name for p in data.iterdir()))}" in said.getvalue()
    assert checkpoint.read(best)[0].data["images"] <= 7


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", "xla"])
def test_a_device_that_is_not_here(drawn_folder: Path, tmp_path: Path, device: str) -> None:
    message = refused(drawn_folder, tmp_path / "run", device=device)
    assert f"The device {device!r} cannot be used here" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch": 1},
        {"lr": 0.0},
        {"lr": 1e39},
        {"lr": float("nan")},
        {"validation": 0.0},
        {"validation": 1.0},
        {"seed": -1},
        {"seed": 2**32},
        {"cutout": 1.0},
        {"clip": -1.0},
        {"accumulate": 0},
    ],
)
def test_a_recipe_that_cannot_be(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(GhostEdgeError, match=f"^{name} must be "):
        Recipe(**values)


def test_without_tensorboard_only_the_table_is_written(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = io.StringIO()
    learn(drawn_folder, tmp_path, recipe=Recipe(epochs=1), console=Console(file=said, width=200))
    assert "tensorboard is not installed: only log.csv is written" in said.getvalue()
    assert len(log(tmp_path)) == 1
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("place", ["file/run", "/proc/ghostedge/run"])
def test_an_output_that_cannot_be_written(drawn_folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("text")
    message = refused(drawn_folder, tmp_path / place, recipe=Recipe(epochs=1))
    assert f"Cannot write {tmp_path / place}" in message
    assert (tmp_path / "file").read_text() == "text"
