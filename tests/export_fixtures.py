"""A small network trained for seconds on drawn figures, and its exports, shared by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostedge import checkpoint
from ghostedge.convert import Bundle, export
from ghostedge.training import Recipe, train

WIDTH = 0.25
EVERYTHING: dict[str, Any] = {
    "int8": True,
    "half": True,
    "camera": 96,
    "data": "drawn",
    "max_drop": 5.0,
}
"""Options of `bundle`."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the four drawn figures, 32 pixels, with its synthetic images."""
    output = tmp_path_factory.mktemp("run")
    recipe = Recipe(epochs=12, batch=20, lr=0.05, label_smoothing=0.0, flip="none", validation=0.25)
    return train("drawn", output, model=f"ghostnetv3-small-{WIDTH}x", recipe=recipe)


@pytest.fixture(scope="session")
def bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Everything that an export can hold, calibrated and checked on the drawn set."""
    output = tmp_path_factory.mktemp("export") / "bundle"
    return export(trained, output, **EVERYTHING)


@pytest.fixture(scope="session")
def int8_bundle(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The int8 model alone, int8 at its ends too, as the recipe microcontroller makes it."""
    output = tmp_path_factory.mktemp("int8") / "bundle"
    return export(trained, output, recipe="microcontroller")


def hostile(file: Path, output: Path) -> Path:
    """Write a checkpoint's equal in float that plain int8 cannot hold, and return its path.

    The channels before and after the head are scaled over three decades.
    """
    card, tensors = checkpoint.read(file)
    generator = np.random.default_rng(0)
    counts = tensors["head.weight"].shape[1::-1]
    last, head = ((10 ** generator.uniform(-1.5, 1.5, n)).astype(np.float32) for n in counts)
    tensors["last.bn.weight"] *= last
    tensors["last.bn.bias"] *= last
    tensors["head.weight"] *= head[:, None, None, None] / last[None, :, None, None]
    tensors["head.bias"] *= head
    tensors["classifier.weight"] /= head
    checkpoint.save(output, card, tensors)
    return output
