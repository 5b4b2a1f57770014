"""The comparison of every stage with the unfolded PyTorch net, and the limits it must stay in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ghostedge.convert.evidence import ImageSet
from ghostedge.convert.plan import Limits
from ghostedge.errors import CheckFailed
from ghostedge.evaluate import accuracy, paired

TOLERANCE = {"fp32": 1e-3, "fp16": 0.2}
"""Largest difference of log-probabilities that a float stage may show, for probabilities above
FLOOR. Trained nets stay below 1e-4 and 0.05; a wrong pixel, padding or layout gives 1 and more."""
FLOOR = 1e-3
FLOAT_AGREEMENT = {"fp32": 0.999, "fp16": 0.98}
"""Share of images on which a float stage must name the same class: near ties may turn."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """One stage against the unfolded net, on one set of images."""

    images: int
    agreement: float
    """Share of images with the same top-1."""
    log_difference: float
    """Largest difference of log-probability where either probability is above FLOOR."""
    difference: float
    """Largest difference of probability."""
    top1: float | None = None
    """Accuracy in percent, where the images have labels."""
    drop: float | None = None
    """Points of top-1 lost against the unfolded net."""
    drop_interval: float | None = None
    """Half width of the drop's paired 95% interval."""


@dataclasses.dataclass
class Stage:
    """One form that the network passes through on its way to a device."""

    name: str
    precision: str
    """"fp32", "fp16", "int8" where all is computed in integers, else "mixed"."""
    parity: dict[str, Parity]
    """By set of images: "synthetic", "validation", "test"."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compare(reference: np.ndarray, found: np.ndarray, images: ImageSet) -> Parity:
    """Compare probabilities (images, classes) with those of the unfolded net."""
    apart = np.abs(found - reference)
    logs = np.abs(np.log(np.maximum(found, FLOOR)) - np.log(np.maximum(reference, FLOOR)))
    figures: dict[str, Any] = {}
    if images.labels is not None:
        right, before = (p.argmax(1) == images.labels for p in (found, reference))
        figures["top1"] = 100 * accuracy(found, images.labels)
        figures["drop"], figures["drop_interval"] = paired(before, right)
    return Parity(
        images=len(found),
        agreement=float((found.argmax(1) == reference.argmax(1)).mean()),
        log_difference=float(logs.max()),
        difference=float(apart.max()),
        **figures,
    )


def failure(stage: Stage, limits: Limits) -> str | None:
    """Return a sentence that names the stage where it is outside its limits, None inside.

    Float stages are held to the unfolded net's outputs on every set. Quantized ones are held to
    its accuracy on labelled validation images; where there are none, to its top-1 on synthetic ones.
    Test images are reported and never judged by.
    """
    for name, parity in stage.parity.items():
        if name == "test":
            continue
        where = f"The stage {stage.name} fails its check on {parity.images} {name} images"
        if stage.precision in TOLERANCE:
            allowed = TOLERANCE[stage.precision]
            if not parity.log_difference <= allowed:
                return (
                    f"{where}: its log-probabilities differ from the given net's by "
                    f"{parity.log_difference:.3g}, where {allowed:g} is allowed."
                )
            if parity.agreement < FLOAT_AGREEMENT[stage.precision]:
                return f"{where}: it names the same class on {parity.agreement:.2%} only."
        elif parity.drop is not None and parity.drop > limits.max_drop:
            return (
                f"{where}: it loses {parity.drop:.2f} points of top-1 (± {parity.drop_interval:.2f}), "
                f"where {limits.max_drop:g} is allowed."
            )
        elif "validation" not in stage.parity and parity.agreement < limits.min_agreement:
            return (
                f"{where}: it names the same class on {parity.agreement:.1%}, where "
                f"{limits.min_agreement:.0%} is demanded. Calibrate on real images: --data DIR"
            )
    return None


def judge(stage: Stage, limits: Limits) -> None:
    """Raise CheckFailed, naming the stage, when it is outside its limits."""
    found = failure(stage, limits)
    if found is not None:
        raise CheckFailed(found)
