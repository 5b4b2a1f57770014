"""MobileNetV2 (1801.04381) and MobileNetV3-Small (1905.02244) with strides for small images.

Of the published nets' five strides the first two are left out, so that 32 pixels end as 4, not 1.
There is no dropout. Parameters are those of the published nets.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import SqueezeExcite, channels, kaiming
from ghostedge.models.reparam import RepConv


class Row(NamedTuple):
    """One block at width 1.0."""

    kernel: int
    mid: int
    out: int
    se: bool
    hardswish: bool
    stride: int


class Spec(NamedTuple):
    """A network at width 1.0."""

    stem: int
    rows: tuple[Row, ...]
    last: int | None
    """Width of the last conv, which never shrinks; None for six times that of the last block."""
    head: int | None
    """Width of a layer between pooling and classifier."""


def _v2() -> tuple[Row, ...]:
    rows, cin = [], 32
    for expansion, out, blocks, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            rows.append(Row(3, cin * expansion, out, False, False, 1 if block else stride))
            cin = out
    return tuple(rows)


V2 = Spec(32, _v2(), last=1280, head=None)
V3_SMALL = Spec(
    16,
    (
        Row(3, 16, 16, True, False, 1),
        Row(3, 72, 24, False, False, 2),
        Row(3, 88, 24, False, False, 1),
        Row(5, 96, 40, True, True, 2),
        Row(5, 240, 40, True, True, 1),
        Row(5, 240, 40, True, True, 1),
        Row(5, 120, 48, True, True, 1),
        Row(5, 144, 48, True, True, 1),
        Row(5, 288, 96, True, True, 2),
        Row(5, 576, 96, True, True, 1),
        Row(5, 576, 96, True, True, 1),
    ),
    last=None,
    head=1024,
)

scaled = partial(channels, divisor=8)


class Inverted(nn.Module):
    """Expand by a 1x1 conv, depthwise conv, squeeze-excite, project, and add where shapes allow."""

    def __init__(
        self, cin: int, mid: int, cout: int, row: Row, act: type[nn.Module], branches: int
    ) -> None:
        super().__init__()
        self.expand = None if mid == cin else RepConv(cin, mid, branches=branches)
        kernel = (row.kernel, row.kernel)
        self.dw = RepConv(mid, mid, kernel, row.stride, groups=mid, branches=branches)
        self.se = SqueezeExcite(mid, scaled(mid / 4)) if row.se else nn.Identity()
        self.project = RepConv(mid, cout, branches=branches)
        self.act = act()
        self.add = cin == cout and row.stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.act(self.expand(x))
        y = self.project(self.se(self.act(self.dw(y))))
        return y + x if self.add else y


class MobileNet(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        spec: `V2` or `V3_SMALL`.
        width: width multiplier; channels are multiples of 8.
        branches: parallel branches of each conv in training form.
    """

    def __init__(
        self, spec: Spec, num_classes: int = 10, width: float = 1.0, branches: int = 1
    ) -> None:
        super().__init__()
        v2 = spec.head is None
        relu = nn.ReLU6 if v2 else nn.ReLU
        self.act: nn.Module = nn.ReLU6() if v2 else nn.Hardswish()
        cin = scaled(spec.stem * width)
        self.stem = RepConv(3, cin, (3, 3), branches=branches)
        blocks, before = [], spec.stem
        for row in spec.rows:
            # V2 expands what it has; V3 lists the widths.
            mid = row.mid // before * cin if v2 else scaled(row.mid * width)
            cout = scaled(row.out * width)
            act = nn.Hardswish if row.hardswish else relu
            blocks.append(Inverted(cin, mid, cout, row, act, branches))
            cin, before = cout, row.out
        self.blocks = nn.Sequential(*blocks)
        last = scaled(spec.last * max(1.0, width)) if spec.last else cin * 6
        self.last = RepConv(cin, last, branches=branches)
        self.head = None
        if spec.head is not None:
            self.head = nn.Linear(last, last := scaled(spec.head * width))
        self.classifier = nn.Linear(last, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.last(self.blocks(self.act(self.stem(x)))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.head is not None:
            x = self.act(self.head(x))
        return self.classifier(x)
