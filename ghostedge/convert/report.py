"""The report of an export: the same facts as text (report.md) and as one page (report.html)."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ghostedge import markdown
from ghostedge.bundle import GOLDEN, REPORTS
from ghostedge.latency.runner import called

if TYPE_CHECKING:
    from ghostedge.evaluate import Evaluation

SETS = ("synthetic", "validation", "test")
GROUPS = {
    "CONV_2D": "convolutions",
    "DEPTHWISE_CONV_2D": "convolutions",
    "FULLY_CONNECTED": "convolutions",
    "ADD": "sums and products",
    "MUL": "sums and products",
}
"""Colours of the signal-to-noise plot; what is not named is "others"."""
PLOT = (360, 210)
"""Width and height in units of the page's text at phone width."""
LISTED, MATRIX = 8, 30
"""Lowest layers and largest weights that are listed; most classes that a matrix is drawn for."""


AUDIT_NOTE = (
    "Called int8: every operator computes in integers, except conversions and, at the very ends, the "
    "normalisation of pixels and the softmax; mixed: other float is left in a quantized file. MMACs "
    "are those that the file runs. Activations: the memory that holds all of one run at once, each "
    "from the operator that makes it to the last that reads it, largest first at the lowest free "
    "address; scratch is not in it. Of ONNX files: after ONNX Runtime's own fusions."
)


class StageTable(NamedTuple):
    """Every stage on one set of images."""

    title: str
    header: list[str]
    rows: list[list[str]]


def stage_tables(manifest: dict[str, Any]) -> list[StageTable]:
    """Return a table of the stages for each set: agreement, difference, top-1 and points lost."""
    tables = []
    for name in SETS:
        parities = [(stage["name"], stage["parity"].get(name)) for stage in manifest["stages"]]
        first = parities[0][1]
        if first is None:
            continue
        labelled = ["top-1", "points lost"] if first["top1"] is not None else []
        header = ["stage", "kB", *labelled, "same class", "largest difference"]
        rows = []
        for stage, parity in parities:
            artefact = manifest["artefacts"].get(stage)
            size = f"{artefact['bytes'] / 1000:.0f}" if artefact else ""
            row = [stage, size]
            if parity["top1"] is not None:
                lost = f"{parity['drop']:.2f} ± {parity['drop_interval']:.2f}"
                row += [f"{parity['top1']:.2f}%", lost if parity is not first else ""]
            row += [f"{parity['agreement']:.2%}", f"{parity['difference']:.1g}"]
            rows.append(row)
        tables.append(StageTable(f"{first['images']} {name} images", header, rows))
    return tables


def calibration_line(manifest: dict[str, Any]) -> str:
    """Return what the quantized models were calibrated on, and what to be wary of."""
    return " ".join([_calibration(manifest), *manifest["warnings"]])


def _summed(model: str) -> str:
    return f"{model}, where its sums are exact" if model.endswith(".onnx") else model


def _calibration(manifest: dict[str, Any]) -> str:
    card = manifest["calibration"]
    if card is None:
        return "Nothing is quantized."
    if card["kind"] == "synthetic":
        line = (
            f"int8 is calibrated on {card['images']} synthetic images, made from the network's own "
            "BatchNorm statistics; no data was given. Real images may give a better model: --data DIR."
        )
        measured = manifest["source"].get("accuracy", {}).get("int8")
        if measured is not None:  # shipped weights carry it, see benchmarks/ship_weights.py
            drops = {
                kind: " and ".join(
                    f"{f['validation_drop']:.2f} ± {f['validation_interval']:.2f} ({_summed(model)})"
                    for model, f in sorted(models.items())
                )
                for kind, models in measured.items()
            }
            line += (
                " Measured on the validation split of these weights, synthetic calibration loses "
                f"{drops['synthetic']} points of top-1, real images lose {drops['real']}."
            )
        return line
    return (
        f"int8 is calibrated on {card['images']} images of the training part of {card['data']}; "
        f"validation is {card['validation']}."
    )


