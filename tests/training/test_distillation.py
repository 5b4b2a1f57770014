from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from ghostedge import checkpoint
from ghostedge.data.sources import open_data, split
from ghostedge.errors import GhostEdgeError, Paused
from ghostedge.evaluate import evaluate
from ghostedge.models import TEACHERS, architecture, create, synthetic
from ghostedge.models.teachers import OnPixels, Teacher
from ghostedge.pixels import PixelContract
from ghostedge.training import Distillation, Recipe, distill, train
from ghostedge.training.batches import Batch
from ghostedge.training.distillation import STRATEGIES, Maps, Strategy
from ghostedge.training.objective import Objective
from tests.models.test_teachers import small_teacher

LABELS = torch.tensor([0, 3, 1, 2, 3])
RECIPE = Recipe(epochs=2, batch=16, lr=0.02, ema=0.5)


def logits(seed: int, *shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, 5, 4, generator=random, dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z)
    return powers / powers.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p, q) summed over classes, mean over images, written out."""
    return float(sum(a * np.log(a / b) for a, b in zip(p.flat, q.flat, strict=True)) / len(p))


def loss(name: str, t: float, alpha: float, teachers: torch.Tensor, seed: int = 0) -> float:
    entropy = torch.tensor(1.7, dtype=torch.float64)
    built = Distillation(("t",), name, t, alpha).build()
    return float(built(entropy, logits(0), teachers, Batch(torch.empty(0), LABELS, seed=seed)))


def test_kd() -> None:
    student, teachers = logits(0).numpy(), logits(1, 2)
    mean = teachers.numpy().mean(0)
    expected = 0.3 * 1.7 + 0.7 * 25 * kl(softmax(mean / 5), softmax(student / 5))
    assert loss("kd", 5, 0.3, teachers) == pytest.approx(expected)
    assert loss("kd", 1, 1, teachers) == pytest.approx(1.7)
    assert loss("kd", 2, 0, logits(0)[None]) == pytest.approx(0)


def test_an_ensemble_of_mean_probabilities() -> None:
    student, teachers = logits(0).numpy(), logits(1, 3)
    mean = np.mean([softmax(z / 2) for z in teachers.numpy()], 0)
    expected = 0.5 * 1.7 + 0.5 * 4 * kl(mean, softmax(student / 2))
    assert loss("ensemble", 2, 0.5, teachers) == pytest.approx(expected)


def test_standardized_kd() -> None:
    def scores(z: np.ndarray) -> np.ndarray:
        return np.array([(row - row.mean()) / row.std(ddof=1) for row in z])

    student, teacher = logits(0).numpy(), logits(1).numpy()
    expected = 9 * 4 * kl(softmax(scores(teacher) / 2), softmax(scores(student) / 2)) + 0.17
    assert loss("standardized", 2, 0.1, logits(1)[None]) == pytest.approx(expected, rel=1e-5)
    # Only relations count: a teacher scaled and shifted teaches the same.
    assert loss("standardized", 2, 0.1, 7 * logits(1)[None] + 3) == pytest.approx(
        expected, rel=1e-5
    )
    with pytest.raises(GhostEdgeError, match="With two classes all z-scores are alike"):
        Distillation(("t",), "standardized").build().guidance(
            logits(0)[:, :2], logits(1, 1)[:, :, :2], batch()
        )


def test_dist() -> None:
    student, teacher = (softmax(z.numpy() / 4) for z in (logits(0), logits(1)))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(student, teacher, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(student.T, teacher.T, strict=True)]
    expected = 0.25 * 1.7 + 0.75 * 16 * (2 - np.mean(rows) - np.mean(columns))
    assert loss("dist", 4, 0.25, logits(1)[None]) == pytest.approx(expected, rel=1e-6)


def test_dkd_splits_the_divergence() -> None:
    p, q = (softmax(z.numpy() / 4) for z in (logits(1), logits(0)))
    target = others = 0.0
    for label, a, b in zip(LABELS, p, q, strict=True):
        own, rest = int(label), [k for k in range(4) if k != int(label)]
        target += kl(np.array([[a[own], 1 - a[own]]]), np.array([[b[own], 1 - b[own]]]))
        others += kl(a[None, rest] / a[rest].sum(), b[None, rest] / b[rest].sum())
    expected = 0.5 * 1.7 + 0.5 * 16 * (target + 8 * others) / 5
    assert loss("dkd", 4, 0.5, logits(1)[None]) == pytest.approx(expected)


def test_dgkd_adds_guides_and_drops_some() -> None:
    student, guides = logits(0).numpy(), logits(1, 3)
    terms = [16 * kl(softmax(z / 4), softmax(student / 4)) for z in guides.numpy()]
    possible = {
        round(3 * 0.85 + 0.5 * sum(t for i, t in enumerate(terms) if mask >> i & 1), 6): mask
        for mask in range(1, 8)
    }
    found = [possible[round(loss("dgkd", 4, 0.5, guides, seed), 6)] for seed in range(400)]
    assert set(found) == set(range(1, 8))
    kept = np.mean([mask >> i & 1 for mask in found for i in range(3)])
    # 3/4, and one for certain: 1 - (2/3) / 4 = 5/6.
    assert kept == pytest.approx(5 / 6, abs=0.04)
    assert [part.seed for part in Batch(logits(0), LABELS, seed=7).chunks(2)] == [7, 7]


def net(seed: int = 0) -> OnPixels:
    torch.manual_seed(seed)
    student = create("ghostnetv3-small", num_classes=4, width=0.1, branches=1)
    return OnPixels(student, PixelContract(24))


def batch() -> Batch:
    views = torch.randint(0, 256, (5, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    return Batch(views.byte(), LABELS)


def cosine(points: np.ndarray, at: int, one: int, other: int) -> float:
    """Of the angle at a point; 0 where two are the same."""
    ways = points[[one, other]] - points[at]
    lengths = np.linalg.norm(ways, axis=1).prod()
    return float(ways[0] @ ways[1] / lengths) if lengths else 0.0


def test_amtml_weighs_teachers_by_image_and_gives_hints(tmp_path: Path) -> None:
    files = [small_teacher(tmp_path / f"{seed}.safetensors", seed)[0] for seed in range(2)]
    teachers = [Teacher(file, list("abcd"), torch.device("cpu")) for file in files]
    student, strategy = net(), Distillation(("t",), "amtml").build()
    strategy.prepare(student, teachers, batch().views[:2])
    objective = Objective(student, 0.0, None, strategy, teachers)
    assert {index for _, index, _ in strategy.pairs} == {0, 1}  # type: ignore[attr-defined]
    value, _ = objective(batch())
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())
    assert strategy.latent.grad.abs().max() > 0  # type: ignore[attr-defined]
    assert not any(name.startswith("teachers") for name in objective.state_dict())
    # Where both teachers say the same, weights do not matter: what is left of it is KD, and angles.
    maps = strategy._student.found[-1].detach()  # type: ignore[attr-defined]
    pooled = []
    handle = student.net.get_submodule("last").register_forward_hook(lambda *a: pooled.append(a[2]))
    student(batch().views)
    handle.remove()
    assert maps.shape == pooled[0].shape, "not what a gate computes, which is smaller"
    targets = logits(1)[None].float().repeat(2, 1, 1)
    strategy.hints = 0.0  # type: ignore[attr-defined]
    found = strategy.guidance(logits(0).float(), targets, batch())
    z, p = logits(0).numpy(), softmax(logits(1).numpy() / 4)
    adapter = -np.log(p[np.arange(5), LABELS]).mean()
    bent = [
        abs(cosine(z, *corner) - cosine(p, *corner))
        for corner in itertools.product(range(5), repeat=3)
    ]
    smooth = np.mean([d**2 / 2 if d < 1 else d - 0.5 for d in bent])
    assert smooth > 0.01
    assert found.item() == pytest.approx(adapter + 16 * kl(p, softmax(z / 4)) + smooth, rel=1e-4)


@pytest.mark.parametrize(
    "name", [*TEACHERS, "mobilenetv2", "mobilenetv3-small", "ghostnetv3-small"]
)
def test_hints_follow_the_maps_that_were_looked_for(name: str) -> None:
    """In training form too, and where a net calls one module at several resolutions."""
    pytest.importorskip("torchvision")
    width = {"width": 0.25} if architecture(name).widths else {}
    net, views = OnPixels(create(name, num_classes=4, **width), PixelContract(24)), batch().views
    maps = Maps(net, views[:2])
    net.train()(views)
    assert [found.shape[1:] for found in maps.found] == [shape[1:] for shape in maps.shapes]


def test_teacher_and_student_see_the_same_pixels(
    tmp_path: Path, drawn_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    read, teach = OnPixels.forward, Teacher.__call__

    def student(self: OnPixels, views: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen["student"].append(views.clone())
        return read(self, views)

    def teacher(self: Teacher, views: torch.Tensor) -> torch.Tensor:
        seen["teacher"].append(views.clone())
        return teach(self, views)

    monkeypatch.setattr(OnPixels, "forward", student)
    monkeypatch.setattr(Teacher, "__call__", teacher)
    learn(
        drawn_folder,
        tmp_path / "run",
        make_teacher(tmp_path),
        recipe=Recipe(epochs=1, batch=16, mixup=1.0),
    )
    del seen["teacher"][0]  # validation images, before it teaches
    assert len(seen["student"]) == len(seen["teacher"]) == 5
    for one, other in zip(*seen.values(), strict=True):
        assert one.dtype == torch.uint8
        assert torch.equal(one, other)


def make_teacher(folder: Path, seed: int = 0) -> str:
    """A net of the drawn figures' classes with another pixel contract than the student's."""
    file = folder / f"teacher{seed}.safetensors"
    card, tensors = checkpoint.read(small_teacher(file, seed)[0])
    card.labels = ["circle", "cross", "square", "triangle"]
    checkpoint.save(file, card, tensors)
    return str(file)


def learn(data: Path, output: Path, *teachers: str, **options: Any) -> Path:
    settings = {"recipe": RECIPE, "model": "ghostnetv3-small-0.1x", "imgsz": 24, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "STEPS", 1)
        console = Console(file=io.StringIO())
        options = {"console": console, **settings}
        return distill(str(data), output, teachers=teachers, **options)


def tensors_of(output: Path) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in checkpoint.read(output / "last.safetensors")[1].items()}


@pytest.mark.parametrize("strategy", ["kd", "dgkd", "amtml"])
def test_a_distillation_resumes_bit_for_bit(
    tmp_path: Path, drawn_folder: Path, strategy: str
) -> None:
    teachers = [make_teacher(tmp_path, seed) for seed in range(2)]
    learn(drawn_folder, tmp_path / "whole", *teachers, strategy=strategy)
    with pytest.raises(Paused, match="steps"):
        learn(drawn_folder, tmp_path / "run", *teachers, strategy=strategy, budget=1e-9)
    other = [teachers[0], make_teacher(tmp_path, 5)]
    with pytest.raises(GhostEdgeError, match="another distillation"):
        learn(drawn_folder, tmp_path / "run", *other, strategy=strategy, resume=True)
    learn(drawn_folder, tmp_path / "run", *teachers, strategy=strategy, resume=True)
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "whole")
    card = checkpoint.read(tmp_path / "run" / "best.safetensors")[0]
    stated = card.training["distillation"]
    assert stated["strategy"] == strategy and len(stated["teachers"]) == 2
    usual = STRATEGIES[strategy].settings
    assert (stated["temperature"], stated["alpha"]) == usual, "what was used, though not given"


def test_what_a_teacher_knows_is_said_before_it_teaches(tmp_path: Path, drawn_folder: Path) -> None:
    file, console = make_teacher(tmp_path), Console(file=io.StringIO(), width=200)
    learn(drawn_folder, tmp_path / "run", file, console=console, recipe=Recipe(epochs=1, batch=32))
    sets = open_data(str(drawn_folder))
    assert sets.train is not None
    _, held_out = split(sets.train, RECIPE.validation, RECIPE.seed)
    found = evaluate(file, sets.train.read(24, held_out), sets.train.classes).correct
    line = f"teacher0.safetensors knows {100 * found.mean():.1f}% of {len(found)} validation images"
    assert line in console.file.getvalue()


@pytest.mark.parametrize(("strategy", "guides"), [("kd", [1, 1, 1]), ("dgkd", [1, 2, 3])])
def test_assistants_teach_in_turn(
    tmp_path: Path, drawn_folder: Path, strategy: str, guides: list[int]
) -> None:
    via = ["ghostnetv3-small-0.2x", "airbench-0.1x"]
    options = {"strategy": strategy, "via": via, "recipe": Recipe(epochs=1, batch=32)}
    teacher, output = make_teacher(tmp_path), tmp_path / "run"
    with pytest.raises(Paused):
        learn(drawn_folder, output, teacher, budget=1e-9, **options)
    learn(drawn_folder, output, teacher, resume=True, **options)
    stages = [output / "assistants" / f"{n}-{name}" for n, name in enumerate(via, 1)]
    cards = [checkpoint.read(stage / "best.safetensors")[0] for stage in (*stages, output)]
    assert [card.name for card in cards] == [*via, "ghostnetv3-small-0.1x"]
    assert [len(card.training["distillation"]["teachers"]) for card in cards] == guides
    smoothing = [card.training["recipe"]["label_smoothing"] for card in cards]
    assert smoothing == [0, 0, Recipe().label_smoothing], "who teaches is not smoothed"


def test_a_student_may_start_from_weights(tmp_path: Path, drawn_folder: Path) -> None:
    start = learn(drawn_folder, tmp_path / "start", make_teacher(tmp_path))
    still = Recipe(epochs=1, batch=32, lr=1e-9, freeze="norms")
    options = {"model": None, "imgsz": None, "from_": str(start), "via": ["airbench-0.1x"]}
    best = learn(drawn_folder, tmp_path / "run", make_teacher(tmp_path), recipe=still, **options)
    card, tensors = checkpoint.read(best)
    assert card.training["from"]["file"] == "best.safetensors" and "distillation" in card.training
    assistant = tmp_path / "run" / "assistants" / "1-airbench-0.1x" / "best.safetensors"
    taught = checkpoint.read(assistant)[0]
    assert "from" not in taught.training and taught.training["recipe"]["freeze"] == "none"
    assert taught.pixels.size == card.pixels.size == 24
    for name, tensor in checkpoint.read(start)[1].items():
        np.testing.assert_allclose(tensors[name], tensor, atol=1e-5)
    with pytest.raises(GhostEdgeError, match="has its network"):
        learn(drawn_folder, tmp_path / "new", "t", **(options | {"branches": 3}))


def test_assistants_do_without_branches_and_norms_that_they_cannot_have(
    tmp_path: Path, drawn_folder: Path
) -> None:
    options = {"branches": 2, "post_norm": True, "recipe": Recipe(epochs=1, batch=32)}
    via = ["airbench-0.1x", "resnet8"]
    best = learn(drawn_folder, tmp_path, make_teacher(tmp_path), via=via, **options)
    assert checkpoint.read(best)[0].arguments["post_norm"] is True
    with pytest.raises(GhostEdgeError, match="resnet8 has no parallel branches"):
        learn(drawn_folder, tmp_path / "new", "t", model="resnet8", **options)


def test_a_chain_is_checked_before_it_starts(tmp_path: Path, drawn_folder: Path) -> None:
    used = tmp_path / "run"
    used.mkdir()
    (used / "state.pt").write_bytes(b"of another run")
    new, good = tmp_path / "new", {"model": "ghostnetv3-small-0.1x"}
    for output, wrong, message in (
        (used, good, "holds a run already"),
        (new, {"model": "ghostnetv3-smal"}, "Did you mean"),
        (new, {"model": "ghostnetv3-small-9x"}, "outside 0.1 to 8"),
        (new, {**good, "branches": 0}, "1 to 64 branches"),
        (new, {**good, "pretrained": True}, "no ImageNet weights for airbench"),
        (new, {**good, "resume": True}, "no run to resume"),
    ):
        options = {"via": ["airbench-0.1x"], **wrong}
        with pytest.raises(GhostEdgeError, match=message):
            learn(drawn_folder, output, make_teacher(tmp_path), **options)
        assert not (output / "assistants").exists()


@pytest.mark.parametrize("strategy", ["kd", "dkd", "dgkd", "amtml"])
def test_mixed_labels_share_what_is_distilled(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, views = net().eval(), batch().views
    files = [small_teacher(tmp_path / f"{seed}.safetensors", seed)[0] for seed in range(2)]
    teachers = [Teacher(file, list("abcd"), torch.device("cpu")) for file in files]
    built = Distillation(("t",), strategy).build()
    built.prepare(student, teachers, views[:2])
    objective = Objective(student, 0.1, None, built, teachers)
    drawn: list[int] = []
    draw = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **by: drawn.append(1) or draw(*size, **by))

    def loss(*given: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return objective(Batch(views, *given))[0]

    others = LABELS.roll(1)
    torch.testing.assert_close(loss(LABELS, others, 0.3), 0.3 * loss(LABELS) + 0.7 * loss(others))
    assert len(drawn) == 3 * (strategy == "dgkd"), "guides are chosen once a step"


def test_student_and_teacher_are_compiled_once_each_for_one_size_of_batch(
    tmp_path: Path, drawn_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By dynamo itself; what it hands to a compiler runs as it is."""
    sizes: list[list[Any]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        sizes.append([tuple(value.shape) for value in inputs if getattr(value, "ndim", 0) == 4])
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda net, mode, **options: compiled(net, backend=backend, **options),
    )
    teacher, recipe = make_teacher(tmp_path), Recipe(epochs=1, batch=8, lr=0.03)
    learn(drawn_folder, tmp_path / "kd", teacher, recipe=recipe, compile="default")
    views = [shape for shapes in sizes for shape in shapes if shape[1] == 3 and shape[2] > 3]
    assert len(sizes) == 2, "a graph for each net"
    assert views and all(type(side) is int for shape in views for side in shape)
    assert {shape[0] for shape in views} == {8}

    sizes.clear()
    options = {"recipe": recipe, "compile": "default", "strategy": "amtml"}
    learn(drawn_folder, tmp_path / "amtml", teacher, **options)
    assert not sizes, "whose hooks compiled code would not run"


