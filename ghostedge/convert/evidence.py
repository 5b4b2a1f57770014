"""The images that an export calibrates on and is judged by, and where each set comes from."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostedge.convert.plan import Plan
from ghostedge.data.sources import Source, match_classes, open_data, split
from ghostedge.errors import GhostEdgeError

if TYPE_CHECKING:
    from ghostedge.convert.subject import Subject


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Raw pixels, uint8 (images, size, size, 3), and labels, int64 (images,), where there are any."""

    pixels: np.ndarray
    labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Calibration images, and the sets to check on: "synthetic", "validation", "test"."""

    calibration: np.ndarray
    calibration_card: dict[str, Any]
    sets: dict[str, ImageSet]
    skipped: int = 0


def gather(plan: Plan, subject: Subject) -> Evidence:
    """Read or make the images that the plan asks for.

    With data, calibration images come from its training part, stratified by class, and validation
    images from the split that the checkpoint records; where the data is not what the checkpoint was
    trained on, from the data's own validation part or a new split. Without, both are synthetic.
    """
    if plan.int8 and plan.data is None and subject.synthesize is None:
        raise GhostEdgeError(
            f"{subject.name} has no BatchNorm to make calibration images from. Give real ones: --data DIR"
        )
    synthetic = subject.images(plan.seed)
    sets = {"synthetic": ImageSet(synthetic)}
    card: dict[str, Any]
    if plan.data is None:
        subject.name_classes(None)
        card = {"kind": "synthetic", "images": len(synthetic), "sha256": _digest(synthetic)}
        return Evidence(synthetic, card, sets)
    data = open_data(plan.data)
    names, size = subject.name_classes(data.classes), subject.pixels.size
    train, rest, origin = _parts(data.train, data.val, subject, plan)
    card = {"kind": "real", "data": data.name, "validation": origin}
    skipped = 0
    for name, part in (("validation", rest), ("test", (data.test, None))):
        source, within = part
        if source is None:
            continue
        chosen = _sample(source, within, plan.check_samples, plan.seed)
        images = source.read(size, chosen)
        labels = match_classes(source.classes, names)[images.labels]
        sets[name] = ImageSet(images.pixels, labels)
        skipped += len(images.skipped)
    source, within = train
    chosen = _sample(source, within, plan.calib_samples, plan.seed)
    images = source.read(size, chosen)
    files = "\n".join(source.names[i] for i in images.indices)
    card["images"] = len(images)
    card["names_sha256"] = hashlib.sha256(files.encode(errors="surrogateescape")).hexdigest()
    card["sha256"] = _digest(images.pixels)
    return Evidence(images.pixels, card, sets, skipped + len(images.skipped))


Part = tuple[Source, "np.ndarray | None"]
"""A source and the indices into it that belong to the part, None for all."""


def _parts(
    train: Source | None, val: Source | None, subject: Subject, plan: Plan
) -> tuple[Part, Part, str]:
    if train is None:
        raise GhostEdgeError(
            f"{plan.data} has no training images to calibrate on: put them into {plan.data}/train."
        )
    match_classes(train.classes, subject.labels or ())
    if val is not None:
        return (train, None), (val, None), "the data's own validation part"
    recorded = subject.data.get("validation")
    if recorded and subject.data.get("fingerprint") == train.fingerprint:
        fraction, seed = recorded["fraction"], recorded["seed"]
        origin = f"the split the checkpoint was chosen on ({fraction:g} of train, seed {seed})"
    else:
        fraction, seed = 0.1, plan.seed
        origin = (
            f"a new split ({fraction:g} of train, seed {seed}): "
            "this is not the data that the checkpoint records"
        )
    kept, held_out = split(train, fraction, seed)
    return (train, kept), (train, held_out), origin


def _sample(source: Source, within: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Return up to `count` sorted indices, the same share of each class, drawn with the seed."""
    pool = np.arange(len(source)) if within is None else within
    if count >= len(pool):
        return pool
    generator = np.random.default_rng(seed)
    order = generator.permutation(pool)
    labels = source.labels[order]
    # Rank within its class, then draw rank by rank: classes differ by one image at most.
    rank = np.empty(len(order), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
