"""Pictures of accuracy against int8 cost, one a target, of checkpoints trained alike.

    python benchmarks/targets/plots.py FOLDER CHECKPOINT...

Writes FOLDER/<target>.png. Checkpoints of one network are its seeds: the point is their mean, the bar
goes from the lowest to the highest. All must have been measured on the same images.
"""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from ghostedge import checkpoint
from ghostedge.errors import GhostEdgeError
from ghostedge.targets import TARGETS, costs_of


class Point(NamedTuple):
    """A network: its top-1 in percent, one a seed."""

    name: str
    top1: list[float]


def points(files: Sequence[Path], part: str = "test") -> tuple[list[Point], str]:
    """Return the networks of checkpoints, and what they were measured on."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    measured = set()
    for file in files:
        card, _ = checkpoint.read(file)
        if part not in card.accuracy:
            raise GhostEdgeError(f"{file} records no accuracy on {part} images.")
        found[card.name].append(card.accuracy[part]["top1"])
        images = card.accuracy[part]["images"]
        measured.add((card.data["name"], card.data["fingerprint"], images))
    if len(measured) > 1:
        raise GhostEdgeError("The checkpoints were measured on different images.")
    ((name, _, images),) = measured
    return [Point(*item) for item in sorted(found.items())], f"{images:,} {part} images of {name}"


def family(name: str) -> str:
    """Return what a network's sizes have in common: a line joins them."""
    return re.sub(r"(-x?\d+(\.\d+)?x?|\d+)$", "", name)


def draw(target: str, nets: Sequence[Point], measured: str, output: Path) -> None:
    """Draw one target; networks without a cost there are left out."""
    costs, unit, _ = costs_of(target, 32)
    shown = [net for net in nets if net.name in costs]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    families = sorted({family(net.name) for net in shown})
    for name, marker in zip(families, "osD^vP*X<>" * len(families), strict=False):
        mine = sorted(
            (net for net in shown if family(net.name) == name), key=lambda n: costs[n.name]
        )
        means = [sum(net.top1) / len(net.top1) for net in mine]
        below = [mean - min(net.top1) for mean, net in zip(means, mine, strict=True)]
        above = [max(net.top1) - mean for mean, net in zip(means, mine, strict=True)]
        places = [costs[net.name] for net in mine]
        axes.errorbar(places, means, (below, above), marker=marker, capsize=3, label=name)
        for place, mean, net in zip(places, means, mine, strict=True):
            size = net.name.removeprefix(name).strip("-") or net.name
            axes.annotate(size, (place, mean), (4, -11), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set_xlabel(f"int8, {unit}: {TARGETS[target].source}", fontsize=9)
    seeds = sorted({len(net.top1) for net in shown})
    axes.set_ylabel(f"top-1 %, {measured}")
    axes.set_title(f"{target}: {' or '.join(map(str, seeds))} seed(s) a network, lowest to highest")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(output / f"{target}.png", dpi=120)
    plt.close(figure)


def main(folder: str, *files: str) -> None:
    nets, measured = points([Path(file) for file in files])
    Path(folder).mkdir(parents=True, exist_ok=True)
    for target in TARGETS:
        draw(target, nets, measured, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
