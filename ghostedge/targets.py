"""Which network for which device: what each costs there (costs.json), and how good its weights are."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ghostedge import checkpoint
from ghostedge.bundle import CAMERA, is_bundle, read_manifest
from ghostedge.errors import GhostEdgeError, nearest

COSTS = Path(__file__).with_name("costs.json")
"""Made by benchmarks/targets/costs.py; a row for each network, image size and precision."""
BASE = "ghostnetv3-small-1.0x"
"""The paper's network, whose cost is the limit where none is given."""
NEAR = 0.5
"""Points of top-1 that a seed moves a figure by, about: a net so near to the best is as good."""
UNEQUAL = (
    f"A seed moves an accuracy by about {NEAR:g} points; some weights had more training or other "
    "teachers than others (see their cards)."
)


class Target(NamedTuple):
    """A device: where its figure stands in a row of costs.json, in which unit, and what it is."""

    key: str
    scale: float
    unit: str
    source: str
    small: bool = False
    """Whether the model's own size is as scarce there as what the figure counts."""


_COUNT = "million instructions"
_COUNTED = "instructions of one inference on an emulated {}; a count is not a time"
TARGETS = {
    "desktop": Target(
        "x86", 1, f"x {BASE}", "time of one inference on an x86 CPU with int8 dot products"
    ),
    "pi5": Target("cortex-a76", 1e-6, _COUNT, _COUNTED.format("Cortex-A76")),
    "pi4": Target("cortex-a72", 1e-6, _COUNT, _COUNTED.format("Cortex-A72")),
    "zero2w": Target("cortex-a53", 1e-6, _COUNT, _COUNTED.format("Cortex-A53")),
    "microcontroller": Target(
        "arena", 1e-3, "kB", "RAM that TensorFlow Lite Micro needs beside the model in flash", True
    ),
}


class Choice(NamedTuple):
    """Weights that there are for a target."""

    name: str
    cost: float
    top1: float
    size: float
    """Of the int8 model's file, in kB."""
    best: bool = False
    """Whether none is as accurate for less: at no more cost and, on a microcontroller, in no more flash."""


class Ranking(NamedTuple):
    """Weights by accuracy, best first, and where the figures come from."""

    choices: list[Choice]
    unit: str
    sources: list[str]


def rank(target: str, *, within: float | None = None, imgsz: int = 32) -> Ranking:
    """Rank the shipped weights by accuracy on what a target can afford.

    Args:
        target: of `TARGETS`, or the .json file that `ghostedge bench --output` wrote on a board.
        within: highest cost, in the target's unit; of a cost, three digits count, as they are shown.
        imgsz: image size that costs are for.

    Only checkpoints that were measured on the same images are compared: those of most of them.
    Raises GhostEdgeError for an unknown target or size, and where nothing is left to rank.
    """
    exact, unit, source = costs_of(target, imgsz)
    costs = {name: _shown(cost) for name, cost in exact.items()}
    tops, measured = _accuracies(checkpoint.shipped())
    # The file hardly depends on the image size: where that is not in the table, another's will do.
    rows = sorted(_int8(), key=lambda row: bool(row["size"] == imgsz))
    sizes = {row["network"]: row["bytes"] / 1e3 for row in rows}
    small = target in TARGETS and TARGETS[target].small
    found = [
        Choice(name, costs[name], top, sizes.get(name, math.nan))
        for name, top in tops.items()
        if name in costs
    ]
    found.sort(key=lambda choice: (-choice.top1, choice.cost, choice.name))
    choices = [
        choice._replace(
            best=not any(
                other.cost <= choice.cost and (not small or other.size <= choice.size)
                for other in found[:index]
            )
        )
        for index, choice in enumerate(found)
        if within is None or choice.cost <= within
    ]
    if not choices:
        cheapest = min((choice.cost for choice in found), default=None)
        raise GhostEdgeError(
            f"No shipped weights have a cost on {target} at this size: bench exports of them there."
            if cheapest is None
            else f"No weights cost {within:g} {unit} or less on {target}: the cheapest, {cheapest:.3g}."
        )
    sources = [f"Cost: {source}.", measured, UNEQUAL]
    if unknown := sorted(tops.keys() - costs.keys()):
        sources.append(f"Left out, as their cost there is not known: {', '.join(unknown)}.")
    return Ranking(choices, unit, sources)


def _shown(cost: float) -> float:
    return float(f"{cost:.3g}")


def costs_of(target: str, imgsz: int) -> tuple[dict[str, float], str, str]:
    """Return the int8 cost of each network on a target, its unit, and where it comes from.

    Arguments and errors are those of `rank`.
    """
    if target.endswith(".json"):
        return _of_bench(Path(target), imgsz)
    if target in TARGETS:
        return _of_table(TARGETS[target], imgsz)
    raise GhostEdgeError(
        f"There is no target {target!r}.{nearest(target, TARGETS)} Name one of "
        f"{', '.join(TARGETS)}, or the .json file of a `ghostedge bench --output` on the board."
    )


def choose(target: str, within: float | None = None, imgsz: int = 32) -> tuple[Choice, str]:
    """Return the cheapest weights of those within `NEAR` of the best, and a sentence that says why.

    That is the best that costs no more than `within`, or than the paper's network. Raises
    GhostEdgeError as `rank` does, and where the latter's cost is not known and no other is given.
    """
    if within is None:
        costs, unit, _ = costs_of(target, imgsz)
        if BASE not in costs:
            raise GhostEdgeError(
                f"{target} has no int8 time of {BASE}, the limit where none is given: name one in {unit} "
                "with --within."
            )
        within = _shown(costs[BASE])
    found = rank(target, within=within, imgsz=imgsz)
    size = "" if imgsz == 32 else f" --imgsz {imgsz}"
    near = [choice for choice in found.choices if choice.top1 >= found.choices[0].top1 - NEAR]
    chosen = min(near, key=lambda choice: choice.cost)
    return chosen, (
        f"From {chosen.name}: of the weights that cost at most {within:g} {found.unit}, the cheapest "
        f"within half a point of the best (`ghostedge list --for {target}{size}`)."
    )


