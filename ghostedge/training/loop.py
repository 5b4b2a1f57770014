"""The training loop, in one place."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import platform
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import ghostedge
from ghostedge import checkpoint
from ghostedge.data.sources import Data, Images, match_classes, open_data, require_classes, split
from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_file, reported
from ghostedge.models import create, parse_name
from ghostedge.models.synthetic import synthesize
from ghostedge.pixels import PixelContract, span
from ghostedge.training.batches import Batches


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained. The paper's recipe differs where a comment says so."""

    epochs: int = 30
    batch: int = 128
    lr: float = 0.1
    """Peak of a one-cycle schedule; the paper's 0.01 is too low for a short one."""
    warmup: float = 0.15
    """Share of the steps in which the rate rises linearly; it then falls to zero as a cosine."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On convolution and linear weights alone; the paper decays biases and BatchNorms too, by 0.01."""
    label_smoothing: float = 0.1
    validation: float = 0.1
    """Share of the training images, by class, that chooses the best epoch; the paper used the test set."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (
            self.epochs >= 1
            and self.batch >= 2
            and 0 < self.lr <= 1000
            and 0 < self.validation < 1
            and 0 <= self.seed < 2**32
        ):
            raise GhostEdgeError(
                "epochs must be at least 1, batch at least 2, lr above 0 and at most 1000, validation "
                f"between 0 and 1, seed from 0 to 2^32 - 1: got {dataclasses.asdict(self)}."
            )


def train(
    data: str,
    output: Path,
    *,
    model: str = "ghostnetv3-small-1.0x",
    imgsz: int = 32,
    branches: int = 1,
    recipe: Recipe | None = None,
    device: str = "cpu",
    resume: bool = False,
    download: bool = False,
    licence: str | None = None,
    console: Console | None = None,
) -> Path:
    """Train a network on a folder of images or a named set; return the best checkpoint's path.

    `output` receives best.safetensors (chosen on the validation split), last.safetensors, log.csv,
    tensorboard/ and state.pt, from which `resume` continues. On a CPU an interrupted and resumed
    run gives the same weights as an unbroken one. Test images, where there are any, are read once,
    at the end.

    Raises GhostEdgeError for unusable data, an output folder of another run, or a diverged loss.
    """
    recipe = recipe or Recipe()
    console = console or Console(stderr=True)
    architecture, width = parse_name(model)
    pixels = PixelContract(imgsz)
    sets = open_data(data, download=download)
    require_classes(sets)
    state_file = output / "state.pt"
    if state_file.exists() and not resume:
        raise GhostEdgeError(
            f"{output} holds a run already. Continue it with --resume, or name another --output."
        )
    if resume and not state_file.exists():
        raise GhostEdgeError(f"{output} holds no run to resume: {state_file} is missing.")
    place = _device(device)
    arguments = {"num_classes": len(sets.classes), "width": width, "branches": branches}
    torch.manual_seed(recipe.seed)
    net = create(architecture, **arguments).to(place, memory_format=torch.channels_last)  # type: ignore[call-overload]

    console.print(f"Reading {sets.name}")
    train_images, val_images, data_card = _read(sets, imgsz, recipe)
    _report_skipped(train_images.skipped + val_images.skipped, console)
    if len(train_images) < 2 or not len(val_images):
        raise GhostEdgeError(
            f"{sets.name} has {len(train_images)} images to train on and {len(val_images)} to "
            "validate on, which is too few: give every class at least two images."
        )
    recipe = dataclasses.replace(recipe, batch=min(recipe.batch, len(train_images)))
    card = checkpoint.Checkpoint(
        architecture,
        arguments,
        list(sets.classes),
        pixels,
        training={"recipe": dataclasses.asdict(recipe), "device": _device_name(place)},
        data=data_card,
        versions={
            "ghostedge": ghostedge.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        licence=licence,
    )
    batches = Batches(train_images.pixels, train_images.labels, pixels, recipe.batch, place)
    val = Batches(val_images.pixels, val_images.labels, pixels, 500, place)
    run = _Run(net, batches, val, recipe, card, output, console)
    if resume:
        run.restore(state_file)
    with reported(output):
        run.to_the_end()
    return _finish(run, sets, console)


def _read(sets: Data, size: int, recipe: Recipe) -> tuple[Images, Images, dict[str, Any]]:
    source = sets.train
    assert source is not None
    card: dict[str, Any] = {"name": sets.name, "fingerprint": source.fingerprint}
    if sets.val is not None:
        images = source.read(size)
        val_images = sets.val.read(size)
        val_images.labels = match_classes(sets.val.classes, sets.classes)[val_images.labels]
        card["validation"] = None
    else:
        train_indices, val_indices = split(source, recipe.validation, recipe.seed)
        images, val_images = source.read(size, train_indices), source.read(size, val_indices)
        card["validation"] = {"fraction": recipe.validation, "seed": recipe.seed}
    card["images"] = len(images)
    card["pixels"] = span(images.pixels)
    return images, val_images, card


def _report_skipped(skipped: list[tuple[str, str]], console: Console) -> None:
    if skipped:
        console.print(f"Skipped {len(skipped)} files, the first: {skipped[0][0]}: {skipped[0][1]}")


def _device(name: str) -> torch.device:
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GhostEdgeError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}). "
            "Use --device cpu, or cuda where there is a GPU."
        ) from error
    return place


def _device_name(place: torch.device) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{place.type}, {torch.get_num_threads()} threads"


def accuracy(net: nn.Module, batches: Batches) -> float:
    """Return the top-1 accuracy in percent."""
    net.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in batches.in_order():
            right += int((net(images).argmax(1) == labels).sum())
    return 100 * right / len(batches.labels)


class _Run:
    """A training under way: what changes from epoch to epoch, and how it is kept."""

    def __init__(
        self,
        net: nn.Module,
        batches: Batches,
        val: Batches,
        recipe: Recipe,
        card: checkpoint.Checkpoint,
        output: Path,
        console: Console,
    ) -> None:
        self.net, self.batches, self.val, self.recipe = net, batches, val, recipe
        self.card, self.output, self.console = card, output, console
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in net.parameters() if p.ndim > 1],
                "weight_decay": recipe.weight_decay,
            },
            {"params": [p for p in net.parameters() if p.ndim <= 1]},
        ]
        self.optimizer = torch.optim.SGD(
            groups,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=True,
        )
        self.history: list[dict[str, float]] = []
        self.best = -1.0

    def rate(self, step: float) -> float:
        """Return the learning rate at a step, which may lie between two."""
        total = self.recipe.epochs * self.batches.steps
        rise = max(1.0, self.recipe.warmup * total)
        if step < rise:
            return self.recipe.lr * step / rise
        fall = max(1.0, total - rise)
        return self.recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / fall))

    def to_the_end(self) -> None:
        epochs, steps = self.recipe.epochs, self.batches.steps
        first = len(self.history)
        with (
            self._tensorboard(first) as writer,
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            ) as progress,
        ):
            bar = progress.add_task("", total=epochs * steps, completed=first * steps)
            for epoch in range(first, epochs):
                row = self.epoch(
                    epoch, lambda text: progress.update(bar, advance=1, description=text)
                )
                self.history.append(row)
                if writer is not None:
                    for key, value in row.items():
                        writer.add_scalar(key, value, epoch)
                    writer.flush()
                self.keep(row["validation"])
                progress.console.print(
                    f"epoch {epoch + 1}/{epochs}  loss {row['loss']:.3f}  train {row['train']:.2f}%  "
                    f"validation {row['validation']:.2f}%  {row['seconds']:.0f} s"
                )

    def _tensorboard(self, first: int) -> contextlib.AbstractContextManager[Any]:
        """Return a writer that drops what a killed run wrote of the epochs from `first` on."""
        # TensorBoard imports TensorFlow where it finds it, unless this module exists.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.console.print("tensorboard is not installed: only log.csv is written")
            return contextlib.nullcontext()
        return SummaryWriter(str(self.output / "tensorboard"), purge_step=first)

    def epoch(self, epoch: int, show: Callable[[str], None]) -> dict[str, float]:
        started = time.monotonic()
        self.net.train()
        total_loss, right, seen = 0.0, 0, 0
        for step, (images, labels) in enumerate(self.batches.shuffled(self.recipe.seed, epoch)):
            rate = self.rate(epoch * self.batches.steps + step + 1)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            logits = self.net(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
            value = loss.item()
            if not math.isfinite(value):
                raise self.diverged(epoch, f"the loss became {value}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total_loss += value * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            seen += len(labels)
            show(f"epoch {epoch + 1} loss {total_loss / seen:.3f} top-1 {100 * right / seen:.1f}%")
        if not all(bool(t.isfinite().all()) for t in self.net.state_dict().values()):
            raise self.diverged(epoch, "weights are no longer finite")
        return {
            "loss": total_loss / seen,
            "train": 100 * right / seen,
            "validation": accuracy(self.net, self.val),
            "lr": rate,
            "seconds": time.monotonic() - started,
        }

    def diverged(self, epoch: int, how: str) -> GhostEdgeError:
        kept = f"{self.output} keeps the epochs before it; start" if epoch else "Start"
        return GhostEdgeError(
            f"The training diverged in epoch {epoch + 1}: {how}. {kept} anew with a lower --lr."
        )

    def keep(self, validation: float) -> None:
        """Write what a killed run continues from, last of all the state that counts the epoch."""
        tensors = {
            k: v.detach().cpu().contiguous().numpy() for k, v in self.net.state_dict().items()
        }
        self.card.accuracy = {"validation": {"top1": validation, "images": len(self.val.labels)}}
        self.card.training["epoch"] = len(self.history)
        self.card.training["seconds"] = round(sum(row["seconds"] for row in self.history))
        if validation > self.best:
            self.best = validation
            checkpoint.save(self.output / "best.safetensors", self.card, tensors)
        checkpoint.save(self.output / "last.safetensors", self.card, tensors)
        table = io.StringIO()
        rows = [{"epoch": i + 1, **row} for i, row in enumerate(self.history)]
        writer = csv.DictWriter(table, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(self.output / "log.csv") as temporary:
            temporary.write_text(table.getvalue())
        state = io.BytesIO()  # as torch's own errors of a full disk are no OSError
        torch.save(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "best": self.best,
            },
            state,
        )
        with atomic_file(self.output / "state.pt") as temporary:
            temporary.write_bytes(state.getbuffer())

    def restore(self, file: Path) -> None:
        mine = _identity(self.card)
        theirs = _identity(checkpoint.read(self.output / "last.safetensors")[0])
        for key in mine:
            if mine[key] != theirs.get(key):
                raise GhostEdgeError(
                    f"{self.output} was started with another {key}: {theirs.get(key)}, not "
                    f"{mine[key]}. Resume with the same flags and data, or name another --output."
                )
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history, self.best = state["history"], state["best"]
        except Exception as error:  # a damaged zip or pickle raises what it likes
            reason = str(error).partition("\n")[0]
            raise GhostEdgeError(
                f"{file} cannot be resumed from ({reason}). Start anew with another --output."
            ) from error


def _identity(card: checkpoint.Checkpoint) -> dict[str, Any]:
    """Return what a resumed run must have in common with the interrupted one."""
    return {
        "model": card.architecture,
        **card.arguments,
        "imgsz": card.pixels.size,
        "data": card.data,
        "labels": card.labels,
        **card.training.get("recipe", {}),
    }


def _finish(run: _Run, sets: Data, console: Console) -> Path:
    """Complete the best checkpoint: test accuracy, read once, and synthetic calibration images."""
    path = run.output / "best.safetensors"
    card, tensors = checkpoint.read(path)
    net = checkpoint.network(card, tensors, str(path))
    if sets.test is not None:
        images = sets.test.read(card.pixels.size)
        labels = match_classes(sets.test.classes, card.labels)[images.labels]
        test = Batches(images.pixels, labels, card.pixels, 500, torch.device("cpu"))
        card.accuracy["test"] = {"top1": accuracy(net, test), "images": len(images)}
    console.print("Synthesising calibration images from the BatchNorm statistics")
    tensors[checkpoint.CALIBRATION] = synthesize(net, card.pixels, seed=run.recipe.seed)
    checkpoint.save(path, card, tensors)
    for part, figures in card.accuracy.items():
        console.print(f"{part}: {figures['top1']:.2f}% of {figures['images']} images")
    return path