def write_reports(
    folder: Path,
    manifest: dict[str, Any],
    timings: dict[str, Any],
    confusions: dict[str, Evaluation],
) -> None:
    """Write report.md and report.html into a bundle.

    timings: what timings.json holds, with `latency` (what `bench` returns) and `profile`
    (`Profile.to_json`). confusions: by stage, of the same labelled images; empty without.
    """
    environment = Environment(
        loader=PackageLoader("ghostedge.convert", "templates"),
        autoescape=lambda name: name is not None and name.startswith("report.html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    layers = manifest["signal_to_noise"]
    facts = {
        "manifest": manifest,
        "tables": stage_tables(manifest),
        "calibration": calibration_line(manifest),
        "attempts": attempts_table(manifest, timings),
        "timings": timings,
        "confusions": confusions,
        "matrix": len(manifest["labels"]) <= MATRIX,
        "audits": [
            {"name": name, **artefact["audit"], "largest": _largest(artefact["audit"])}
            for name, artefact in sorted(manifest["artefacts"].items())
        ],
        "lowest": sorted(layers, key=lambda layer: layer["decibels"])[:LISTED],
        "plot": noise_plot(layers),
        "audit_note": AUDIT_NOTE,
        "golden_png": _contact_sheet(folder),
        "markdown": markdown.table,
        "called": called,
    }
    for name in REPORTS:
        text = environment.get_template(f"{name}.jinja").render(facts)
        (folder / name).write_text(text, "utf-8")


def attempts_table(
    manifest: dict[str, Any], timings: dict[str, Any]
) -> tuple[list[str], list[list[str]]] | None:
    """Return the heading and rows of what was tried to stay within the limit, None for nothing.

    `manifest["attempts"]` is a list of flat dictionaries; their keys become the heading. Their latency
    is in `timings["attempts"]`, where more than one was tried.
    """
    attempts = manifest.get("attempts")
    if not attempts:
        return None
    keys = list(dict.fromkeys(key for attempt in attempts for key in attempt))
    rows = [[_text(attempt.get(key)) for key in keys] for attempt in attempts]
    if "attempts" in timings:
        keys.append(f"median {timings['attempts']['unit']}")
        for row, median in zip(rows, timings["attempts"]["median"], strict=True):
            row.append(_text(median))
    return [key.replace("_", " ") for key in keys], rows


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def noise_plot(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return points, grid lines and groups of the signal-to-noise plot, in units of `PLOT`."""
    if not layers:
        return None
    width, height = PLOT
    left, right, top, bottom = 26, 4, 8, 16
    highest = 10 * math.ceil(max(10.0, *(layer["decibels"] for layer in layers)) / 10)
    lowest = 10 * math.floor(min(0.0, *(layer["decibels"] for layer in layers)) / 10)

    def vertical(decibels: float) -> float:
        share = (highest - decibels) / (highest - lowest)
        return round(top + share * (height - top - bottom), 1)

    step = (width - left - right - 8) / max(1, len(layers) - 1)
    groups = [GROUPS.get(layer["operator"], "others") for layer in layers]
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "grid": [(vertical(value), value) for value in range(lowest, highest + 1, 10)],
        "groups": list(dict.fromkeys(groups)),
        "points": [
            {
                "x": round(left + 4 + index * step, 1),
                "y": vertical(layer["decibels"]),
                "group": list(dict.fromkeys(groups)).index(group),
                "title": f"{layer['operator']} {layer['name']}: {layer['decibels']} dB",
            }
            for index, (layer, group) in enumerate(zip(layers, groups, strict=True))
        ],
    }


def _largest(audit: dict[str, Any]) -> list[dict[str, Any]]:
    layers = audit["weights"]["layers"]
    return sorted(layers, key=lambda layer: -layer["bytes"])[:LISTED]


def _contact_sheet(folder: Path) -> str:
    """Return the golden images side by side, as a base64 PNG."""
    from PIL import Image

    with np.load(folder / GOLDEN) as golden:
        images = golden["images"]
    images = images[: len(images) // 8 * 8 or len(images)]
    columns = min(8, len(images))
    size = images.shape[1]
    sheet = images.reshape(-1, columns, size, size, 3).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(-1, columns * size, 3))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
