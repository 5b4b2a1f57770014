"""The networks, by name."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ghostedge.checkpoint import MOST_BRANCHES
from ghostedge.errors import GhostEdgeError, nearest
from ghostedge.models.densestride import INVERTED, RESIDUAL, DenseStride
from ghostedge.models.ghostnetv3 import FULL, SMALL, GhostNetV3
from ghostedge.models.mobilenet import V2, V3_SMALL, MobileNet
from ghostedge.models.mobileone import MobileOne
from ghostedge.models.reparam import fold
from ghostedge.models.resnet import ResNet
from ghostedge.models.shufflenet import X05, X10, ShuffleNetV2
from ghostedge.models.teachers import NETS, Airbench

__all__ = [
    "ARCHITECTURES",
    "NETWORKS",
    "TEACHERS",
    "Architecture",
    "Profile",
    "architecture",
    "create",
    "fold",
    "parse_name",
    "profile",
    "sizes",
]


class Architecture(NamedTuple):
    """A family of networks: how to build one, what it is, and the widths people know it by."""

    build: Callable[..., nn.Module]
    summary: str
    widths: tuple[float, ...] = ()
    """Empty where the network has no width multiplier."""


ARCHITECTURES = {
    "ghostnetv3-small": Architecture(
        partial(GhostNetV3, SMALL),
        "GhostNetV3-Small (arXiv 2509.12380), for 32x32 images",
        (0.5, 1.0, 1.3, 1.6, 1.9, 2.2, 2.8, 3.4),
    ),
    "ghostnetv3": Architecture(
        partial(GhostNetV3, FULL),
        "GhostNetV3 (arXiv 2404.11202) with a stride-1 stem, for small images",
        (1.0,),
    ),
    "ghostnetv3-imagenet": Architecture(
        partial(GhostNetV3, FULL, stem_stride=2),
        "GhostNetV3 (arXiv 2404.11202) as published for ImageNet",
        (0.5, 1.0, 1.3, 1.6),
    ),
    "densestride": Architecture(
        partial(DenseStride, INVERTED),
        "DenseStride, for small images: cheap with int8 dot products and without",
        (0.25, 0.5, 0.75, 1.0, 1.25),
    ),
    "densestride-res": Architecture(
        partial(DenseStride, RESIDUAL),
        "DenseStride of dense residual blocks, which pay at higher cost",
        (1.0, 1.25, 1.5, 2.0),
    ),
    **{
        f"resnet{depth}": Architecture(
            partial(ResNet, depth), f"ResNet-{depth} (1512.03385) for 32x32 images, 16 to 64 wide"
        )
        for depth in (8, 14, 20, 32)
    },
    "mobilenetv2": Architecture(
        partial(MobileNet, V2), "MobileNetV2 (1801.04381) for small images", (0.35, 0.5, 1.0)
    ),
    "mobilenetv3-small": Architecture(
        partial(MobileNet, V3_SMALL), "MobileNetV3-Small (1905.02244) for small images", (0.5, 1.0)
    ),
    "shufflenetv2-x0.5": Architecture(
        partial(ShuffleNetV2, X05), "ShuffleNetV2 x0.5 (1807.11164) for small images"
    ),
    "shufflenetv2-x1.0": Architecture(
        partial(ShuffleNetV2, X10), "ShuffleNetV2 x1.0 (1807.11164) for small images"
    ),
    "mobileone-s0": Architecture(
        MobileOne, "MobileOne-S0 (2206.04040) for small images", (0.25, 0.5, 1.0)
    ),
}

TEACHERS = {
    "airbench": Architecture(Airbench, "six wide convolutions after airbench94", (1.0,)),
    **{name: Architecture(build, summary) for name, (build, summary) in NETS.items()},
}
"""Large networks to learn from. They train and are kept like the others, but nothing folds them."""

NETWORKS = ChainMap(TEACHERS, ARCHITECTURES)
"""All of them, `ARCHITECTURES` first."""


def sizes() -> Iterator[tuple[str, str, float | None]]:
    """Yield (name, architecture, width) of all in `ARCHITECTURES`; None for one without widths."""
    for name, entry in ARCHITECTURES.items():
        for width in entry.widths or (None,):
            yield name if width is None else f"{name}-{width}x", name, width


def architecture(name: str) -> Architecture:
    """Return the entry of a family in `ARCHITECTURES` or `TEACHERS`; raises as `parse_name`."""
    return NETWORKS[parse_name(name)[0]]


def parse_name(name: str) -> tuple[str, float]:
    """Split `ghostnetv3-small-1.0x` into an architecture and a width (1.0 where none is named).

    Raises GhostEdgeError, naming the near ones, for an unknown architecture or a bad width.
    """
    match = re.fullmatch(r"(?P<architecture>.+?)(?:-(?P<width>\d+(?:\.\d+)?)x)?", name)
    architecture = match["architecture"] if match else name
    if match is None or architecture not in NETWORKS:
        known = {*NETWORKS, *(full for full, *_ in sizes())}
        raise GhostEdgeError(
            f"There is no network called {name!r}.{nearest(name, known)} "
            "`ghostedge list` shows all; any width can follow, as in ghostnetv3-small-1.7x."
        )
    if match["width"] and not NETWORKS[architecture].widths:
        raise GhostEdgeError(f"{architecture} has one width only: name it without one.")
    return architecture, float(match["width"] or 1.0)


def create(architecture: str, **arguments: Any) -> nn.Module:
    """Build a network in training form. `arguments` are those of its class (see the family's file).

    The net maps normalised float32 images (batch, 3, height, width) to logits (batch, classes).
    Raises GhostEdgeError for an unknown name, a width outside 0.1 to 8 or unknown arguments.
    """
    if architecture not in NETWORKS:
        name, width = parse_name(architecture)
        raise GhostEdgeError(f"The width of {architecture} is an argument: {name}, width={width}.")
    if not 1 <= arguments.get("branches", 1) <= MOST_BRANCHES:
        raise GhostEdgeError(
            f"A conv has 1 to {MOST_BRANCHES} branches, not {arguments['branches']}."
        )
    width = arguments.get("width", 1.0)
    if not 0.1 <= width <= 8:
        raise GhostEdgeError(f"A width multiplier of {width} is outside 0.1 to 8.")
    try:
        return NETWORKS[architecture].build(**arguments)
    # As torch and the nets refuse what a file may say; out of memory is a RuntimeError of its own.
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise GhostEdgeError(
            f"The network {architecture} cannot be built with {arguments}: {error}."
        ) from error


class Profile(NamedTuple):
    """What a network costs, whatever runs it."""

    training_parameters: int
    deployed_parameters: int
    macs: int
    """Multiply-accumulates of convolutions, linear layers and attention, deployed form, one image."""


def profile(net: nn.Module, size: int) -> Profile:
    """Count a training-form network's parameters, and its MACs on one `size` x `size` image."""
    deployed = fold(net).eval()
    macs = 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, torch.Tensor)
        macs += output.numel() * module.weight[0].numel()

    def count_attention(module: nn.Module, _: Any, output: tuple[torch.Tensor, Any]) -> None:
        nonlocal macs
        tokens, dim = output[0].shape[1:]  # four projections, then scores and their mean of values
        macs += 4 * tokens * dim**2 + 2 * tokens**2 * dim

    for module in deployed.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
        elif isinstance(module, nn.MultiheadAttention):  # which does not call its linear layers
            module.register_forward_hook(count_attention)
    with torch.inference_mode():
        deployed(torch.zeros(1, 3, size, size, device=next(deployed.parameters()).device))

    def parameters(of: nn.Module) -> int:
        return sum(p.numel() for p in of.parameters())

    return Profile(parameters(net), parameters(deployed), macs)
