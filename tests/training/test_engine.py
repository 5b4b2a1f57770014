"""What the recipe's fields and the flags of `train` do to a run."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import ghostedge
from ghostedge import checkpoint
from ghostedge.cli import _seconds
from ghostedge.data.drawn import drawn_source
from ghostedge.errors import GhostEdgeError, Paused
from ghostedge.models import create, synthetic
from ghostedge.models.teachers import NETS, OnPixels
from ghostedge.pixels import IMAGENET, PixelContract
from ghostedge.training import Recipe, loop, train
from ghostedge.training.batches import Batch, Batches
from ghostedge.training.distillation import STRATEGIES
from ghostedge.training.objective import Objective, balanced, freeze, head
from ghostedge.training.processes import Processes
from ghostedge.training.start import subject
from ghostedge.training.state import Average, Folder

MODEL, SIZE = "ghostnetv3-small-0.1x", 24
RECIPE = Recipe(epochs=2, batch=16, lr=0.05)


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "STEPS", 1)
        yield


def learn(data: Path | str, output: Path, **changes: Any) -> Path:
    options = {"model": MODEL, "imgsz": SIZE, "recipe": RECIPE, **changes}
    return train(str(data), output, console=Console(file=io.StringIO()), **options)


def small_run(recipe: Recipe = RECIPE, branches: int = 1) -> loop._Run:
    """A run on 40 drawn images that was not started."""
    images = drawn_source(4, 10).read(SIZE)
    recipe = recipe.resolved(len(images))
    assert recipe.batch is not None
    torch.manual_seed(0)
    arguments = {"num_classes": 4, "width": 0.1, "branches": branches}
    net = OnPixels(create("ghostnetv3-small", **arguments), PixelContract(SIZE))
    card = checkpoint.Checkpoint("ghostnetv3-small", arguments, list("abcd"), PixelContract(SIZE))
    batches = Batches(images.pixels, images.labels, recipe.batch, torch.device("cpu"))
    quiet = Console(file=io.StringIO())
    run = loop._Run(net, batches, batches, recipe, card, Folder(Path()), Processes("cpu"), quiet)
    run.prepare(None, [], "off")
    return run


def stepped(
    recipe: Recipe, steps: int = 1, branches: int = 1
) -> tuple[loop._Run, dict[str, torch.Tensor]]:
    """Return a run after some steps, and its weights before."""
    run = small_run(recipe, branches)
    before = copy.deepcopy(run.student.state_dict())
    run.student.train()
    if recipe.freeze != "none":
        freeze(run.student, recipe.freeze)
    for step, batch in zip(range(steps), run.batches.shuffled(recipe, 0), strict=False):
        run.learn(batch, 0.05)
        run.average.update(step)
    return run, before


def test_the_average_is_of_weights_and_statistics() -> None:
    source = nn.BatchNorm2d(2)
    average = Average(source, 0.9)
    expected = {k: v.clone().double() for k, v in source.state_dict().items()}
    for step in range(30):
        with torch.no_grad():
            source.weight.normal_()
            source.running_var.uniform_()  # type: ignore[union-attr]
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name in ("weight", "running_var"):
            expected[name] = decay * expected[name] + (1 - decay) * source.state_dict()[name]
    for name in ("weight", "running_var"):
        torch.testing.assert_close(average.net.state_dict()[name].double(), expected[name])
    assert Average(source, 0.0).net is source


def test_the_average_is_what_is_validated_and_kept(drawn_folder: Path, tmp_path: Path) -> None:
    best = learn(drawn_folder, tmp_path, recipe=dataclasses.replace(RECIPE, ema=0.9))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    kept = checkpoint.read(tmp_path / "last.safetensors")[1]
    name = "classifier.weight"
    np.testing.assert_array_equal(kept[name], state["average"][f"net.{name}"].numpy())
    assert np.abs(kept[name] - state["objective"][f"student.net.{name}"].numpy()).max() > 1e-4
    assert checkpoint.read(best)[0].accuracy["validation"]["images"] == 8


def test_only_conv_and_linear_weights_decay() -> None:
    run = small_run()
    heavy, light = run.optimizer.param_groups
    assert (heavy["weight_decay"], light["weight_decay"]) == (5e-4, 0)
    decaying = {id(p) for p in heavy["params"]}
    for module in run.student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wanted = isinstance(module, (nn.Conv2d, nn.Linear)) and name == "weight"
            assert (id(parameter) in decaying) == wanted
    strategy = STRATEGIES["amtml"]()
    run.prepare(strategy, [], "off")
    decaying = {id(p) for p in run.optimizer.param_groups[0]["params"]}
    assert id(strategy.latent) not in decaying and id(strategy.score.weight) in decaying
    everything = small_run(dataclasses.replace(RECIPE, decay="all")).optimizer.param_groups
    assert not everything[1]["params"]


def test_optimizers_and_schedules() -> None:
    run = small_run(dataclasses.replace(RECIPE, optimizer="adamw", lr=None, schedule="linear"))
    assert isinstance(run.optimizer, torch.optim.AdamW)
    total = 2 * run.batches.steps
    rates = [run.rate(step) for step in range(total + 1)]
    peak = 0.001 * 16 / 128
    assert max(rates) == pytest.approx(peak) and rates[0] == 0
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert run.rate(1 + (total - 1) / 2) == pytest.approx(peak / 2)
    sgd = small_run()
    assert isinstance(sgd.optimizer, torch.optim.SGD)
    assert sgd.optimizer.defaults["nesterov"] and sgd.optimizer.defaults["momentum"] == 0.9
    assert sgd.rate(1 + 3 / 4) == pytest.approx(0.05 * 0.5 * (1 + np.cos(np.pi / 4)))


@pytest.mark.parametrize("branches", [1, 2])
def test_bf16_rounds_what_convs_compute(branches: int) -> None:
    nets = {}
    for precision in ("auto", "fp32", "bf16"):
        run, _ = stepped(dataclasses.replace(RECIPE, precision=precision), branches=branches)
        nets[precision] = nn.utils.parameters_to_vector(run.student.parameters())
    assert torch.equal(nets["auto"], nets["fp32"]), "this is a CPU"
    assert 0 < (nets["bf16"] - nets["fp32"]).norm() < 0.05 * nets["fp32"].norm()


def test_clipping_limits_the_step() -> None:
    free, _ = stepped(RECIPE)
    clipped, _ = stepped(dataclasses.replace(RECIPE, clip=1e-3))
    norms = [
        torch.stack([p.grad.norm() for p in run.trained if p.grad is not None]).norm()
        for run in (free, clipped)
    ]
    assert norms[0] > 0.1
    assert float(norms[1]) == pytest.approx(1e-3, rel=1e-3)


def test_classes_weigh_against_their_number() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2 + [2])
    assert balanced(labels, 3).tolist() == pytest.approx([0.5, 1.5, 3.0])
    assert balanced(torch.arange(4), 4).tolist() == [1, 1, 1, 1]
    net = OnPixels(create("ghostnetv3-small", num_classes=3, width=0.1), PixelContract(SIZE)).eval()
    views = torch.zeros(9, 3, SIZE, SIZE, dtype=torch.uint8)
    logits = net(views)
    by_class = -torch.stack([logits.log_softmax(1)[labels == k, k].mean() for k in range(3)])
    # Each class counts the same, however many images it has.
    found, _ = Objective(net, 0.0, balanced(labels, 3))(Batch(views, labels))
    torch.testing.assert_close(found, by_class.mean())
    # The same cut into parts, as accumulate and torchrun do.
    objective = Objective(net, 0.0, balanced(labels, 3))
    parts = [objective(part)[0] for part in Batch(views, labels).chunks(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), found)


def test_mixed_labels_share_the_loss() -> None:
    net = OnPixels(create("ghostnetv3-small", num_classes=4, width=0.1), PixelContract(SIZE)).eval()
    views = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    one, other = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 1])
    objective = Objective(net, 0.1)
    parts = [objective(Batch(views, labels))[0] for labels in (one, other)]
    found, _ = objective(Batch(views, one, other, 0.3))
    torch.testing.assert_close(found, 0.3 * parts[0] + 0.7 * parts[1])


def test_patience_ends_a_run_that_gets_no_better() -> None:
    run = small_run(Recipe(epochs=9, batch=16, patience=2))
    rows = []
    for validation in (10.0, 30.0, 20.0):
        assert not run.finished
        rows.append({"validation": validation})
        run.history = rows
    assert not run.finished
    rows.append({"validation": 30.0})  # as good is no better
    assert run.finished
    assert not small_run(Recipe(epochs=9, batch=16)).finished


def test_frozen_norms_keep_their_statistics() -> None:
    run, before = stepped(dataclasses.replace(RECIPE, freeze="norms"), 2)
    after = run.student.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("running" in name or "tracked" in name), name


def test_a_frozen_backbone_trains_the_head_alone() -> None:
    run, before = stepped(dataclasses.replace(RECIPE, freeze="backbone"), 2)
    name = head(run.student)[0]
    assert name == "net.classifier"
    for key, tensor in run.student.state_dict().items():
        assert torch.equal(tensor, before[key]) == (not key.startswith(name)), key


def test_a_budget_stops_in_an_epoch_and_resumes_bit_for_bit(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(RECIPE, ema=0.8, clip=1.0, cutout=0.2)
    learn(drawn_folder, tmp_path / "whole", recipe=recipe)
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    places = []
    for resume in range(100):
        try:
            learn(drawn_folder, tmp_path / "run", recipe=recipe, budget=8.0, resume=resume > 0)
            break
        except Paused:
            state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
            places.append((len(state["history"]), state["step"]))
    assert any(step for _, step in places) and len(places) >= 2
    assert places == sorted(set(places))
    one, other = (checkpoint.read(tmp_path / n / "last.safetensors")[1] for n in ("whole", "run"))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in other.items()}
    tables = []
    for name in ("whole", "run"):
        with (tmp_path / name / "log.csv").open(newline="") as file:
            tables.append([{**row, "seconds": ""} for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_a_pause_says_how_to_go_on(drawn_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        Paused, match=r"after 0 of 2 epochs and 1 of 5 steps: the same .*--resume"
    ) as p:
        learn(drawn_folder, tmp_path / "run", budget=1e-9)
    assert p.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "fast"}, "compile is one of off, default"),
        ({"post_norm": True}, "two branches or more"),
        ({"branches": 0}, "1 to 64 branches"),
        ({"branches": 65}, "1 to 64 branches"),
        ({"branches": 3, "model": "resnet8"}, "resnet8 has no parallel branches"),
        ({"imgsz": 0}, "size of 0 is outside 24 to 256"),
        ({"device": "hpu"}, "The device 'hpu' cannot be used here"),
        ({"imgsz": 0, "from_": "densestride-1.0x", "model": None}, "size of 0 is outside"),
        ({"recipe": Recipe(batch=8, accumulate=8)}, "cannot be cut into 8 equal parts of two"),
        ({"from_": "densestride-1.0x", "model": None, "branches": 2}, "leave out branches"),
        ({"from_": "densestride-1.0x", "model": None, "pretrained": True}, "leave out branches"),
    ],
)
def test_a_training_that_cannot_be(
    drawn_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GhostEdgeError, match=message):
        learn(drawn_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_recipe_reaches_the_objective() -> None:
    recipe = dataclasses.replace(RECIPE, label_smoothing=0.25, balance=True, momentum=0.0)
    run = small_run(recipe)
    assert run.objective.smoothing == 0.25
    assert run.objective.weights is not None and len(run.objective.weights) == 4
    assert run.optimizer.defaults["nesterov"] is False, "which torch refuses without momentum"
    assert small_run().objective.weights is None


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, mode, dynamic: modes.append(mode))
    run = small_run()
    assert modes == []
    run.prepare(None, [], "reduce-overhead")
    assert modes == ["reduce-overhead"]


def test_a_compiler_that_is_missing(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(GhostEdgeError, match="train with --compile off") as caught:
        learn(drawn_folder, tmp_path / "run", model="resnet8", compile="default")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_learns_the_same(
    drawn_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.utils.counters.clear()
    recipe = dataclasses.replace(RECIPE, epochs=1)
    weights = []
    for mode in ("off", "default"):
        assert not torch._dynamo.utils.counters["stats"], "nothing is compiled that need not be"
        best = learn(drawn_folder, tmp_path / mode, model="resnet8", recipe=recipe, compile=mode)
        weights.append(checkpoint.build(best)[1].state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-3, atol=1e-4, msg=name)


def test_no_state_is_kept_of_a_loss_that_is_no_number(tmp_path: Path) -> None:
    run = small_run()
    run.sums[0] = math.nan
    with pytest.raises(GhostEdgeError, match="diverged in epoch 1"):
        run.pause_after(0.0)


def test_budgets() -> None:
    assert [_seconds(t) for t in (None, "90", "1.5s", "9m", "2h")] == [None, 90, 1.5, 540, 7200]
    for text in ("", "m", "9 days", "-1s", "0"):
        with pytest.raises(GhostEdgeError, match="is no time"):
            _seconds(text)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, drawn_folder: Path) -> Path:
    return learn(drawn_folder, tmp_path_factory.mktemp("start"))


def test_transfer_to_other_classes_and_sizes(start: Path, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch=160, lr=1e-6, freeze="backbone")
    best = learn("drawn:5", tmp_path, model=None, imgsz=32, from_=str(start), recipe=recipe)
    card, tensors = checkpoint.read(best)
    old, before = checkpoint.read(start)
    assert card.arguments == {**old.arguments, "num_classes": 5}
    assert (card.pixels.size, len(card.labels)) == (32, 5)
    assert card.training["from"]["file"] == "best.safetensors"
    for name, tensor in before.items():
        if name not in (checkpoint.CALIBRATION, "classifier.weight", "classifier.bias"):
            np.testing.assert_array_equal(tensors[name], tensor)
    assert tensors["classifier.weight"].shape[0] == 5


def test_transfer_keeps_the_head_for_the_same_classes(
    start: Path, drawn_folder: Path, tmp_path: Path
) -> None:
    from ghostedge.data.sources import open_data

    classes = open_data(drawn_folder).classes
    card, net = subject(classes, from_=str(start))
    assert card.pixels.size == SIZE
    expected = checkpoint.read(start)[1]["classifier.weight"]
    np.testing.assert_array_equal(head(net)[1].weight.detach().numpy(), expected)
    card, tensors = checkpoint.read(start)
    card.labels.reverse()  # as `ghostedge import --labels` may have them
    checkpoint.save(tmp_path / "other.safetensors", card, tensors)
    other = str(tmp_path / "other.safetensors")
    _, net = subject(classes, from_=other)
    np.testing.assert_array_equal(head(net)[1].weight.detach().numpy(), expected[::-1])
    del tensors["classifier.weight"]
    checkpoint.save(tmp_path / "other.safetensors", card, tensors)
    with pytest.raises(GhostEdgeError, match="do not fit"):
        subject(classes, from_=other)
    tensors["classifier.weight"] = expected
    norm = next(n for n, t in tensors.items() if n.endswith("running_mean") and len(t) > 1)
    checkpoint.save(tmp_path / "other.safetensors", card, {**tensors, norm: tensors[norm][:1]})
    with pytest.raises(GhostEdgeError, match="do not fit"):
        subject(classes, from_=other)
    with pytest.raises(GhostEdgeError, match=r"holds ghostnetv3-small-0\.1x, not resnet18"):
        subject(classes, "resnet18", from_=str(start))


def test_imagenet_weights_where_they_fit(
    drawn_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghostedge.data.sources import open_data

    pytest.importorskip("torchvision")
    given = {
        "layer1.0.conv1.weight": np.full((64, 64, 3, 3), 2.0, np.float32),
        "conv1.weight": np.full((64, 3, 7, 7), 2.0, np.float32),
        "fc.weight": np.full((1000, 512), 2.0, np.float32),
    }
    monkeypatch.setattr("ghostedge.training.start.imagenet_weights", lambda name: given)
    classes = open_data(drawn_folder).classes
    card, net = subject(classes, "resnet18", 32, pretrained=True)
    state = net.state_dict()
    assert (state["layer1.0.conv1.weight"] == 2).all()
    assert state["conv1.weight"].shape == (64, 3, 3, 3) and state["fc.weight"].shape == (4, 512)
    assert card.pixels == PixelContract.of_unit(card.pixels.size, *IMAGENET)
    with pytest.raises(GhostEdgeError, match=r"have no conv1, bn1, .*these would stay random"):
        subject(classes, "resnet18", 32, pretrained=True, freeze="backbone")


@pytest.mark.parametrize(
    "name",
    ["airbench-0.1x", "resnet18"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in NETS if n not in ("airbench", "resnet18")],
)
def test_teachers_train_and_build_themselves_again(
    drawn_folder: Path, tmp_path: Path, name: str
) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, lr=0.001)
    best = learn(drawn_folder, tmp_path, model=name, recipe=recipe)
    card, net = checkpoint.build(best)
    assert card.name == name and "test" in card.accuracy
    assert checkpoint.CALIBRATION not in checkpoint.read(best)[1]
    assert net(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 4)


def test_a_teacher_without_test_images_is_finished_too(drawn_folder: Path, tmp_path: Path) -> None:
    best = learn(drawn_folder / "train", tmp_path, model="airbench-0.1x", recipe=RECIPE)
    assert set(checkpoint.read(best)[0].accuracy) == {"validation"}
    assert best.with_name("curves.png").exists()


def test_one_norm_after_the_sum_trains_and_builds_itself_again(
    drawn_folder: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1)
    best = learn(drawn_folder, tmp_path, branches=2, post_norm=True, recipe=recipe)
    card, _ = checkpoint.build(best)
    assert card.arguments["post_norm"] is True
    assert any("post_bn" in name for name in checkpoint.read(best)[1])


def test_a_batch_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes("cpu")
    assert processes.parts(16, 4) == 4
    with pytest.raises(GhostEdgeError, match="cannot be cut into 3 equal parts"):
        processes.parts(16, 3)


def test_two_processes_learn_what_one_does_with_two_sub_batches(
    drawn_folder: Path, start: Path, tmp_path: Path
) -> None:
    # From weights whose gradients are below the clip's norm, which would hide a factor in them.
    flags = f"--from {start} --epochs 2 --batch 16 --lr 0.01".split()
    flags += ["--teacher", str(start), "--strategy", "amtml"]  # which learns weights of its own
    for setting in ("freeze=norms", "accumulate=2", "ema=0.9", "clip=1000"):
        flags += ["--set", setting]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(ghostedge.__file__).parents[1])

    def code(name: str, launcher: list[str], *more: str) -> int:
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "ghostedge.cli", "distill", str(drawn_folder)]
            + [*flags, "--output", str(tmp_path / name), *more],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        return done.returncode

    assert code("one", []) == 0
    assert code("two", torchrun, "--budget", "0.001s") == 1
    assert code("two", torchrun, "--resume") == 0
    one, two = (checkpoint.read(tmp_path / n / "last.safetensors") for n in ("one", "two"))
    assert one[0].accuracy == two[0].accuracy
    for name, tensor in one[1].items():
        np.testing.assert_allclose(two[1][name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
