from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ghostedge.errors import GhostEdgeError
from ghostedge.training.recipe import PAPER, Recipe, load


def test_the_default_the_papers_and_a_file(tmp_path: Path) -> None:
    assert load(None) == Recipe()
    assert load("paper") == PAPER
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 5\nlr = 1\nbalance = true\nschedule = 'linear'\n")
    assert load(str(file)) == Recipe(epochs=5, lr=1.0, balance=True, schedule="linear")


def test_settings_and_flags_go_over_a_recipe() -> None:
    found = load("paper", ["ema=0.99", "balance=true", "flip = none"], epochs=3, seed=None)
    expected = dataclasses.replace(PAPER, ema=0.99, balance=True, flip="none", epochs=3)
    assert found == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cutuot=1", "Did you mean cutout"),
        ("cutout", "sets nothing"),
        ("cutout=much", "cutout must be a number, which 'much' is not"),
        ("epochs=3.5", "epochs must be a whole number, which 3.5 is not"),
        ("epochs='3'", "epochs must be a whole number, which '3' is not"),
        ("epochs=true", "epochs must be a whole number, which True is not"),
        pytest.param(f"epochs={'9' * 5000}", "epochs must be a whole number", id="5000 digits"),
        pytest.param(f"lr={'9' * 400}", "lr must be a number", id="400 digits"),
        ("lr=", "lr must be a number, which '' is not"),
        ("balance=1", "balance must be true or false"),
        ("cutout=1", "cutout must be at least 0 and below 1"),
        ("ema=-0.1", "ema must be"),
        ("clip=-1", "clip must be at least 0"),
        ("mixup=inf", "mixup must be a finite number"),
        ("accumulate=0", "accumulate must be at least 1"),
        ("optimizer=adam", "optimizer must be sgd or adamw, not 'adam'"),
        ("freeze=all", "freeze must be none or norms or backbone"),
    ],
)
def test_a_setting_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(GhostEdgeError, match=message):
        load(None, [setting])


def test_a_file_has_numbers_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("epochs = '3'")
    with pytest.raises(GhostEdgeError, match="epochs must be a whole number, which '3' is not"):
        load(str(tmp_path / "mine.toml"))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match="no training recipe"):
        load("short")
    (tmp_path / "broken.toml").write_text("epochs=")
    with pytest.raises(GhostEdgeError, match="no training recipe"):
        load(str(tmp_path / "broken.toml"))


def test_small_sets_get_small_batches_and_rates() -> None:
    few, many = Recipe().resolved(180), Recipe().resolved(45_000)
    assert (few.batch, many.batch) == (16, 128)
    assert (few.lr, many.lr) == (pytest.approx(0.1 * 16 / 128), 0.1)
    assert Recipe(batch=64, lr=0.3).resolved(10) == Recipe(batch=10, lr=0.3)
    assert Recipe(optimizer="adamw").resolved(45_000).lr == 0.001
