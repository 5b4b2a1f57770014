"""ResNets for small images (1512.03385), 16, 32 and 64 wide; ResNet-8 is MLPerf Tiny's (2106.07597).

Shortcuts that stride are 1x1 convs, as in MLPerf Tiny; the first paper's have no weights.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import kaiming
from ghostedge.models.reparam import RepConv


class Basic(nn.Module):
    """Two 3x3 convs and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first = RepConv(cin, cout, (3, 3), stride)
        self.second = RepConv(cout, cout, (3, 3))
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same else RepConv(cin, cout, (1, 1), stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        depth: 8, 14, 20, ...: three stages of (depth - 2) / 6 blocks.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = RepConv(3, 16, (3, 3))
        blocks, cin = [], 16
        for cout in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(Basic(cin, cout, 1 if cin == cout else 2))
                cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(cin, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