@functools.cache
def _table() -> dict[str, Any]:
    return dict(json.loads(COSTS.read_text("utf-8")))


def _int8() -> list[dict[str, Any]]:
    return [row for row in _table()["rows"] if row["precision"] == "int8"]


def _of_table(target: Target, imgsz: int) -> tuple[dict[str, float], str, str]:
    rows = _int8()
    if imgsz not in {row["size"] for row in rows}:
        sizes = sorted({str(row["size"]) for row in rows})
        raise GhostEdgeError(
            f"Costs are known at {' and '.join(sizes)} pixels, not at {imgsz}: rank networks at one of those "
            "(`ghostedge list --for ... --imgsz`), then train with --from and the size you want."
        )
    costs = {}
    for row in rows:
        figure = {**row, **row.get("instructions", {})}.get(target.key)
        if row["size"] == imgsz and isinstance(figure, (int, float)):
            costs[row["network"]] = figure * target.scale
    kind = f"int8 at {imgsz} pixels, {target.source}"
    if target.key == "x86":
        machine = _table()["machines"][str(imgsz)]
        kind += f", {machine['cpu']} with {', '.join(machine['features'])}"
    return costs, target.unit, f"{kind} ({_table()['command']})"


def _of_bench(path: Path, imgsz: int) -> tuple[dict[str, float], str, str]:
    """Return the fastest int8 time of each network in one machine's benches, in ms, at fewest threads."""
    from ghostedge.latency import results, runner

    found = results.read(path)
    machines = sorted({_machine(result) for result in found})
    if len(machines) > 1:
        raise GhostEdgeError(
            f"{path} has the times of {' and '.join(machines)}: name a file of one of them."
        )
    quantized = [
        (name, row)
        for result in found
        for row in result["rows"]
        if row["precision"] in runner.QUANTIZED
        and row["batch"] == 1
        and row["imgsz"] is not None
        and (name := _network(row))
    ]
    rows = [(name, row) for name, row in quantized if row["imgsz"] == imgsz]
    threads = min((row["threads"] for _, row in rows), default=1)
    costs: dict[str, float] = {}
    for name, row in rows:
        if row["threads"] == threads:
            costs[name] = min(row["median"], costs.get(name, row["median"]))
    if not costs:
        sizes = " and ".join(str(size) for size in sorted({row["imgsz"] for _, row in quantized}))
        raise GhostEdgeError(
            f"{path} has no int8 model of a known network at {imgsz} pixels"
            + (
                f", only at {sizes}: name such a size with --imgsz."
                if sizes
                else ": export some with --int8, keep the names of their folders, and bench those."
            )
        )
    kind = f"int8 at {imgsz} pixels, median of one inference with {threads} thread{'s' * (threads > 1)}"
    return costs, "ms", f"{kind} on {found[0]['name']} ({path})"


def _machine(result: Mapping[str, Any]) -> str:
    """Return a machine's name with its CPU: two may have been given one name."""
    of = result["machine"]
    return f"{result['name']} ({', '.join([of['cpu'], of['architecture'], *of['features']])})"


def _network(row: Mapping[str, Any]) -> str | None:
    """Return whose file was timed: by its bundle's manifest, or else by the nearest folder's name."""
    file = Path(row["model"])
    if file.name == CAMERA:  # its image size is that of a frame, not of the network
        return None
    if is_bundle(file.parent):
        manifest = read_manifest(file.parent)
        if manifest["artefacts"].get(file.name, {}).get("sha256") == row["sha256"]:
            # The name of a foreign net is its file's, whatever it is.
            return str(manifest["name"]) if "architecture" in manifest["source"] else None
    names = sorted({known["network"] for known in _table()["rows"]}, key=len, reverse=True)
    called = (
        name
        for part in (file.stem, *reversed(file.parts[:-1]))
        for name in names
        if re.search(rf"(?<![a-z0-9.]){re.escape(name)}(?![a-z0-9])(?!\.\d)", part, re.IGNORECASE)
    )
    return next(called, None)


def _accuracies(weights: Mapping[str, Path]) -> tuple[dict[str, float], str]:
    """Return top-1 in percent by network, of the data that most checkpoints record, and its name."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for file in weights.values():
        card, _ = checkpoint.read(file)
        for part in ("test", "validation"):
            figures = card.accuracy.get(part, {})
            if "top1" in figures:
                data = (card.data.get("name"), card.data.get("fingerprint"))
                split = json.dumps(card.data.get("validation")) if part == "validation" else ""
                of = (*data, part, figures["images"], card.pixels.size, split)
                group = groups.setdefault(of, {})
                group[card.name] = max(figures["top1"], group.get(card.name, 0.0))
    if not groups:
        return {}, "Accuracy: no weights record any."
    most = max(groups, key=lambda key: len(groups[key]))
    name, fingerprint, part, images, size, _ = most
    used = f"{images:,} {part} images of {name} ({str(fingerprint)[:8]}) at {size} pixels"
    return groups[most], (
        f"Accuracy: top-1 of the float network on {used}, from the cards of the weights."
    )
