"""The report of an export: the same facts as text (report.md) and as one page (report.html)."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ghostedge.bundle import GOLDEN

SETS = ("synthetic", "validation", "test")


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
        header = ["stage", "kB", "same class", "largest difference"]
        if first["top1"] is not None:
            header += ["top-1", "points lost"]
        rows = []
        for stage, parity in parities:
            artefact = manifest["artefacts"].get(stage)
            size = f"{artefact['bytes'] / 1000:.0f}" if artefact else ""
            row = [stage, size, f"{parity['agreement']:.2%}", f"{parity['difference']:.1g}"]
            if parity["top1"] is not None:
                lost = f"{parity['drop']:.2f} ± {parity['drop_interval']:.2f}"
                row += [f"{parity['top1']:.2f}%", lost if parity is not first else ""]
            rows.append(row)
        tables.append(StageTable(f"{first['images']} {name} images", header, rows))
    return tables


def calibration_line(manifest: dict[str, Any]) -> str:
    """Return one sentence on what the quantized models were calibrated on."""
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
                    f"{f['validation_drop']:.2f} ± {f['validation_interval']:.2f} ({model})"
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


def write_reports(folder: Path, manifest: dict[str, Any]) -> None:
    """Write report.md and report.html into a bundle."""
    environment = Environment(
        loader=PackageLoader("ghostedge.convert", "templates"),
        autoescape=lambda name: name is not None and name.startswith("report.html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    facts = {
        "manifest": manifest,
        "tables": stage_tables(manifest),
        "calibration": calibration_line(manifest),
        "golden_png": _contact_sheet(folder),
    }
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.jinja").render(facts)
        (folder / name).write_text(text, "utf-8")


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
