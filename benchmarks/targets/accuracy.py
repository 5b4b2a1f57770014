"""Accuracy against int8 cost of networks trained alike: tables of README.md, and pictures.

    python benchmarks/targets/accuracy.py [CHECKPOINT...]

adds what finished checkpoints record to accuracy.csv. Of every way of training that it holds (the default
recipe for so many epochs, with or without a teacher) it prints accuracies with costs, and how far
DenseStride stands before every other network on each target and before the plain conversion of the
paper's, where that is among them; of the one with most runs it draws <target>.png. Of several runs
of one network, its seeds, a figure is their mean, a bar goes from the lowest to the highest. Last it
compares the weights that ship in the same way.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from ghostedge import checkpoint, markdown
from ghostedge.errors import GhostEdgeError
from ghostedge.files import atomic_file
from ghostedge.targets import BASE, TARGETS, costs_of
from ghostedge.training import Recipe
from ghostedge.training.distillation import STRATEGIES

OURS = "densestride"
BENCHMARKS = Path(__file__).parents[1]
RUNS = Path(__file__).with_name("accuracy.csv")
GAIN, SHARE = 0.5, 0.6
"""The goal: so many points more at a peer's cost, or at its accuracy so much of its cost."""
BELOW = 20
"""Points below the best from where on a picture names a network and does not draw it."""
PAPER = {"desktop": 1 / 3, "pi5": 0.4, "pi4": 0.6}
"""The goal against the paper's network: so much of the cost of its plain conversion, at its accuracy."""

Costs = dict[str, dict[str, float]]
"""Of each network, by target."""
COSTS: Costs = {target: costs_of(target, 32)[0] for target in TARGETS}
COSTED = set.intersection(*(set(costs) for costs in COSTS.values()))


class Point(NamedTuple):
    """A network: its top-1 in percent, one a seed."""

    name: str
    top1: list[float]
    precision: str = ""

    @property
    def mean(self) -> float:
        return sum(self.top1) / len(self.top1)


class Run(NamedTuple):
    """A line of accuracy.csv. Those with one digit are of runs whose files are gone."""

    training: str
    network: str
    seed: str
    precision: str
    validation: str
    test: str
    images: str
    """What it was measured on: how many test images, and the start of the training images' hash."""


def run_of(file: str, card: checkpoint.Checkpoint) -> Run:
    """Return what a finished checkpoint records; raises GhostEdgeError where none could compare it."""
    if "recipe" not in card.training:
        raise GhostEdgeError(
            f"{file} was not trained by `ghostedge train`: its card has no recipe."
        )
    recipe = Recipe(**card.training["recipe"])
    alike = dataclasses.replace(recipe, seed=0, precision="auto", epochs=Recipe.epochs)
    taught = card.training.get("distillation") or {}
    usual = {}
    if taught:
        settings = STRATEGIES[taught["strategy"]].settings
        usual = dict(zip(("temperature", "alpha"), settings, strict=True))
    changed = (
        card.training.get("from"),
        card.arguments.get("branches", 1) > 1,
        card.pixels.size != 32,
        *(taught.get(key) not in (None, usual[key]) for key in usual),
    )
    if alike != Recipe().resolved(card.data["images"]) or any(changed):
        raise GhostEdgeError(
            f"{file} was not trained by the default recipe from scratch, single-branch, at 32 pixels."
        )
    if card.name not in COSTED:
        raise GhostEdgeError(f"What {card.name} costs is not known: benchmarks/targets/costs.py.")
    if "test" not in card.accuracy:
        raise GhostEdgeError(f"{file} is not finished: no test images were read.")
    training = f"{recipe.epochs} epochs"
    if taught:
        teachers = ", ".join(sorted(teacher["sha256"][:8] for teacher in taught["teachers"]))
        training += f", {taught['strategy']} by {teachers}"
    tops = (f"{card.accuracy[part]['top1']:.2f}" for part in ("validation", "test"))
    images = f"{card.accuracy['test']['images']} of {card.data['fingerprint'][:8]}"
    on_cpu = card.training["device"].startswith("cpu")
    precision = {"auto": "fp32" if on_cpu else "bf16"}.get(recipe.precision, recipe.precision)
    return Run(training, card.name, f"{recipe.seed}", precision, *tops, images)


