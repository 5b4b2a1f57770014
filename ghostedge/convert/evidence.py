"""The images that an export calibrates on and is judged by, and where each set comes from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostedge.convert.plan import Plan
from ghostedge.data.sources import Source, match_classes, open_data, split
from ghostedge.errors import GhostEdgeError
from ghostedge.evaluate import paired
from ghostedge.pixels import span

if TYPE_CHECKING:
    from ghostedge.convert.subject import Subject

FEW_COPIES = 0.05
"""Share of calibration images that may be evaluation images too: they are left out."""
OTHER_SCALE = 6
"""How many times wider or narrower than in training the span of the pixels may be. Night pictures of a
net for daylight stay below 4; pixels saved as 0..31, 0..15 or 0..1 give 8, 17 and 255."""
INVERTED = 10
"""Points of top-1 that inverting the images may gain."""
LIMITED = (16, 235)
"""Lowest and highest pixel of video levels."""
TRIED = 200
QAT_IMAGES = 10_000
"""Most images of an epoch of quantization-aware training: a CPU core does some 100 a second."""


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
    training: np.ndarray | None = None
    """For quantization-aware training, where the plan asks for it."""


def gather(plan: Plan, subject: Subject) -> Evidence:
    """Read or make the images that the plan asks for.

    With data, calibration images come from its training part, stratified by class, and validation
    images from the split that the checkpoint records; where the data is not what the checkpoint was
    trained on, from the data's own validation part or a new split, and its pixels are checked
    (`check_pixels`). No evaluation image is calibrated on. Without data, both are synthetic.
    """
    if plan.int8 and plan.data is None and subject.synthesize is None:
        raise GhostEdgeError(
            f"{subject.name} has no BatchNorm to make calibration images from. Give real ones: --data DIR"
        )
    synthetic = subject.images(plan.seed)
    sets = {"synthetic": ImageSet(synthetic)}
    card: dict[str, Any]
    if plan.data is None:
        card = {"kind": "synthetic", "images": len(synthetic), "sha256": _digest(synthetic)}
        return Evidence(synthetic, card, sets)
    data = open_data(plan.data, plan.download)
    names, size = subject.name_classes(data.classes), subject.pixels.size
    train, rest, origin = _parts(data.train, data.val, subject, plan)
    card = {"kind": "real", "data": data.name, "validation": origin}
    skipped = 0
    parts = {"validation": rest, "test": (data.test, None)}
    for name, (source, within) in parts.items():
        if source is None:
            continue
        chosen = sample(source, within, plan.check_samples, plan.seed)
        images = source.read(size, chosen)
        if not len(images):
            raise GhostEdgeError(
                f"{source.name} leaves no image for {name}: give every class at least two, or a val/ "
                "folder."
            )
        labels = match_classes(source.classes, names)[images.labels]
        sets[name] = ImageSet(images.pixels, labels)
        skipped += len(images.skipped)
    source, within = train
    chosen = sample(source, within, plan.calib_samples, plan.seed)
    chosen, left_out = _without_copies(source, chosen, parts)
    images = source.read(size, chosen)
    if subject.data.get("fingerprint") != source.fingerprint:
        labels = match_classes(source.classes, names)[images.labels]
        trained_on = subject.data.get("pixels") or span(synthetic)
        given = ImageSet(images.pixels, labels)
        check_pixels(source.name, given, trained_on, subject.reference)
    files = "\n".join(source.names[i] for i in images.indices)
    card["images"] = len(images)
    card["copies_left_out"] = left_out
    card["names_sha256"] = hashlib.sha256(files.encode(errors="surrogateescape")).hexdigest()
    card["sha256"] = _digest(images.pixels)
    skipped += len(images.skipped)
    training = None
    if plan.qat:
        chosen = sample(source, within, QAT_IMAGES, plan.seed + 1)
        chosen, _ = _without_copies(source, chosen, parts)
        training = source.read(size, chosen).pixels
        card["training_sha256"] = _digest(training)
    return Evidence(images.pixels, card, sets, skipped, training)


def _without_copies(
    source: Source, chosen: np.ndarray, parts: dict[str, tuple[Source | None, np.ndarray | None]]
) -> tuple[np.ndarray, int]:
    """Return the chosen images without those that are in an evaluation part too, and how many were.

    Raises GhostEdgeError when they are more than FEW_COPIES: then the parts are no parts.
    """
    copied: set[int] = set()
    for name, (other, within) in parts.items():
        if other is None:
            continue
        pairs = source.copies(chosen, other, np.arange(len(other)) if within is None else within)
        copied.update(index for index, _ in pairs)
        if len(copied) > FEW_COPIES * len(chosen):
            first, match = pairs[0]
            raise GhostEdgeError(
                f"{len(pairs)} of {len(chosen)} calibration images of {source.name} are {name} images "
                f"too ({source.names[first]} is {other.names[match]} of {other.name}), so that figures "
                "on these would prove nothing: remove the copies from one of the two."
            )
    return np.array([i for i in chosen if i not in copied], np.int64), len(copied)


def check_pixels(
    name: str,
    images: ImageSet,
    trained_on: Sequence[int],
    predict: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Raise GhostEdgeError for images whose pixels are on another scale than the net was trained on.

    `trained_on` is the `span` of the training images' pixels, of synthetic ones where a checkpoint does
    not record it. Three rules, each far from what dark, bright or grey pictures do:
    the images' span is OTHER_SCALE times wider or narrower; the lowest and the highest pixel are 16 and
    235, where training went beyond both; or the net names INVERTED points more of the labels when it
    gets the negatives, the interval of a paired comparison considered.
    """
    low, high = span(images.pixels)
    ranges = (
        f"The pixels of the calibration images of {name} go from {low} to {high} (99% of them), those "
        f"of the images that the net was trained on from {trained_on[0]} to {trained_on[1]}"
    )
    ratio = max(high - low, 1) / max(trained_on[1] - trained_on[0], 1)
    if not 1 / OTHER_SCALE <= ratio <= OTHER_SCALE:
        raise GhostEdgeError(f"{ranges}: save them on the same scale.")
    ends = int(images.pixels.min()), int(images.pixels.max())
    if ends == LIMITED and trained_on[0] < LIMITED[0] and trained_on[1] > LIMITED[1]:
        raise GhostEdgeError(
            f"{ranges}, and none of them is below 16 or above 235: these are video levels; "
            "stretch them to 0 to 255."
        )
    assert images.labels is not None
    tried = slice(None, None, max(1, len(images.pixels) // TRIED))
    some, labels = images.pixels[tried], images.labels[tried]
    right, negatives = (predict(p).argmax(1) == labels for p in (some, 255 - some))
    gain, interval = paired(negatives, right)
    if gain - interval > INVERTED:
        raise GhostEdgeError(
            f"{ranges}, and the net names {100 * right.mean():.0f}% of {len(some)} of them, but "
            f"{100 * negatives.mean():.0f}% of their negatives: they are inverted; invert them back."
        )


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
            "this is not known to be the data that it was trained on"
        )
    kept, held_out = split(train, fraction, seed)
    return (train, kept), (train, held_out), origin


def sample(source: Source, within: np.ndarray | None, count: int, seed: int) -> np.ndarray:
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
