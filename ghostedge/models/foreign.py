"""Checkpoints of other GhostNetV3 implementations, turned into ours by their key layout.

Three are known: the reference code of GhostNetV3-Small (arXiv 2509.12380), the official GhostNetV3
code (2404.11202) and timm's `ghostnetv3_*`. All three name their tensors alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ghostedge.bundle import unnamed
from ghostedge.checkpoint import Checkpoint
from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.models import create
from ghostedge.models.ghostnetv3 import FULL, SMALL, STEM, Spec
from ghostedge.models.layers import channels
from ghostedge.pixels import IMAGENET, PixelContract


class Reading(NamedTuple):
    """How the nets of one implementation read an image: mean and std in 0-1, size in pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int


SOURCES = {
    "reference": Reading((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    "official": Reading(*IMAGENET, 224),
    "timm": Reading(*IMAGENET, 224),
}

# fmt: off
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)
# fmt: on

_NAMES = [
    (r"^stem\.conv\b", "conv_stem"),
    (r"^stem\.bn\b", "bn1"),
    (r"^last\.conv\b", "blocks.{last}.0.conv"),
    (r"^last\.bn\b", "blocks.{last}.0.bn1"),
    (r"^head\b", "conv_head"),
    (r"^stages\b", "blocks"),
    (r"\.se\.(reduce|expand)\b", r".se.conv_\1"),
    (r"\.expand\b", ".ghost1"),
    (r"\.project\b", ".ghost2"),
    (r"\.gate\.mix\.conv\b", ".short_conv.0"),
    (r"\.gate\.mix\.bn\b", ".short_conv.1"),
    (r"\.gate\.row\.conv\b", ".short_conv.2"),
    (r"\.gate\.row\.bn\b", ".short_conv.3"),
    (r"\.gate\.column\.conv\b", ".short_conv.4"),
    (r"\.gate\.column\.bn\b", ".short_conv.5"),
    (r"\.shortcut\.1\.conv\b", ".shortcut.2"),
    (r"\.shortcut\.1\.bn\b", ".shortcut.3"),
    (r"\.shortcut\.0\.conv\b", ".shortcut.0"),
    (r"\.shortcut\.0\.bn\b", ".shortcut.1"),
    (r"\.(primary|cheap|dw)\.conv\b", r".\1_rpr_conv.{branch}.conv"),
    (r"\.(primary|cheap|dw)\.bn\b", r".\1_rpr_conv.{branch}.{bn}"),
    (r"\.(cheap|dw)\.scale_conv\b", r".\1_rpr_scale.conv"),
    (r"\.(cheap|dw)\.scale_bn\b", r".\1_rpr_scale.{bn}"),
    (r"\.(primary|cheap)\.skip_bn\b", r".\1_rpr_skip"),
]
"""Every part of a name of ours, and what the others call it; applied in this order."""

_BRANCH = re.compile(r"blocks\.(\d+)\.\d+\.ghost1\.primary_rpr_conv\.(\d+)\.conv\.weight")
_REPORTED = 10


def import_checkpoint(
    file: Path,
    *,
    source: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: list[str] | None = None,
    size: int | None = None,
) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    """Turn a foreign state_dict (.pth, .pt or .safetensors) into a checkpoint and its tensors.

    Architecture, width, classes and branches follow from the names and shapes. Nothing in the file
    is executed.

    Args:
        file: a state_dict, plain or under `state_dict`, `model` or `model_state_dict`.
        source: whose network it is: `reference`, `official` or `timm`. Decides the pixel contract
            and the stride of the stem, which no shape tells. By default timm's where the names are
            timm's, official where a full GhostNetV3 has 1000 classes, otherwise reference.
        mean, std: per channel, for pixels in 0-1 as torchvision has them; by default the source's.
        labels: names of the classes, in order; by default CIFAR-10's for a reference net of 10.
        size: image size in pixels; by default the source's (32 or 224).

    Raises GhostEdgeError for a file that cannot be read without running code or that holds a value
    that is not finite, and with the names of all tensors that are missing, unknown or misshapen.
    """
    state = _load(file)
    found = [match.groups() for key in state if (match := _BRANCH.fullmatch(key))]
    if not found:
        raise GhostEdgeError(
            f"{file} is not a GhostNetV3 state_dict in training form: no tensor in it is called "
            "blocks.*.ghost1.primary_rpr_conv.*. Save the state_dict() of a GhostNetV3 (not V1 or "
            "V2) before it is re-parameterized."
        )
    small = max(int(stage) for stage, _ in found) < len(SMALL.stages)
    spec = SMALL if small else FULL
    bn = "bn1" if any(re.search(r"_rpr_(conv\.\d+|scale)\.bn1\.", key) for key in state) else "bn"
    head = state.get("classifier.weight")
    classes = head.shape[0] if head is not None and head.dim() else 1

    if source is None:
        official = "official" if classes == 1000 else "reference"
        source = "timm" if bn == "bn1" else "reference" if small else official
    if source not in SOURCES:
        raise GhostEdgeError(
            f"There is no source {source!r}.{nearest(source, SOURCES)} "
            f"The known ones are {', '.join(SOURCES)}."
        )
    if small and source != "reference":
        raise GhostEdgeError(
            f"{file} is a GhostNetV3-Small, which only the reference code has, not {source}: "
            "leave the source out, and give mean, std and size if they differ."
        )
    layout = "ghostnetv3-small" if small else "ghostnetv3"
    architecture = layout if source == "reference" else "ghostnetv3-imagenet"
    arguments = {
        "num_classes": classes,
        "width": _width(state, spec),
        "branches": len({branch for _, branch in found}),
    }
    tensors = _place(file, state, architecture, arguments, bn, len(spec.stages))
    if classes < 2:
        raise GhostEdgeError(
            f"{file} gives a single score: a classifier has one for each of two classes or more."
        )
    checkpoint = Checkpoint(
        architecture,
        arguments,
        _labels(labels, classes, source),
        _pixels(mean, std, size, SOURCES[source]),
        source=f"{source} {layout} state_dict",
    )
    return checkpoint, tensors


def _load(file: Path) -> dict[str, Tensor]:
    """Return the state_dict in a file, without the names that DataParallel puts in front."""
    if not file.is_file():
        raise GhostEdgeError(f"There is no file {file}.")
    stored: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of old pickle protocols, just before they fail.
            if file.suffix == ".safetensors":
                stored = load_file(file)
            else:
                stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make torch's unpickler fail in any way at all.
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise GhostEdgeError(
                f"{file} was refused, because reading it would run code ({called[1]}). If you "
                "trust it, load it where it was made and save only the network's state_dict()."
            ) from error
        raise GhostEdgeError(
            f"{file} is not a .pth, .pt or .safetensors file, or only a part of one "
            f"({type(error).__name__}). Download it again, or save it again."
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(wrapper), dict):
            stored = stored[wrapper]
    if not isinstance(stored, dict):
        stored = {type(stored).__name__: None}
    if other := [str(key) for key, value in stored.items() if not isinstance(value, Tensor)]:
        raise GhostEdgeError(
            f"{file} holds more than tensors by name ({', '.join(other[:_REPORTED])}). "
            "Save only the network's state_dict()."
        )
    return {str(key).removeprefix("module."): tensor for key, tensor in stored.items()}


def _width(state: dict[str, Tensor], spec: Spec) -> float:
    """Return the roundest width multiplier that fits the channel counts, or fits most of them."""
    first = "primary_rpr_conv.0.conv.weight"
    named = [
        ("conv_stem.weight", STEM, 1),
        (f"blocks.{len(spec.stages)}.0.conv.weight", spec.last, 1),
    ]
    for stage, rows in enumerate(spec.stages):
        for index, row in enumerate(rows):
            block = f"blocks.{stage}.{index}"
            named += [
                (f"{block}.ghost1.{first}", row.mid, 2),
                (f"{block}.ghost2.{first}", row.out, 2),
            ]
    seen = {(c, n * state[k].shape[0]) for k, c, n in named if k in state and state[k].dim()}
    widths = (n / steps for steps in (10, 20, 100, 1000) for n in range(steps // 10, 8 * steps + 1))
    return min(widths, key=lambda width: sum(channels(width * c) != n for c, n in seen))


def _labels(labels: list[str] | None, classes: int, source: str) -> list[str]:
    if labels is None:
        known = source == "reference" and classes == len(CIFAR10)
        return list(CIFAR10) if known else unnamed(classes)
    if len(labels) != classes:
        raise GhostEdgeError(
            f"{len(labels)} labels were given for a network of {classes} classes: "
            "give one for each class, in the order of its outputs."
        )
    return list(labels)


def _pixels(
    mean: Sequence[float] | None, std: Sequence[float] | None, size: int | None, own: Reading
) -> PixelContract:
    mean = own.mean if mean is None else mean
    std = own.std if std is None else std
    return PixelContract.of_unit(own.size if size is None else size, mean, std)


def _place(
    file: Path,
    state: dict[str, Tensor],
    architecture: str,
    arguments: dict[str, Any],
    bn: str,
    last: int,
) -> dict[str, np.ndarray]:
    """Return our tensors, each made of the tensors of its branches, or report what does not fit."""
    with torch.device("meta"):
        net = create(architecture, **arguments)
    tensors, known, problems = {}, set(), []
    for name, mine in net.state_dict().items():
        theirs = _names(name, arguments["branches"], bn, last)
        known.update(theirs)
        if name.endswith(".num_batches_tracked"):
            # Not every file has them, and a BatchNorm with a momentum never reads them.
            tensors[name] = np.zeros((), np.int64)
            continue
        shape = (mine.shape[0] // len(theirs), *mine.shape[1:])
        wrong = [f"{key} is missing" for key in theirs if key not in state]
        wrong += [
            f"{key} is {str(state[key].dtype).removeprefix('torch.')} {tuple(state[key].shape)} "
            f"and not float {shape}"
            for key in theirs
            if key in state and not (state[key].shape == shape and state[key].is_floating_point())
        ]
        problems += wrong
        if not wrong:
            # The channels of a RepConv's branches are interleaved: channel * branches + branch.
            branches = torch.stack([state[key].detach().float() for key in theirs], 1)
            tensors[name] = branches.flatten(0, 1).numpy()
            if not np.isfinite(tensors[name]).all():
                raise GhostEdgeError(
                    f"{file}: {' or '.join(theirs)} holds NaN or infinity. The training diverged; "
                    "take an earlier checkpoint."
                )
    # A profiler (thop) left its counters in some of the published files.
    counters = ("total_ops", "total_params")
    problems += [
        f"{key} is unknown" for key in state if key not in known and not key.endswith(counters)
    ]
    if problems:
        more = f", and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
        raise GhostEdgeError(
            f"{file} does not fit {architecture}-{arguments['width']}x, the nearest network: "
            f"{', '.join(problems[:_REPORTED])}{more}. Save the whole state_dict() of an unchanged "
            "network in training form."
        )
    return tensors


def _names(name: str, branches: int, bn: str, last: int) -> list[str]:
    """Return the foreign names of one tensor of ours: one a branch where it holds all branches."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    count = branches if "{branch}" in name else 1
    return [name.format(branch=branch, bn=bn, last=last) for branch in range(count)]
