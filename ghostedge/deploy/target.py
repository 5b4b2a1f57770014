"""What a target is made of: each has a file in this package, and its templates in `deploy/NAME/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLEAR = 0.1
"""Margin of the best class, in probability, that no other kernels turn."""


@dataclasses.dataclass(frozen=True)
class Need:
    """An artefact of the bundle that a target copies.

    path: where it goes, inside the output. made_by: the flags of `ghostedge export` that make it;
    {camera} in them stands for a fitting frame size. dtype: of its input, None where any will do;
    because: why that one.
    """

    artefact: str
    path: str
    made_by: str
    dtype: str | None = None
    because: str = ""


@dataclasses.dataclass(frozen=True)
class Handover:
    """An intact bundle on its way to a target.

    golden: "images", uint8 (N, size, size, 3), all synthetic, and under "ARTEFACT:KERNELS" each
    model's raw outputs for them, (N, classes).
    """

    bundle: Path
    manifest: dict[str, Any]
    golden: dict[str, np.ndarray]

    @property
    def labels(self) -> list[str]:
        return list(self.manifest["labels"])

    @property
    def size(self) -> int:
        """Height and width of the model's images."""
        return int(self.manifest["pixels"]["size"])

    def clearest(self, artefact: str, kernels: str, count: int) -> np.ndarray:
        """Return which `count` golden images to show, int64: those with a clear best class come first."""
        scores = self.golden[f"{artefact}:{kernels}"].astype(np.int64)
        best, second = np.sort(scores, axis=1)[:, :-3:-1].T
        margins = (best - second) * self.manifest["artefacts"][artefact]["output"]["scale"]
        return np.argsort(margins < CLEAR, kind="stable")[:count]


Filled = tuple[dict[str, Any], dict[str, bytes]]
"""More names for the templates, and more files by their path inside the output."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a model goes. summary: one line for `ghostedge deploy --list`.

    fill: computes what templates cannot, and raises GhostEdgeError for a bundle that would not work.
    """

    summary: str
    needs: tuple[Need, ...]
    fill: Callable[[Handover], Filled]


def templates(target: str) -> Path:
    """Return the folder of a target's templates (`deploy/` in the source tree)."""
    here = Path(__file__).parent
    return next(
        f for f in (here / "templates" / target, here.parents[1] / "deploy" / target) if f.is_dir()
    )
