"""GhostNetV3 (arXiv 2404.11202) and GhostNetV3-Small (2509.12380), in training form.

The ghost module is GhostNet's (1911.11907), its gate GhostNetV2's (2211.12905).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import BranchedConv, SqueezeExcite, channels, kaiming
from ghostedge.models.reparam import RepConv


class Row(NamedTuple):
    """One bottleneck at width 1.0."""

    kernel: int
    mid: int
    out: int
    se: float
    stride: int


class Spec(NamedTuple):
    """A network at width 1.0: its bottlenecks by stage, and the width of its last 1x1 conv."""

    stages: tuple[tuple[Row, ...], ...]
    last: int


STEM, HEAD = 16, 1280

SMALL = Spec(
    stages=(
        (Row(3, 16, 16, 0, 1),),
        (Row(3, 32, 20, 0, 2),),
        (Row(3, 40, 20, 0, 1),),
        (Row(3, 48, 32, 0.25, 1),),
        (Row(3, 64, 32, 0.25, 1),),
        (Row(3, 80, 48, 0, 2), Row(3, 96, 48, 0, 1), Row(3, 120, 64, 0.25, 1)),
        (Row(3, 128, 80, 0.25, 1), Row(3, 160, 80, 0.25, 1)),
    ),
    last=160,
)

FULL = Spec(
    stages=(
        (Row(3, 16, 16, 0, 1),),
        (Row(3, 48, 24, 0, 2),),
        (Row(3, 72, 24, 0, 1),),
        (Row(5, 72, 40, 0.25, 2),),
        (Row(5, 120, 40, 0.25, 1),),
        (Row(3, 240, 80, 0, 2),),
        (
            Row(3, 200, 80, 0, 1),
            Row(3, 184, 80, 0, 1),
            Row(3, 184, 80, 0, 1),
            Row(3, 480, 112, 0.25, 1),
            Row(3, 672, 112, 0.25, 1),
        ),
        (Row(5, 672, 160, 0.25, 2),),
        (
            Row(5, 960, 160, 0, 1),
            Row(5, 960, 160, 0.25, 1),
            Row(5, 960, 160, 0, 1),
            Row(5, 960, 160, 0.25, 1),
        ),
    ),
    last=960,
)


class Gate(nn.Module):
    """Long-range attention: each position is weighted from a row and a column around it."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.mix = RepConv(cin, cout)
        self.row = RepConv(cout, cout, (1, 5), groups=cout)
        self.column = RepConv(cout, cout, (5, 1), groups=cout)

    def forward(self, x: Tensor) -> Tensor:
        height, width = int(x.shape[2]), int(x.shape[3])
        pooled = min(height, width) >= 2
        if pooled:
            x = F.avg_pool2d(x, 2)
        x = torch.sigmoid(self.column(self.row(self.mix(x))))
        if pooled and height % 2 == width % 2 == 0:
            # The same as below, but exported as a constant factor instead of a computed size.
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.interpolate(x, size=(height, width), mode="nearest")


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 conv, the other half by a cheap 3x3 depthwise conv of those.

    `cout` is even, as every width here is a multiple of 4, so nothing is cut off the concat.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        relu: bool,
        gate: bool = False,
        branches: int = 1,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        half = cout // 2
        self.primary = BranchedConv(cin, half, 1, branches, post_norm=post_norm)
        self.cheap = BranchedConv(half, half, 3, branches, groups=half, post_norm=post_norm)
        self.act = nn.ReLU() if relu else nn.Identity()
        self.gate = Gate(cin, cout) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        primary = self.act(self.primary(x))
        y = torch.cat([primary, self.act(self.cheap(primary))], 1)
        return y if self.gate is None else y * self.gate(x)


class Bottleneck(nn.Module):
    """Expand, optionally stride and squeeze-excite, project, and add the shortcut."""

    def __init__(
        self, cin: int, row: Row, width: float, gate: bool, branches: int, post_norm: bool
    ) -> None:
        super().__init__()
        mid, cout = channels(row.mid * width), channels(row.out * width)
        self.expand = GhostModule(cin, mid, True, gate, branches, post_norm)
        self.dw: nn.Module = nn.Identity()
        if row.stride > 1:
            self.dw = BranchedConv(
                mid, mid, row.kernel, branches, stride=row.stride, groups=mid, post_norm=post_norm
            )
        self.se = SqueezeExcite(mid, channels(mid * row.se)) if row.se else nn.Identity()
        self.project = GhostModule(mid, cout, False, False, branches, post_norm)
        self.shortcut: nn.Module = nn.Identity()
        if cin != cout or row.stride > 1:
            kernel = (row.kernel, row.kernel)
            self.shortcut = nn.Sequential(
                RepConv(cin, cin, kernel, row.stride, groups=cin), RepConv(cin, cout)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.dw(self.expand(x)))) + self.shortcut(x)


class GhostNetV3(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        spec: `SMALL` or `FULL`.
        width: width multiplier; every channel count but the head's 1280 goes through
            `channels(width * value)`.
        stem_stride: 1 for small images, 2 for ImageNet's.
        branches: parallel branches of the ghost modules and strided convs in training form. 1 means
            a single conv+BN each, without scale and skip branches: the same deployed net, trained
            faster.
        post_norm: one BatchNorm after the sum of the branches (see `RepConv`).
    """

    def __init__(
        self,
        spec: Spec,
        num_classes: int = 10,
        width: float = 1.0,
        stem_stride: int = 1,
        branches: int = 3,
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        post_norm = post_norm and branches > 1
        cin = channels(STEM * width)
        self.stem = RepConv(3, cin, (3, 3), stem_stride)
        stages, index = [], 0
        for rows in spec.stages:
            stage = []
            for row in rows:
                stage.append(Bottleneck(cin, row, width, index > 1, branches, post_norm))
                cin, index = channels(row.out * width), index + 1
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        last = channels(spec.last * width)
        self.last = RepConv(cin, last)
        self.head = nn.Conv2d(last, HEAD, 1)
        self.classifier = nn.Linear(HEAD, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.last(x)), 1)
        return self.classifier(F.relu(self.head(x)).flatten(1))
