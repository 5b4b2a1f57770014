"""The training loop, in one place."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import ghostedge
from ghostedge import checkpoint
from ghostedge.data.sources import (
    Data,
    FolderSource,
    Images,
    open_data,
    require_classes,
    split,
)
from ghostedge.errors import GhostEdgeError, Paused, expect, in_a_line
from ghostedge.files import held, printable, reported
from ghostedge.models import ARCHITECTURES
from ghostedge.models.synthetic import synthesize
from ghostedge.models.teachers import OnPixels, Teacher
from ghostedge.pixels import span
from ghostedge.training.batches import Batch, Batches
from ghostedge.training.distillation import Distillation, Strategy
from ghostedge.training.objective import Objective, balanced, freeze
from ghostedge.training.processes import Processes
from ghostedge.training.recipe import Recipe
from ghostedge.training.start import subject
from ghostedge.training.state import Average, Folder, History

LOOK = 20
"""Steps between looks at the loss: each one makes the host wait for a GPU."""

SHOWN = 12
"""Classes that are named: a folder that was not meant as one is seen."""
COMPILE = ("off", "default", "reduce-overhead", "max-autotune")
"""Modes of torch.compile."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise GhostEdgeError where memory is too small, or no compiler can be used."""
    try:
        yield
    except RuntimeError as error:  # a GPU's is of a class of its own, a CPU's is not
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise GhostEdgeError(
                "The memory is too small for steps of so many images: lower --batch (or --imgsz), or raise "
                "accumulate, which cuts a step into parts."
            ) from error
        from torch._dynamo.exc import TorchDynamoException  # slow, and needed here only

        if isinstance(error, TorchDynamoException):
            raise GhostEdgeError(
                f"torch.compile cannot compile the network here ({in_a_line(error)}): train with --compile "
                "off (in a study --set compile=off)."
            ) from error
        raise


