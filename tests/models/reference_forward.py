"""GhostNetV3 in plain torch functions on the tensor names of the reference implementation.

Written from the published description alone and without ghostedge, so that it can contradict it:
the names and shapes of a state_dict, random tensors for them, and the forward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Table(NamedTuple):
    """Bottlenecks as (kernel, mid, out, squeeze-excitation ratio, stride), by stage."""

    stages: list[list[tuple[int, int, int, float, int]]]
    last: int


SMALL = Table(
    [
        [(3, 16, 16, 0, 1)],
        [(3, 32, 20, 0, 2)],
        [(3, 40, 20, 0, 1)],
        [(3, 48, 32, 0.25, 1)],
        [(3, 64, 32, 0.25, 1)],
        [(3, 80, 48, 0, 2), (3, 96, 48, 0, 1), (3, 120, 64, 0.25, 1)],
        [(3, 128, 80, 0.25, 1), (3, 160, 80, 0.25, 1)],
    ],
    160,
)
FULL = Table(
    [
        [(3, 16, 16, 0, 1)],
        [(3, 48, 24, 0, 2)],
        [(3, 72, 24, 0, 1)],
        [(5, 72, 40, 0.25, 2)],
        [(5, 120, 40, 0.25, 1)],
        [(3, 240, 80, 0, 2)],
        [
            (3, 200, 80, 0, 1),
            (3, 184, 80, 0, 1),
            (3, 184, 80, 0, 1),
            (3, 480, 112, 0.25, 1),
            (3, 672, 112, 0.25, 1),
        ],
        [(5, 672, 160, 0.25, 2)],
        [(5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)],
    ],
    960,
)


def c(value: float) -> int:
    """Round to a multiple of 4, never below 90% of the value."""
    rounded = max(4, 4 * math.floor(value / 4 + 0.5))
    return rounded if rounded >= 0.9 * value else rounded + 4


def shapes(
    table: Table, width: float, classes: int, branches: int = 3, bn: str = "bn"
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name; `bn` is what a branch calls its BatchNorm."""
    found: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = (channels,)
        found[f"{name}.num_batches_tracked"] = ()

    def branched(name: str, cin: int, cout: int, kernel: int, groups: int, skip: bool) -> None:
        for branch in range(branches):
            found[f"{name}_rpr_conv.{branch}.conv.weight"] = (cout, cin // groups, kernel, kernel)
            norm(f"{name}_rpr_conv.{branch}.{bn}", cout)
        if kernel > 1:
            found[f"{name}_rpr_scale.conv.weight"] = (cout, cin // groups, 1, 1)
            norm(f"{name}_rpr_scale.{bn}", cout)
        if skip:
            norm(f"{name}_rpr_skip", cin)

    def ghost(name: str, cin: int, cout: int) -> None:
        half = math.ceil(cout / 2)
        branched(f"{name}.primary", cin, half, 1, 1, skip=cin == half)
        branched(f"{name}.cheap", half, half, 3, half, skip=True)

    def pairs(name: str, weights: list[tuple[int, ...]]) -> None:
        for index, weight in enumerate(weights):
            found[f"{name}.{2 * index}.weight"] = weight
            norm(f"{name}.{2 * index + 1}", weight[0])

    cin = c(16 * width)
    found["conv_stem.weight"] = (cin, 3, 3, 3)
    norm("bn1", cin)
    number = 0
    for stage, rows in enumerate(table.stages):
        for index, (kernel, mid, out, ratio, stride) in enumerate(rows):
            block = f"blocks.{stage}.{index}"
            mid, out, number = c(mid * width), c(out * width), number + 1
            ghost(f"{block}.ghost1", cin, mid)
            if number > 2:
                gate: list[tuple[int, ...]] = [(mid, cin, 1, 1), (mid, 1, 1, 5), (mid, 1, 5, 1)]
                pairs(f"{block}.ghost1.short_conv", gate)
            if stride == 2:
                branched(f"{block}.dw", mid, mid, kernel, mid, skip=False)
            if ratio:
                hidden = c(mid * ratio)
                for name, to, of in (("reduce", hidden, mid), ("expand", mid, hidden)):
                    found[f"{block}.se.conv_{name}.weight"] = (to, of, 1, 1)
                    found[f"{block}.se.conv_{name}.bias"] = (to,)
            ghost(f"{block}.ghost2", mid, out)
            if cin != out or stride == 2:
                pairs(f"{block}.shortcut", [(cin, 1, kernel, kernel), (out, cin, 1, 1)])
            cin = out
    last = c(table.last * width)
    found[f"blocks.{len(table.stages)}.0.conv.weight"] = (last, cin, 1, 1)
    norm(f"blocks.{len(table.stages)}.0.bn1", last)
    found |= {"conv_head.weight": (1280, last, 1, 1), "conv_head.bias": (1280,)}
    found |= {"classifier.weight": (classes, 1280), "classifier.bias": (classes,)}
    return found


def random_state(named: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random float32 tensors of these shapes, BatchNorm statistics included."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in named.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = 0.5 + torch.rand(shape, generator=random)
        elif len(shape) == 1:
            state[name] = 0.2 * torch.randn(shape, generator=random)
        else:
            fan = math.prod(shape[1:])
            state[name] = torch.randn(shape, generator=random) / math.sqrt(fan)
    return state


def forward(
    state: dict[str, Tensor], x: Tensor, table: Table, stem_stride: int = 1, bn: str = "bn"
) -> Tensor:
    """Return the logits of a state_dict in eval mode, in the precision of its tensors."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, gain, offset = (
            state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gain + offset

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, groups=groups)

    def branched(name: str, x: Tensor, stride: int = 1) -> Tensor:
        total = torch.zeros(())
        index = 0
        while (branch := f"{name}_rpr_conv.{index}") + ".conv.weight" in state:
            total = total + norm(f"{branch}.{bn}", conv(f"{branch}.conv", x, stride))
            index += 1
        if f"{name}_rpr_scale.conv.weight" in state:
            scaled = conv(f"{name}_rpr_scale.conv", x, stride)
            total = total + norm(f"{name}_rpr_scale.{bn}", scaled)
        if f"{name}_rpr_skip.weight" in state:
            total = total + norm(f"{name}_rpr_skip", x)
        return total

    def ghost(name: str, x: Tensor, relu: bool) -> Tensor:
        primary = branched(f"{name}.primary", x)
        primary = F.relu(primary) if relu else primary
        cheap = branched(f"{name}.cheap", primary)
        return torch.cat([primary, F.relu(cheap) if relu else cheap], 1)

    def gate(name: str, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height >= 2 and width >= 2:
            x = F.avg_pool2d(x, 2)
        for index in (0, 2, 4):
            x = norm(f"{name}.{index + 1}", conv(f"{name}.{index}", x))
        # Nearest: output row y shows input row floor(y * input height / output height).
        rows = torch.arange(height) * x.shape[2] // height
        columns = torch.arange(width) * x.shape[3] // width
        return torch.sigmoid(x)[:, :, rows][:, :, :, columns]

    def squeeze_excite(name: str, x: Tensor) -> Tensor:
        weights = F.relu(conv(f"{name}.conv_reduce", x.mean((2, 3), keepdim=True)))
        return x * ((conv(f"{name}.conv_expand", weights) + 3).clamp(0, 6) / 6)

    x = F.relu(norm("bn1", conv("conv_stem", x, stem_stride)))
    for stage, rows in enumerate(table.stages):
        for index, (_, _, _, ratio, stride) in enumerate(rows):
            block = f"blocks.{stage}.{index}"
            y = ghost(f"{block}.ghost1", x, relu=True)
            if stage > 1:
                y = y * gate(f"{block}.ghost1.short_conv", x)
            if stride == 2:
                y = branched(f"{block}.dw", y, stride=2)
            if ratio:
                y = squeeze_excite(f"{block}.se", y)
            y = ghost(f"{block}.ghost2", y, relu=False)
            if f"{block}.shortcut.0.weight" in state:
                x = norm(f"{block}.shortcut.1", conv(f"{block}.shortcut.0", x, stride))
                x = norm(f"{block}.shortcut.3", conv(f"{block}.shortcut.2", x))
            x = y + x
    last = f"blocks.{len(table.stages)}.0"
    x = F.relu(norm(f"{last}.bn1", conv(f"{last}.conv", x))).mean((2, 3), keepdim=True)
    x = F.relu(conv("conv_head", x)).flatten(1)
    return x @ state["classifier.weight"].T + state["classifier.bias"]