def merged(known: Iterable[Run], new: Iterable[Run]) -> list[Run]:
    """Return all runs, a newer one in place of an older; raises GhostEdgeError for other images."""
    runs = {run[:4]: run for run in (*known, *new)}
    if len({run.images for run in runs.values()}) > 1:
        raise GhostEdgeError("The checkpoints were trained and measured on different images.")
    return sorted(runs.values())


def points(runs: Sequence[Run], part: str) -> list[Point]:
    """Return the networks of runs that were trained alike."""
    found: dict[str, list[Run]] = collections.defaultdict(list)
    for run in runs:
        found[run.network].append(run)
    return [
        Point(
            name,
            [float(getattr(run, part)) for run in mine],
            ", ".join(sorted({run.precision for run in mine})),
        )
        for name, mine in sorted(found.items())
    ]


def family(name: str) -> str:
    """Return what a network's sizes have in common: a line joins them."""
    return re.sub(r"(-x?\d+(\.\d+)?x?|\d+)$", "", name)


def draw(target: str, nets: Sequence[Point], training: str) -> None:
    """Draw one target; networks far below the best are named under it, lest they flatten the rest."""
    costs, unit, _ = costs_of(target, 32)
    floor = max(net.mean for net in nets) - BELOW
    shown = [net for net in nets if net.mean >= floor]
    below = [f"{net.name} {net.mean:.0f}%" for net in nets if net not in shown]
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    families = sorted({family(net.name) for net in shown})
    for name, marker in zip(families, "osD^vP*X<>" * len(families), strict=False):
        mine = sorted(
            (net for net in shown if family(net.name) == name), key=lambda n: costs[n.name]
        )
        means = [net.mean for net in mine]
        ends = [
            (net.mean - min(net.top1), max(net.top1) - net.mean)
            if len(net.top1) > 1
            else (math.nan, math.nan)  # one run has no interval
            for net in mine
        ]
        places = [costs[net.name] for net in mine]
        axes.errorbar(
            places, means, [*zip(*ends, strict=True)], marker=marker, capsize=3, label=name
        )
        for place, mean, net in zip(places, means, mine, strict=True):
            size = net.name.removeprefix(name).strip("-") or net.name
            # Ours run above the others: so do their sizes.
            over = name.startswith(OURS)
            beside = {"xytext": (-3, 6), "ha": "right"} if over else {"xytext": (3, -11)}
            axes.annotate(size, (place, mean), textcoords="offset points", fontsize=8, **beside)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    said = textwrap.fill(f"int8, {unit}: {TARGETS[target].source}", 62)
    if below:
        said += "\n" + textwrap.fill(f"not drawn: {', '.join(below)}", 62)
    axes.set_xlabel(said, fontsize=9)
    axes.margins(0.1)
    seeds = sorted({len(net.top1) for net in shown})
    axes.set_ylabel(f"test top-1 % before int8, {training}")
    axes.set_title(
        f"{target}: {' or '.join(map(str, seeds))} run(s) a network, lowest to highest",
        fontsize=10,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=9)
    with atomic_file(RUNS.with_name(f"{target}.png")) as temporary:
        figure.savefig(temporary, format="png", dpi=180, metadata={"Software": None})
    plt.close(figure)


def accuracies(nets: dict[str, Sequence[Point]], costs: Costs) -> str:
    """Return every network's mean accuracies, by part, and its costs, cheapest on a desktop first."""
    heads = ["network", "runs", "precision", *nets, *costs]
    rows = []
    groups = zip(*nets.values(), strict=True)
    for group in sorted(groups, key=lambda group: costs["desktop"][group[0].name]):
        name = group[0].name
        cells = [name, f"{len(group[0].top1)}", group[0].precision]
        cells += [f"{net.mean:.1f}" for net in group]
        cells += [f"{there[name]:.3g}" for there in costs.values()]
        rows.append(cells)
    return markdown.table(heads, rows)


