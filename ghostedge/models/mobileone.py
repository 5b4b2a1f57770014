"""A net after MobileOne-S0 (2206.04040) for small images: depthwise and 1x1 convs that fold.

Deployed it is MobileNetV1's chain without a shortcut. Widths and blocks are S0's; the stem and the last
stage, which stride there, keep the size, so that 32 pixels end as 4.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import BranchedConv, channels, kaiming

STEM = 48
STAGES = ((48, 2, 2), (128, 8, 2), (256, 10, 2), (1024, 1, 1))
"""Width, blocks and stride of each stage at width 1.0."""


class Block(nn.Module):
    """A depthwise 3x3 and a 1x1 conv, both sums of branches in training form."""

    def __init__(self, cin: int, cout: int, stride: int, branches: int) -> None:
        super().__init__()
        self.dw = BranchedConv(cin, cin, 3, branches, True, stride=stride, groups=cin)
        self.project = BranchedConv(cin, cout, 1, branches, True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(F.relu(self.dw(x))))


class MobileOne(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        width: width multiplier; channels are multiples of 8.
        branches: parallel convs in training form, S0 has 4, larger ones 1; beside them are a scale and,
            where shapes allow, a skip branch, without which so deep a chain hardly learns.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0, branches: int = 4) -> None:
        super().__init__()
        cin = channels(STEM * width, 8)
        self.stem = BranchedConv(3, cin, 3, branches, True)
        blocks = []
        for out, count, stride in STAGES:
            for index in range(count):
                cout = channels(out * width, 8)
                blocks.append(Block(cin, cout, 1 if index else stride, branches))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(cin, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
