"""The passes for what nets of other families have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ghostedge.convert.rewrites import rewrite
from ghostedge.convert.rewrites.padded_max_pool import padded_max_pool
from tests.convert.test_rewrites import Builder, check

POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("before", ["Relu", "Clip", "Neg", "x"])
def test_padded_max_pool(size: tuple[int, int], before: str) -> None:
    """Values are negative, too, where no Relu is before it: then zeros would be wrong."""
    builder = Builder((2, 3, *size))
    limits = [builder.constant(np.float32(v)) for v in (0, 6)] if before == "Clip" else []
    x = "x" if before == "x" else builder.node(before, "x", *limits)
    model = builder.model(builder.node("MaxPool", x, **POOL))
    found = check(model, padded_max_pool, 1)
    assert found["Pad"] == found["MaxPool"] == 1
    after = rewrite(model, [padded_max_pool])
    modes = [a.s for node in after.graph.node for a in node.attribute if a.name == "mode"]
    assert modes == [b"constant" if before in ("Relu", "Clip") else b"edge"]
    assert not any(a.name == "pads" for node in after.graph.node for a in node.attribute)


@pytest.mark.parametrize(
    "changed",
    [
        {"pads": [0, 0, 0, 0]},
        {"ceil_mode": 1},
        {"dilations": [2, 2]},
        {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]},  # below, the sign is unknown
    ],
)
def test_another_max_pool_stays(changed: dict[str, Any]) -> None:
    builder = Builder((2, 3, 8, 8))
    check(builder.model(builder.node("MaxPool", "x", **{**POOL, **changed})), padded_max_pool, 0)


def test_a_wide_padding_behind_relu() -> None:
    builder = Builder((1, 3, 8, 8))
    wide = {"kernel_shape": [5, 5], "pads": [2, 1, 2, 2]}
    x = builder.node("Relu", "x")
    check(builder.model(builder.node("MaxPool", x, **wide)), padded_max_pool, 1)