def test_a_student_follows_its_teacher(tmp_path: Path, drawn_folder: Path) -> None:
    """Without labels (alpha 0), the loss falls only if the teacher is followed."""
    recipe = Recipe(epochs=4, batch=8, lr=0.03)
    learn(drawn_folder, tmp_path / "run", make_teacher(tmp_path), alpha=0.0, recipe=recipe)
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teachers": ()}, "needs a teacher"),
        ({"strategy": "kdd"}, "Did you mean"),
        ({"temperature": 0.0}, "temperature is from 0.01 to 1000"),
        ({"temperature": float("inf")}, "temperature is from 0.01 to 1000"),
        ({"alpha": 1.5}, "alpha is a share"),
    ],
)
def test_a_distillation_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GhostEdgeError, match=message):
        Distillation(**{"teachers": ("t",), **values})


def test_every_strategy_has_its_own_numbers() -> None:
    for name in STRATEGIES:
        built = Distillation(("t",), name).build()
        assert isinstance(built, Strategy)
        assert (built.temperature, built.alpha) == built.settings
        given = Distillation(("t",), name, 2.5, 0.25).build()
        assert (given.temperature, given.alpha) == (2.5, 0.25)


def test_mixup_is_for_distillation(tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match="mixup is for distillation only"):
        train("drawn", tmp_path / "run", recipe=Recipe(mixup=1.0))
    assert not (tmp_path / "run").exists()
