from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from ghostedge.data.drawn import drawn_source
from tests.deploy.web_fixtures import NPM
from tests.export_fixtures import bundle, int8_bundle, trained

# Here, so that all files of a session share one training and one export.
__all__ = ["bundle", "int8_bundle", "trained"]


# The longest files, so that none of them is begun last by one of two workers.
FIRST = (
    "test_export",
    "test_study",
    "test_engine",
    "test_repair",
    "test_arm64",
    "test_packaging",
    "test_other_python",
    "test_mediapipe",
    "test_foreign_nets",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other on a busy machine take ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test finds what another session, or the user, left in the cache."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "ghostedge").mkdir()
    (cache / "ghostedge/npm").symlink_to(NPM)  # but for what takes a network
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def drawn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of four drawn classes: 24 PNGs a class in train/, 12 in test/, 32 pixels."""
    root = tmp_path_factory.mktemp("drawn")
    for seed, (part, per_class) in enumerate({"train": 24, "test": 12}.items()):
        source = drawn_source(4, per_class, seed)
        for name, pixels in zip(source.names, source.read(32).pixels, strict=True):
            file = root / part / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return root
