"""ShuffleNetV2 (1807.11164) with a stem for small images: stride 1, no max-pooling.

The published widths follow no multiplier, so that each is a network of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import kaiming
from ghostedge.models.reparam import RepConv

STEM, BLOCKS = 24, (4, 8, 4)
X05, X10 = (48, 96, 192, 1024), (116, 232, 464, 1024)
"""Widths of the three stages and of the last conv."""


class Half(nn.Module):
    """1x1, depthwise 3x3 and 1x1 conv, on a half of the channels, or on all of them at stride 2."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.expand = RepConv(cin, cout)
        self.dw = RepConv(cout, cout, (3, 3), stride, groups=cout)
        self.project = RepConv(cout, cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(self.dw(F.relu(self.expand(x)))))


class Unit(nn.Module):
    """Two halves, concatenated and shuffled; where nothing strides one half stays as it is."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        half = cout // 2
        strides = cin != cout
        self.body = Half(cin if strides else half, half, 2 if strides else 1)
        self.dw = RepConv(cin, cin, (3, 3), 2, groups=cin) if strides else None
        self.project = RepConv(cin, half) if strides else None

    def forward(self, x: Tensor) -> Tensor:
        if self.dw is not None and self.project is not None:
            kept, used = F.relu(self.project(self.dw(x))), x
        else:
            kept, used = x.chunk(2, 1)
        y = torch.cat([kept, self.body(used)], 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        widths: `X05` or `X10`.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int = 10) -> None:
        super().__init__()
        self.stem = RepConv(3, STEM, (3, 3))
        units, cin = [], STEM
        for cout, blocks in zip(widths, BLOCKS, strict=False):
            for _ in range(blocks):
                units.append(Unit(cin, cout))
                cin = cout
        self.units = nn.Sequential(*units)
        self.last = RepConv(cin, widths[-1])
        self.classifier = nn.Linear(widths[-1], num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(self.units(F.relu(self.stem(x)))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
