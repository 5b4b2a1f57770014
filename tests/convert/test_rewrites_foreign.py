"""The passes for what nets of other families have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ghostedge.convert.rewrites import rewrite
from ghostedge.convert.rewrites.channel_shuffle import channel_shuffle
from ghostedge.convert.rewrites.padded_max_pool import padded_max_pool
from tests.convert.test_rewrites import Builder, check


def shuffle(
    builder: Builder, x: str, split: list[int], joined: list[int], perm: list[int]
) -> list[str]:
    first = builder.node("Reshape", x, builder.constant(np.array(split)))
    swap = builder.node("Transpose", first, perm=perm)
    last = builder.node("Reshape", swap, builder.constant(np.array(joined)))
    return [first, swap, last]


SWAP = [0, 2, 1, 3, 4]


@pytest.mark.parametrize(("channels", "groups"), [(12, 2), (12, 3), (8, 8), (6, 1)])
@pytest.mark.parametrize("batch", [2, 0, -1])
def test_channel_shuffle(channels: int, groups: int, batch: int) -> None:
    builder = Builder((2, channels, 5, 3))
    split = [batch, groups, channels // groups, 5, 3]
    *_, last = shuffle(builder, "x", split, [batch, channels, 5, 3], SWAP)
    found = check(builder.model(builder.node("Relu", last)), channel_shuffle, 1)
    assert found == {"Conv": 1, "Relu": 1}


@pytest.mark.parametrize(
    ("split", "joined", "perm"),
    [
        ([2, 2, 6, 5, 3], [2, 12, 5, 3], [0, 2, 1, 4, 3]),  # the image is turned too
        ([2, 2, 6, 5, 3], [2, 12, 3, 5], SWAP),  # it is cut into other rows
        ([2, 2, 6, 3, 5], [2, 12, 5, 3], SWAP),
        ([1, 4, 6, 5, 3], [2, 12, 5, 3], SWAP),  # the batch is in the groups
    ],
)
def test_another_reshape_stays(split: list[int], joined: list[int], perm: list[int]) -> None:
    builder = Builder((2, 12, 5, 3))
    check(builder.model(shuffle(builder, "x", split, joined, perm)[-1]), channel_shuffle, 0)


@pytest.mark.parametrize("between", [0, 1])
def test_a_shuffle_with_another_reader_stays(between: int) -> None:
    builder = Builder((2, 12, 5, 3))
    made = shuffle(builder, "x", [2, 2, 6, 5, 3], [2, 12, 5, 3], SWAP)
    other = builder.node("Neg", made[between])
    check(builder.model(made[-1], other), channel_shuffle, 0)


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