def verdicts(nets: Sequence[Point], costs: Costs) -> str:
    """Return, for each other network and target, the points that the best of ours gains within its cost,
    and the share of its cost that the cheapest of ours as accurate takes; bold where the goal is missed.
    """
    ours = [net for net in nets if net.name.startswith(OURS)]
    heads = ["network", *costs]
    rows = []
    for peer in nets:
        if peer in ours:
            continue
        cells = [peer.name]
        for there in costs.values():
            limit = there[peer.name]
            gains = [net.mean - peer.mean for net in ours if there[net.name] <= limit]
            shares = [there[net.name] / limit for net in ours if net.mean >= peer.mean]
            gain, share = max(gains, default=-math.inf), min(shares, default=math.inf)
            cell = f"{gain:+.1f} / {share:.2f}".replace("-inf", "-").replace("inf", "-")
            cells.append(cell if gain >= GAIN or share <= SHARE else f"**{cell}**")
        rows.append(cells)
    return markdown.table(heads, rows)


def plain() -> dict[str, float]:
    """Return what the plain onnx2tf conversion of the paper's network costs, by target."""
    rows = json.loads((BENCHMARKS / "arm64" / "results.json").read_text())["rows"]
    counts = {
        row["cpu"]: row["instructions"]
        for row in rows
        if (row["network"], row["model"]) == (f"{BASE}, plain", "model_int8.tflite")
    }
    timed = json.loads((BENCHMARKS / "rewrites" / "results.json").read_text())["faster"]
    found = {"desktop": timed["plain int8 / ours int8"]}
    for target in ("pi5", "pi4"):
        found[target] = counts[TARGETS[target].key] * TARGETS[target].scale
    return found


def against_paper(nets: Sequence[Point], costs: Costs) -> str:
    """Return, for each net of ours, its gain on the paper's and the share of its plain conversion's cost."""
    (paper,) = (net for net in nets if net.name == BASE)
    heads = ["network", "points", *(f"{target}, goal {goal:.2f}" for target, goal in PAPER.items())]
    rows = []
    ours = [net for net in nets if net.name.startswith(OURS)]
    base = plain()
    for net in sorted(ours, key=lambda net: costs["desktop"][net.name]):
        shares = {target: costs[target][net.name] / cost for target, cost in base.items()}
        cells = [net.name, f"{net.mean - paper.mean:+.1f}"]
        for target, goal in PAPER.items():
            met = net.mean >= paper.mean and shares[target] <= goal
            cells.append(f"**{shares[target]:.2f}**" if met else f"{shares[target]:.2f}")
        rows.append(cells)
    return markdown.table(heads, rows)


def main(*files: str) -> None:
    with RUNS.open(newline="") as text:
        known = [Run(**line) for line in csv.DictReader(text)]
    found = []
    for file, card in [(file, checkpoint.read(file)[0]) for file in files]:
        try:
            found.append(run_of(file, card))
        except GhostEdgeError as error:
            print(f"Left out: {error}", file=sys.stderr)
    runs = merged(known, found)
    with atomic_file(RUNS) as file, file.open("w", newline="") as text:
        csv.writer(text, lineterminator="\n").writerows((Run._fields, *runs))
    trainings = collections.Counter(run.training for run in runs)
    for training in trainings:
        alike = [run for run in runs if run.training == training]
        nets = {f"{part} %": points(alike, part) for part in ("validation", "test")}
        tested = nets["test %"]
        print(f"{training}\n\n{accuracies(nets, COSTS)}\n\n{verdicts(tested, COSTS)}\n")
        if any(net.name == BASE for net in tested):
            print(f"{against_paper(tested, COSTS)}\n")
        if (training, trainings[training]) == trainings.most_common(1)[0]:
            for target in TARGETS:
                draw(target, tested, training)
    cards = [checkpoint.read(file)[0] for file in checkpoint.shipped().values()]
    ship = [Point(card.name, [card.accuracy["test"]["top1"]]) for card in cards]
    print(f"the weights that ship, however they were trained\n\n{verdicts(ship, COSTS)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
