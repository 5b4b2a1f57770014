"""What a training starts from: a new network, or a checkpoint's."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostedge import checkpoint
from ghostedge.data.sources import match_classes
from ghostedge.errors import GhostEdgeError
from ghostedge.files import printable, sha256
from ghostedge.models import architecture, create, parse_name
from ghostedge.models.teachers import imagenet_name, imagenet_weights
from ghostedge.pixels import IMAGENET, PixelContract
from ghostedge.training.objective import head

DEFAULT = "ghostnetv3-small-1.0x"
"""The network where none is named."""


def subject(
    classes: Sequence[str],
    model: str | None = None,
    imgsz: int | None = None,
    branches: int = 1,
    post_norm: bool = False,
    from_: str | None = None,
    pretrained: bool = False,
    freeze: str = "none",
) -> tuple[checkpoint.Checkpoint, nn.Module]:
    """Return what is known of a network to be trained, and the network; arguments as of `train`.

    freeze: what of it will be frozen, as a recipe has it.

    Raises GhostEdgeError for what cannot be built, or cannot be started from.
    """
    labels = list(classes)
    if from_ is not None:
        if branches != 1 or post_norm or pretrained:
            raise GhostEdgeError(
                "A checkpoint to start from has its form and its weights: leave out branches, post_norm "
                "and pretrained."
            )
        start, tensors = checkpoint.read(from_)
        if model is not None and model not in (start.name, start.architecture):
            raise GhostEdgeError(f"{from_} holds {start.name}, not {model}: leave out --model.")
        pixels = start.pixels
        if imgsz is not None:
            pixels = dataclasses.replace(pixels, size=imgsz)
        arguments = {**start.arguments, "num_classes": len(labels)}
        net = create(start.architecture, **arguments)
        known = sorted(start.labels) == sorted(labels)
        if known:
            order = match_classes(labels, start.labels)
            for name in _of_head(net):
                if len(tensors.get(name, ())) == len(order):
                    tensors[name] = tensors[name][order]
        if adopt(net, tensors, with_head=known):
            raise GhostEdgeError(f"The tensors of {from_} do not fit {start.name}.")
        card = checkpoint.Checkpoint(start.architecture, arguments, labels, pixels)
        file = checkpoint.find(from_)
        card.training["from"] = {"file": printable(file.name), "sha256": sha256(file)}
        return card, net
    name, arguments, net = new_net(model or DEFAULT, len(labels), branches, post_norm)
    size = 32 if imgsz is None else imgsz
    card = checkpoint.Checkpoint(name, arguments, labels, PixelContract(size))
    if pretrained:
        card.pixels = PixelContract.of_unit(size, *IMAGENET)
        card.training["from"] = "torchvision's ImageNet weights"
        anew = adopt(net, imagenet_weights(name), with_head=False)
        if anew and freeze == "backbone":
            layers = dict.fromkeys(tensor.rpartition(".")[0] for tensor in anew)
            raise GhostEdgeError(
                f"ImageNet's weights have no {', '.join(layers)} that fits {name} for small images, and "
                "frozen these would stay random: leave out freeze."
            )
    return card, net


def new_net(
    model: str, classes: int, branches: int = 1, post_norm: bool = False
) -> tuple[str, dict[str, Any], nn.Module]:
    """Return the architecture, the arguments and the network, in training form, of a name.

    Raises GhostEdgeError, as `create` does, for what cannot be built.
    """
    name, width = parse_name(model)
    arguments: dict[str, Any] = {"num_classes": classes}
    if architecture(name).widths:
        arguments["width"] = width
    if _takes(name, "branches"):
        arguments["branches"] = branches
    elif branches != 1:
        raise GhostEdgeError(f"{name} has no parallel branches to train with: leave out branches.")
    if post_norm:
        if branches < 2:
            raise GhostEdgeError("post_norm is of a sum of branches: ask for two branches or more.")
        arguments["post_norm"] = True
    return name, arguments, create(name, **arguments)


def require_buildable(
    model: str, branches: int = 1, post_norm: bool = False, pretrained: bool = False
) -> str:
    """Return the architecture of a network that can be built and started so; raises as `new_net`."""
    with torch.device("meta"):
        name, _, _ = new_net(model, 2, branches, post_norm)
    if pretrained:
        imagenet_name(name)
    return name


def possible_form(model: str, branches: int, post_norm: bool) -> dict[str, Any]:
    """Return what a network can have of a training form, for `train`; raises as `parse_name`."""
    return {
        "branches": branches if _takes(model, "branches") else 1,
        "post_norm": post_norm and _takes(model, "post_norm"),
    }


def _takes(model: str, argument: str) -> bool:
    return argument in inspect.signature(architecture(model).build).parameters


def adopt(net: nn.Module, tensors: dict[str, np.ndarray], with_head: bool) -> list[str]:
    """Take over every tensor that fits; return the names, but the head's, that had none."""
    own = net.state_dict()
    made = () if with_head else _of_head(net)
    taken = {}
    for name, tensor in tensors.items():
        if name not in own or name in made:
            continue
        shape = own[name].shape
        # A file holds a norm's counter, which has no dimension, as a list of one.
        if tensor.shape in (shape, shape or (1,)):
            taken[name] = torch.from_numpy(tensor).reshape(shape)
    net.load_state_dict(taken, strict=False)
    return [name for name in own if name not in taken and name not in made]


def _of_head(net: nn.Module) -> tuple[str, str]:
    name = head(net)[0]
    return f"{name}.weight", f"{name}.bias"
