"""What several families share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ghostedge.models.reparam import RepConv


def channels(value: float, divisor: int = 4) -> int:
    """Round to a multiple of `divisor`, never below 90% of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def kaiming(net: nn.Module) -> None:
    """Give the convs of a net that ends in ReLUs their first weights (1502.01852)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class BranchedConv(RepConv):
    """A conv whose training form has the scale and skip branches it can have: from two branches on, or
    `always`."""

    def __init__(
        self, cin: int, cout: int, side: int, branches: int, always: bool = False, **arguments: Any
    ) -> None:
        extra = always or branches > 1
        skip = extra and cin == cout and arguments.get("stride", 1) == 1
        kernel = (side, side)
        super().__init__(
            cin, cout, kernel, branches=branches, scale=extra and side > 1, skip=skip, **arguments
        )


class SqueezeExcite(nn.Module):
    """Channel weights from the global average (1709.01507), with a hard sigmoid."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.expand = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(weights)
