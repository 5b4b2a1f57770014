"""DenseStride: nets for small images that are cheap on CPUs with int8 dot products and without.

They halve the image three times, in dense 3x3 convs, and compute after each in blocks of one of two kinds:
inverted bottlenecks (MobileNetV2, 1801.04381) or, in the larger nets, dense residual blocks (1512.03385).
What each choice costs, int8 at 32x32, as x86 time in parts of GhostNetV3-Small 1.0x and million
instructions on A72 / A76 (benchmarks/targets has the table, and all accuracies that were measured):

- Strides in dense convs, not in bottlenecks: 0.27, 3.18 / 1.25 against 0.31, 3.37 / 1.37. A bottleneck
  that strides expands at the larger size.
- Three halvings: wider blocks at 8x8 instead of those at 4x4 cost 0.36, 4.11 / 1.69. The stem has none of
  them; one that strides, and the cost put into 16x16, is dearer on x86 (0.37, 3.65 / 1.65).
- Expansion by 2, at 4x4 by 3, where it is nearly free, and depthwise 3x3 kernels. 5x5 at 8x8 and 4x4:
  0.32, 3.38 / 1.44.
- Squeeze-excitation at 4x4 only, where it costs little: 0.29, 3.21 / 1.27.
- Dense residual blocks from 18 MMACs on: 0.39, 5.68 / 1.84 for the validation accuracy that inverted ones
  have at 0.54, 6.29 / 2.39 (82.8% and 82.7% after 10 epochs). At half of that inverted ones are better:
  81.4% at 3.21 million instructions on the A72 against 80.7% at 3.66.
- No layer of 1280. No gate: at 4x4 80.9% after 10 epochs for 0.29, 3.17 / 1.30, with 10 kB more RAM, where
  this has 80.6% twice. No ghost module, which halves a 1x1 conv for a depthwise one: at 8x8 and 4x4 79.9%
  for 0.28, 2.91 / 1.26.
- Channels in eights: the int8 kernels compute eight (A53, A72) or sixteen (A76) at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.layers import BranchedConv, SqueezeExcite, kaiming


class Stage(NamedTuple):
    """A halving of the image and the blocks after it, at width 1.0."""

    out: int
    expansion: int
    """Of inverted bottlenecks; 0 for dense residual blocks."""
    blocks: int
    se: float = 0.0
    """Share of a block's channels in the hidden layer of squeeze-excitation; 0 for none."""


STEM, LAST = 16, 256
INVERTED = (Stage(32, 2, 1), Stage(64, 2, 2), Stage(96, 3, 1, 0.25))
RESIDUAL = (Stage(32, 0, 1), Stage(64, 0, 1), Stage(128, 0, 1))


def eights(value: float) -> int:
    """Return the nearest multiple of 8, which is what the int8 kernels compute at once."""
    return 8 * max(1, round(value / 8))


class Inverted(nn.Module):
    """Expand by a 1x1 conv, mix by a depthwise 3x3 one, squeeze-excite, project, add."""

    def __init__(self, width: int, stage: Stage, branches: int) -> None:
        super().__init__()
        mid = width * stage.expansion
        self.expand = BranchedConv(width, mid, 1, branches)
        self.dw = BranchedConv(mid, mid, 3, branches, groups=mid)
        hidden = eights(mid * stage.se)
        self.se = SqueezeExcite(mid, hidden) if stage.se else nn.Identity()
        self.project = BranchedConv(mid, width, 1, branches)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.se(F.relu(self.dw(F.relu(self.expand(x))))))


class Residual(nn.Module):
    """Two dense 3x3 convs, and add."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.first = BranchedConv(width, width, 3, branches)
        self.second = BranchedConv(width, width, 3, branches)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class DenseStride(nn.Module):
    """Logits (batch, num_classes) from normalised RGB images (batch, 3, height, width).

    Args:
        stages: `INVERTED` or `RESIDUAL`.
        width: multiplies channels, which are multiples of 8.
        branches: parallel branches of each conv in training form (see `BranchedConv`).
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_classes: int = 10,
        width: float = 1.0,
        branches: int = 1,
    ) -> None:
        super().__init__()
        cin = eights(STEM * width)
        self.stem = BranchedConv(3, cin, 3, branches)
        made = []
        for stage in stages:
            cout = eights(stage.out * width)
            layers: list[nn.Module] = [BranchedConv(cin, cout, 3, branches, stride=2), nn.ReLU()]
            for _ in range(stage.blocks):
                block = (
                    Inverted(cout, stage, branches) if stage.expansion else Residual(cout, branches)
                )
                layers.append(block)
            made.append(nn.Sequential(*layers))
            cin = cout
        self.stages = nn.Sequential(*made)
        last = eights(LAST * width)
        self.last = BranchedConv(cin, last, 1, branches)
        self.classifier = nn.Linear(last, num_classes)
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(self.stages(F.relu(self.stem(x)))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
