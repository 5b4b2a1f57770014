"""What a run keeps: averaged weights, the files of its folder, and what it resumes from."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostedge import checkpoint
from ghostedge.errors import GhostEdgeError, in_a_line
from ghostedge.files import atomic_file, atomic_write
from ghostedge.training.recipe import Recipe

History = list[dict[str, float]]


class Average:
    """Exponential moving average of a net's weights and BatchNorm statistics, in `net`.

    The decay grows from 0.1 to `decay` as timm's does, (1 + step) / (10 + step), so that the random
    first weights are forgotten. With a decay of 0, `net` is the trained net itself.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(source).requires_grad_(False) if decay else source
        self._mine, self._theirs = _values(self.net), _values(source)

    def update(self, step: int) -> None:
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)


def _values(net: nn.Module) -> list[Tensor]:
    return [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]


KEPT = ("state.pt", "best.safetensors", "last.safetensors", "log.csv")
"""What a run cannot do without."""
CURVES = "curves.png"


class Folder:
    """The folder of a run: best and last .safetensors, log.csv, curves.png, and state.pt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state.pt"

    def require_unused(self) -> None:
        """Raise GhostEdgeError where there is a run, or what is left of one: a new one would overwrite it."""
        for name in (*KEPT, CURVES):
            if (self.path / name).exists():
                raise GhostEdgeError(
                    f"{self.path} holds a run already, or its {name}. Continue it with --resume, or name "
                    "another --output."
                )

    def clear(self) -> None:
        """Remove what a run has kept so far."""
        for name in KEPT:
            (self.path / name).unlink(missing_ok=True)

    def save_weights(self, name: str, card: checkpoint.Checkpoint, net: nn.Module) -> None:
        tensors = {k: v.detach().cpu().contiguous().numpy() for k, v in net.state_dict().items()}
        checkpoint.save(self.path / f"{name}.safetensors", card, tensors)

    def save_table(self, history: History) -> None:
        table = io.StringIO()
        rows = [{"epoch": i + 1, **row} for i, row in enumerate(history)]
        writer = csv.DictWriter(table, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path / "log.csv", table.getvalue())

    def save_state(self, identity: dict[str, Any], state: dict[str, Any]) -> None:
        """Write what a resumed run continues from; `identity` is what it must have in common."""
        content = io.BytesIO()  # as torch's own errors of a full disk are no OSError
        torch.save({**state, "identity": json.dumps(identity)}, content)
        atomic_write(self.state, content.getbuffer())

    def load_state(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Read the state; raises GhostEdgeError for a damaged one or one of another run."""
        try:
            state = torch.load(self.state, weights_only=True, map_location="cpu")
            # What a recipe did not have then is as it is by default.
            theirs = {**dataclasses.asdict(Recipe()), **json.loads(state["identity"])}
        except Exception as error:  # a damaged zip or pickle raises what it likes
            raise self.damaged(error) from error
        del state["identity"]
        ours = json.loads(json.dumps(identity))
        for key in {**ours, **theirs}:
            if theirs.get(key) != ours.get(key):
                raise GhostEdgeError(
                    f"{self.path} was started with another {key}: {theirs.get(key)}, not {ours.get(key)}. "
                    "Resume with the same flags and data, name another --output, or delete it to start anew."
                )
        return state

    def damaged(self, error: Exception) -> GhostEdgeError:
        return GhostEdgeError(
            f"{self.state} cannot be resumed from ({in_a_line(error)}). Start anew with another --output."
        )

    def draw_curves(self, history: History) -> bool:
        """Draw loss and accuracies by epoch; return False where matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        epochs = range(1, len(history) + 1)
        figure = Figure((9, 4), dpi=120, layout="constrained")
        losses, accuracies = figure.subplots(1, 2)
        losses.plot(epochs, [row["loss"] for row in history], ".-")
        losses.set_ylabel("loss on training batches")
        for part in ("train", "validation"):
            accuracies.plot(epochs, [row[part] for row in history], ".-", label=part)
        accuracies.set_ylabel("top-1, %")
        accuracies.legend()
        for axes in (losses, accuracies):
            axes.set_xlabel("epoch")
            axes.grid(alpha=0.3)
        with atomic_file(self.path / CURVES) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        return True