@_explained()
def train(
    data: str,
    output: str | os.PathLike[str],
    *,
    model: str | None = None,
    imgsz: int | None = None,
    branches: int = 1,
    post_norm: bool = False,
    recipe: Recipe | None = None,
    from_: str | None = None,
    pretrained: bool = False,
    distillation: Distillation | None = None,
    device: str = "cpu",
    compile: str | None = None,
    budget: float | None = None,
    resume: bool = False,
    download: bool = False,
    licence: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train a network on a folder of images or a named set; return the best checkpoint's path.

    `output` receives best.safetensors (chosen on the validation split), last.safetensors, log.csv,
    curves.png, tensorboard/ and state.pt, from which `resume` continues. On a CPU an interrupted and
    resumed run gives the same weights as an unbroken one. Test images, where there are any, are read
    once, at the end.

    Args:
        data: a folder of images or the name of a set. output: a folder that is new or `resume`s.
        model: a network's name; ghostnetv3-small-1.0x by default, or what `from_` holds.
        imgsz: 32 by default, or what `from_` was trained with.
        branches: parallel ones, of networks that have them. post_norm: of GhostNetV3's (see there).
        from_: a checkpoint to start from. Its last layer is made anew where the classes differ.
        pretrained: start from torchvision's ImageNet weights, which are downloaded.
        distillation: teachers, and what to take from them.
        recipe: how, `Recipe()` by default.
        device: as torch names it, "cpu" or "cuda". download: fetch the named set where it is not there.
        licence: of the weights, kept in their card. console: where to report, stderr by default.
        compile: one of `COMPILE`; by default "default" on GPUs and off on CPUs. Always off for
            AMTML-KD, whose hooks compiled code would not run.
        budget: seconds after which to stop, so that `resume` goes on from there.

    Raises GhostEdgeError for unusable data, an output folder of another run, or a diverged loss;
    Paused when the budget is spent.
    """
    deadline = None if budget is None else time.monotonic() + budget
    recipe = recipe or Recipe()
    if recipe.mixup and distillation is None:
        raise GhostEdgeError("mixup is for distillation only: it hurts compact nets without.")
    if licence is not None and licence != printable(licence):
        raise GhostEdgeError(f"The licence {printable(licence)} is no UTF-8 text.")
    if compile not in (None, *COMPILE):
        raise GhostEdgeError(f"compile is one of {', '.join(COMPILE)}, which {compile!r} is not.")
    output = Path(output)
    folder = Folder(output)
    if not resume:
        folder.require_unused()
    if resume and not folder.state.exists():
        raise GhostEdgeError(f"{output} holds no run to resume: {folder.state} is missing.")
    processes = Processes(device)
    if download and processes.rank:
        processes.meet()  # number 0 fetches for all
    sets = open_data(data, download=download and not processes.rank)
    if download and not processes.rank:
        processes.meet()
    require_classes(sets)
    _require_apart(output, sets)
    console = console or Console(stderr=True, markup=False)
    console.quiet |= processes.rank > 0
    place = processes.place
    torch.manual_seed(recipe.seed)
    card, net = subject(
        sets.classes, model, imgsz, branches, post_norm, from_, pretrained, recipe.freeze
    )
    # Before the images are read: a missing teacher shall not cost minutes.
    teachers = [
        Teacher(t, sets.classes, place) for t in (distillation.teachers if distillation else ())
    ]

    more = f" and {len(sets.classes) - SHOWN} more" * (len(sets.classes) > SHOWN)
    console.print(f"Reading {sets.name}: {', '.join(sets.classes[:SHOWN])}{more}")
    train_images, val_images, card.data = _read(sets, card.pixels.size, recipe)
    _report_skipped([*sets.skipped, *train_images.skipped, *val_images.skipped], console)
    if len(train_images) < 2 or not len(val_images):
        raise GhostEdgeError(
            f"{sets.name} has {len(train_images)} images to train on and {len(val_images)} to "
            "validate on, which is too few: give every class at least two images."
        )
    recipe = recipe.resolved(len(train_images))
    assert recipe.batch is not None
    card.training |= {"recipe": dataclasses.asdict(recipe), "device": _device_name(place)}
    strategy = None
    if distillation is not None:
        strategy = distillation.build()  # whose numbers are known
        card.training["distillation"] = {
            "strategy": distillation.strategy,
            "temperature": strategy.temperature,
            "alpha": strategy.alpha,
            "teachers": [teacher.identity for teacher in teachers],
        }
    card.licence = licence
    card.versions = {
        "ghostedge": ghostedge.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    batches = Batches(train_images.pixels, train_images.labels, recipe.batch, place)
    val = Batches(val_images.pixels, val_images.labels, _at_once(card.pixels.size), place)
    student = OnPixels(net, card.pixels).to(place).to(memory_format=torch.channels_last)
    run = _Run(student, batches, val, recipe, card, folder, processes, console)
    alone = contextlib.nullcontext() if processes.rank else held(output)
    with alone, reported(output):
        if not resume:
            folder.require_unused()  # another run may have begun since
        for teacher in teachers:  # before it is compiled: for the student's batches alone
            console.print(_introduced(teacher, val))
        default = "default" if place.type == "cuda" else "off"
        run.prepare(strategy, teachers, compile or default)
        if resume:
            run.restore()
        if processes.size > 1:  # which draw no two the same dropout
            torch.manual_seed(recipe.seed + processes.rank + processes.size * len(run.history))
        run.to_the_end(deadline)
        if processes.rank == 0:
            _finish(run, sets)
        processes.meet()  # what is returned is complete, and may teach
    return output / "best.safetensors"


def _require_apart(output: Path, sets: Data) -> None:
    """Raise GhostEdgeError for a run among its images: the next one would take it for a class."""
    place = Path(os.path.realpath(output))
    for source in (sets.train, sets.val, sets.test):
        if isinstance(source, FolderSource):
            root = Path(os.path.abspath(source.files[0])).parents[source.names[0].count("/")]
            if place.is_relative_to(os.path.realpath(root)):  # a file may be a link, and not count
                raise GhostEdgeError(
                    f"{output} is inside {root}, where the next training would take it for a class: name "
                    "another --output."
                )


def _read(sets: Data, size: int, recipe: Recipe) -> tuple[Images, Images, dict[str, Any]]:
    source = sets.train
    assert source is not None
    card: dict[str, Any] = {"name": sets.name, **sets.fingerprints}
    if sets.val is not None:
        images = source.read(size)
        val_images = sets.val.read(size)
        card["validation"] = None
    else:
        train_indices, val_indices = split(source, recipe.validation, recipe.seed)
        images, val_images = source.read(size, train_indices), source.read(size, val_indices)
        source.require(source.labels[train_indices], images)
        source.require(source.labels[val_indices], val_images)
        card["validation"] = {"fraction": recipe.validation, "seed": recipe.seed}
    card["images"] = len(images)
    card["pixels"] = span(images.pixels)
    return images, val_images, card


def _report_skipped(skipped: list[tuple[str, str]], console: Console) -> None:
    if skipped:
        console.print(f"Skipped {len(skipped)} files, the first: {skipped[0][0]}: {skipped[0][1]}")


def _introduced(teacher: Teacher, val: Batches) -> str:
    """Return what a teacher is worth here: one that reads other pixels knows nothing."""
    every = max(1, len(val.labels) // 500)
    labels = val.labels[::every]
    views = val.images[::every].permute(0, 3, 1, 2).split(val.batch)
    found = torch.cat([teacher(some).argmax(1) for some in views])
    right = 100 * (found == labels).float().mean()
    return f"{teacher.identity['file']} knows {right:.1f}% of {len(labels)} validation images"


def _at_once(size: int) -> int:
    """Return how many images of a size to compute without gradients in one go."""
    return max(1, 500 * 32**2 // size**2)


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{place.type}, {torch.get_num_threads()} threads"


def accuracy(net: nn.Module, batches: Batches) -> float:
    """Return the top-1 accuracy in percent of a net on raw pixels, in float32."""
    net.eval()
    right = 0
    with torch.inference_mode():
        for batch in batches.in_order():
            # Not through `net()`, which would compile it anew for evaluation.
            right += int((net.forward(batch.views).argmax(1) == batch.labels).sum())
    return 100 * right / len(batches.labels)


class _Run:
    """A training under way: what changes from step to step, and how it is kept."""

    def __init__(
        self,
        student: OnPixels,
        batches: Batches,
        val: Batches,
        recipe: Recipe,
        card: checkpoint.Checkpoint,
        folder: Folder,
        processes: Processes,
        console: Console,
    ) -> None:
        self.student, self.batches, self.val, self.recipe = student, batches, val, recipe
        self.card, self.folder, self.console = card, folder, console
        self.processes, self.place = processes, batches.images.device
        self.average = Average(student, recipe.ema)
        self.on_gpu = self.place.type == "cuda"
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and self.on_gpu)
        self.parts = processes.parts(batches.batch, recipe.accumulate)
        self.history: History = []
        self.best = -1.0
        self.step = 0
        """Of the epoch under way."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.place)
        """Of that epoch: loss by image, right answers, images."""
        self.seconds = 0.0

    def prepare(self, strategy: Strategy | None, teachers: list[Teacher], compile: str) -> None:
        recipe, student = self.recipe, self.student
        if strategy is not None:
            strategy.prepare(student, teachers, next(self.batches.in_order()).views[:2])
        weights = balanced(self.batches.labels, len(self.card.labels)) if recipe.balance else None
        objective = Objective(student, recipe.label_smoothing, weights, strategy, teachers)
        if recipe.freeze == "backbone":
            freeze(student, recipe.freeze)
        self.objective = objective.to(self.place)
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        heavy: list[nn.Parameter] = []
        light: list[nn.Parameter] = []
        for name, p in trained.items():
            # Of convolutions, linear layers and attention. Norms' have one dimension; tokens and
            # positions have more, by other names.
            weight = p.ndim > 1 and name.endswith("weight")
            (heavy if weight or recipe.decay == "all" else light).append(p)
        groups: list[dict[str, Any]] = [
            {"params": heavy, "weight_decay": recipe.weight_decay},
            {"params": light, "weight_decay": 0.0},
        ]
        assert recipe.lr is not None
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups,
                lr=recipe.lr,
                momentum=recipe.momentum,
                nesterov=recipe.momentum > 0,
                fused=self.on_gpu,
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=self.on_gpu)
        self.trained = [*trained.values()]
        # Compiled code runs no hook that it did not see while it was traced.
        if compile != "off" and not (strategy is not None and strategy.looks_inside):
            torch.compiler.reset()  # of what a chain compiled before: torch compiles only so many
            for net in (student, *(teacher.net for teacher in teachers)):
                if net is not None:
                    net.compile(mode=compile, dynamic=False)
        self.parallel = self.processes.parallel(objective)

    def rate(self, step: float) -> float:
        """Return the learning rate at a step, which may lie between two."""
        total = self.recipe.epochs * self.batches.steps
        peak, rise = self.recipe.lr or 0.0, max(1.0, self.recipe.warmup * total)
        if step < rise:
            return peak * step / rise
        done = (step - rise) / max(1.0, total - rise)
        if self.recipe.schedule == "linear":
            return peak * (1 - done)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    @property
    def finished(self) -> bool:
        since = [row["validation"] for row in self.history]
        stale = len(since) - 1 - since.index(max(since)) if since else 0
        return len(since) >= self.recipe.epochs or 0 < self.recipe.patience <= stale

    def to_the_end(self, deadline: float | None) -> None:
        epochs, steps = self.recipe.epochs, self.batches.steps
        with (
            self._tensorboard() as writer,
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            ) as progress,
        ):
            done = len(self.history) * steps + self.step
            bar = progress.add_task("", total=epochs * steps, completed=done)
            while not self.finished:
                row = self.epoch(progress, bar, deadline)
                self.history.append(row)
                if writer is not None:
                    for key, value in row.items():
                        writer.add_scalar(key, value, len(self.history) - 1)
                    writer.flush()
                self.keep(row["validation"])
                progress.console.print(
                    f"epoch {len(self.history)}/{epochs}  loss {row['loss']:.3f}  train "
                    f"{row['train']:.2f}%  validation {row['validation']:.2f}%  {row['seconds']:.0f} s"
                )
                self.pause_after(deadline)  # after the last one too: what follows takes minutes
            if len(self.history) < epochs:
                patience = self.recipe.patience
                self.console.print(f"Stopped: no better validation for {patience} epochs")

    def _tensorboard(self) -> contextlib.AbstractContextManager[Any]:
        """Return a writer that drops what a killed run wrote of the epoch under way."""
        if self.processes.rank:
            return contextlib.nullcontext()
        # TensorBoard imports TensorFlow where it finds it, unless this module exists.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.console.print("tensorboard is not installed: only log.csv is written")
            return contextlib.nullcontext()
        return SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=len(self.history))

    def epoch(self, progress: Progress, bar: Any, deadline: float | None) -> dict[str, float]:
        started, number = time.monotonic() - self.seconds, len(self.history)
        self.student.train()
        if self.recipe.freeze != "none":
            freeze(self.student, self.recipe.freeze)
        for batch in self.batches.shuffled(self.recipe, number, self.step):
            total = number * self.batches.steps + self.step
            rate = self.rate(total + 1)
            self.learn(batch, rate)
            self.average.update(total)
            self.step += 1
            progress.update(bar, advance=1)
            if self.step % LOOK == 0 or self.step == self.batches.steps:
                loss, right, seen = self.sums.tolist()
                if not math.isfinite(loss):
                    raise self.diverged(number, f"the loss became {loss}")
                text = f"epoch {number + 1} loss {loss / seen:.3f} top-1 {100 * right / seen:.1f}%"
                progress.update(bar, description=text)
            if self.step < self.batches.steps:
                self.seconds = time.monotonic() - started
                self.pause_after(deadline)
        self.require_finite()
        loss, right, seen = self.processes.summed(self.sums).tolist()
        validation = accuracy(self.average.net, self.val)
        self.step, self.seconds = 0, 0.0
        self.sums.zero_()
        return {
            "loss": loss / seen,
            "train": 100 * right / seen,
            "validation": self.processes.agreed(validation),
            "lr": rate,
            "seconds": time.monotonic() - started,
        }

    def learn(self, batch: Batch, rate: float) -> None:
        """One step: the gradients of this process's sub-batches, added up and shared, then applied."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.chunks(self.parts)[self.processes.rank :: self.processes.size]
        for index, part in enumerate(parts):
            with self.processes.alone(self.parallel, index < len(parts) - 1):
                with torch.autocast(self.place.type, torch.bfloat16, self.bf16):
                    loss, logits = self.parallel(part)
                (loss / len(parts)).backward()
            right = (logits.detach().argmax(1) == part.labels).sum()
            count = torch.full_like(right, len(part.labels))  # made there: no wait for a GPU
            self.sums += torch.stack([loss.detach() * count, right, count])
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.trained, self.recipe.clip)
        self.optimizer.step()

    def pause_after(self, deadline: float | None) -> None:
        """Keep the state and raise Paused once the deadline has passed."""
        if deadline is None or (self.processes.size > 1 and self.step % LOOK):
            return
        if not self.processes.agreed(float(time.monotonic() >= deadline)):
            return
        number = len(self.history)
        self.sums = self.processes.summed(self.sums)
        self.require_finite()
        self.save()
        self.processes.meet()  # torchrun kills the others when the first one ends
        raise Paused(
            f"The time budget is spent after {number} of {self.recipe.epochs} epochs"
            f"{f' and {self.step} of {self.batches.steps} steps' if self.step else ''}: "
            f"the same command with --resume continues {self.folder.path}."
        )

    def require_finite(self) -> None:
        """Raise GhostEdgeError rather than keep what no run can go on from."""
        if not bool(self.sums.isfinite().all()):
            raise self.diverged(len(self.history), "the loss is no longer finite")
        if not all(bool(t.isfinite().all()) for t in self.student.state_dict().values()):
            raise self.diverged(len(self.history), "weights are no longer finite")

    def diverged(self, epoch: int, how: str) -> GhostEdgeError:
        place = self.folder.path
        kept = f"{place} keeps the epochs before it; delete it, or name another --output, and start"
        return GhostEdgeError(
            f"The training diverged in epoch {epoch + 1}: {how}. {kept if epoch else 'Start'} anew with a "
            "lower --lr (of a study's arm: --set ARM.lr)."
        )

    def keep(self, validation: float) -> None:
        """Write what a killed run continues from, last of all the state that counts the epoch."""
        self.card.accuracy = {"validation": {"top1": validation, "images": len(self.val.labels)}}
        self.card.training["epoch"] = len(self.history)
        self.card.training["seconds"] = round(sum(row["seconds"] for row in self.history))
        better = validation > self.best
        self.best = max(validation, self.best)
        if self.processes.rank:
            return
        net = self.average.net.net
        assert isinstance(net, nn.Module)
        first = not self.folder.state.exists()
        if first:  # until the next state is there, a killed run starts anew
            self.folder.save_state(_identity(self.card), {})
        try:
            for name in ("best", "last") if better else ("last",):
                self.folder.save_weights(name, self.card, net)
            self.folder.save_table(self.history)
            self.save()
        except GhostEdgeError:  # a full disk
            if first:
                self.folder.clear()
            raise

    def save(self) -> None:
        if self.processes.rank:
            return
        state = {
            "objective": self.objective.state_dict(),
            "average": self.average.net.state_dict() if self.recipe.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random there": torch.cuda.get_rng_state(self.place) if self.on_gpu else None,
            "history": self.history,
            "best": self.best,
            "step": self.step,
            "sums": self.sums,
            "seconds": self.seconds,
        }
        self.folder.save_state(_identity(self.card), state)

    def restore(self) -> None:
        state = self.folder.load_state(_identity(self.card))
        if not state:
            return
        try:
            self.objective.load_state_dict(state["objective"])
            if state["average"] is not None:
                self.average.net.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if not self.processes.rank:  # whose sums they are
                self.sums.copy_(state["sums"])
            torch.set_rng_state(state["random"])
            if self.on_gpu and state["random there"] is not None:  # None: it was begun on a CPU
                torch.cuda.set_rng_state(state["random there"], self.place)
            self.history, self.best = state["history"], state["best"]
            self.step, self.seconds = state["step"], state["seconds"]
            kept = ("loss", "train", "validation", "lr", "seconds")
            figures = [self.best, self.seconds, *(row[key] for row in self.history for key in kept)]
            expect(all(isinstance(figure, float) for figure in figures), "figures")
            expect(self.step in range(self.batches.steps), "step")
            expect(bool(self.sums.isfinite().all()), "sums")
        except Exception as error:  # a state of other versions has other parts
            raise self.folder.damaged(error) from error
        if self.history and not self.processes.rank:
            self.require_best()

    def require_best(self) -> None:
        """Raise GhostEdgeError unless best.safetensors is of this run: at the end it is its result."""
        path = self.folder.path / "best.safetensors"
        tops = [row["validation"] for row in self.history]
        # A run that was killed while it kept an epoch has the best of that one.
        epochs = (tops.index(max(tops)) + 1, len(tops) + 1)
        try:
            card, _ = checkpoint.read(path)
            same = card.architecture == self.card.architecture and card.labels == self.card.labels
            found = same and card.training.get("epoch") in epochs
        except GhostEdgeError:
            found = False
        if not found:
            raise GhostEdgeError(
                f"{path} is not the best epoch of this run: put that back, or start anew with another "
                "--output."
            )


def _identity(card: checkpoint.Checkpoint) -> dict[str, Any]:
    """Return what a resumed run must have in common with the interrupted one."""
    return {
        **card.training["recipe"],
        "model": card.architecture,
        **card.arguments,
        "imgsz": card.pixels.size,
        "data": card.data,
        "labels": card.labels,
        "from": card.training.get("from"),
        "distillation": card.training.get("distillation"),
    }


def _finish(run: _Run, sets: Data) -> None:
    """Complete the best checkpoint: test accuracy, read once, and synthetic calibration images."""
    path = run.folder.path / "best.safetensors"
    card, tensors = checkpoint.read(path)
    test = None if "test" in card.accuracy else sets.test
    uncalibrated = card.architecture in ARCHITECTURES and checkpoint.CALIBRATION not in tensors
    net = checkpoint.network(card, tensors, str(path)).to(run.place)
    if test is not None:
        try:
            images = test.read(card.pixels.size)
        except GhostEdgeError as error:  # which shall not cost the training
            run.console.print(f"No test accuracy: {error}")
        else:
            _report_skipped(images.skipped, run.console)
            batches = Batches(images.pixels, images.labels, run.val.batch, run.place)
            top1 = accuracy(OnPixels(net, card.pixels).to(run.place), batches)
            card.accuracy["test"] = {"top1": top1, "images": len(images)}
    if uncalibrated:
        run.console.print("Synthesising calibration images from the BatchNorm statistics")
        tensors[checkpoint.CALIBRATION] = synthesize(net, card.pixels, seed=run.recipe.seed)
    drawn = run.folder.draw_curves(run.history)
    checkpoint.save(path, card, tensors)
    if not drawn:
        run.console.print("matplotlib is not installed: curves.png is not drawn")
    for part, figures in card.accuracy.items():
        run.console.print(f"{part}: {figures['top1']:.2f}% of {figures['images']} images")
