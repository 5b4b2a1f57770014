from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghostedge.convert import Bundle
from ghostedge.convert.report import attempts_table, noise_plot, write_reports
from ghostedge.evaluate import Evaluation

VOID = {"meta", "img", "line", "circle"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects tables and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            last = self.open.pop()
            while last in ("p",) and tag != last:  # closed by what follows it
                last = self.open.pop()
            assert last == tag, (last, tag)

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(bundle: Bundle) -> Page:
    return Page((bundle.path / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def timings(bundle: Bundle) -> dict[str, Any]:
    return json.loads((bundle.path / "timings.json").read_text())


def test_the_page_stands_alone(page: Page, bundle: Bundle) -> None:
    assert page.open in ([], ["html"])
    assert [link[:22] for link in page.links] == ["data:image/png;base64,"]
    assert page.counts.get("script", 0) == page.counts.get("link", 0) == 0
    assert str(bundle.path.parent) not in (bundle.path / "report.html").read_text()


def test_confusion_before_and_after(page: Page, bundle: Bundle) -> None:
    labels = bundle.manifest["labels"]
    matrices = [table for table in page.tables if table[0] == ["", *labels]]
    assert len(matrices) == 2
    images = bundle.parity["unfolded"]["test"]["images"]
    for matrix, stage in zip(matrices, ("unfolded", "model_int8.tflite"), strict=True):
        counts = np.array([[int(cell or 0) for cell in row[1:]] for row in matrix[1:]])
        assert counts.sum() == images
        top1 = 100 * np.trace(counts) / images
        assert top1 == pytest.approx(bundle.accuracy[stage]["test"])


def test_every_layer_is_in_the_plot(page: Page, bundle: Bundle) -> None:
    assert page.counts["circle"] == len(bundle.manifest["signal_to_noise"])


def test_latency_and_profile(page: Page, bundle: Bundle, timings: dict[str, Any]) -> None:
    names = set(bundle.manifest["artefacts"])
    (latency,) = [table for table in page.tables if table[0][:2] == ["file", "kB"]]
    assert {row[0] for row in latency[1:]} == names
    assert {row["model"] for row in timings["latency"]["rows"]} == names
    assert timings["profile"]["file"] == "model_int8.tflite"
    for kind in ("block", "operator"):
        (table,) = [table for table in page.tables if table[0][0] == kind]
        parts = timings["profile"][f"{'block' if kind == 'block' else 'kind'}s"]
        assert [row[0] for row in table[1:]] == [part["name"] for part in parts]
    text = json.dumps(bundle.manifest)
    assert "milliseconds" not in text and "median" not in text
    assert "/" not in "".join(timings["latency"]["warnings"])


def test_both_reports_say_the_same(bundle: Bundle, timings: dict[str, Any]) -> None:
    html, text = ((bundle.path / f"report.{kind}").read_text() for kind in ("html", "md"))
    for fact in (
        f"{timings['profile']['whole']:.4f} ms",
        f"{timings['latency']['rows'][0]['median']:.3f}",
        "Not in an XNNPACK partition"[5:],
        "images of the training part of drawn",
        timings["latency"]["machine"]["cpu"],
    ):
        assert fact in html and fact in text, fact
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        rows = table.splitlines()
        assert {row.count("|") for row in rows} == {rows[0].count("|")}, table
        assert set(rows[1]) == {"|", "-"}
    assert "\n\n\n" not in text


def test_what_was_tried_is_shown(bundle: Bundle, timings: dict[str, Any], tmp_path: Path) -> None:
    attempts = [
        {"attempt": "min-max", "kB": 12, "drop": 1.23456},
        {"attempt": "<b>MSE</b>", "kB": 12, "drop": 0.25, "in_float": ["head", "stem"]},
    ]
    manifest = {**bundle.manifest, "attempts": attempts}
    timings = {key: value for key, value in timings.items() if key != "attempts"}
    assert attempts_table({**manifest, "attempts": []}, timings) is None
    header, rows = attempts_table(manifest, timings) or ([], [])
    assert header == ["attempt", "kB", "drop", "in float"]
    assert rows[0] == ["min-max", "12", "1.235", ""]
    (tmp_path / "golden.npz").write_bytes((bundle.path / "golden.npz").read_bytes())
    labels = [f"class {i}" for i in range(40)]
    classes = np.arange(40)
    many = {"unfolded": Evaluation(labels, classes, classes, [])}
    write_reports(tmp_path, {**manifest, "labels": labels}, timings, many)
    found = Page((tmp_path / "report.html").read_text())
    assert [r for t in found.tables for r in t if "1.235" in r] == [["min-max", "12", "1.235", ""]]
    assert "<b>MSE" not in (tmp_path / "report.html").read_text()
    assert not [table for table in found.tables if table[0][:2] == ["", "class 0"]]
    assert "| <b>MSE</b> | 12 | 0.25 | head, stem |" in (tmp_path / "report.md").read_text()


def test_the_plot_holds_every_value() -> None:
    assert noise_plot([]) is None
    values = [("CONV_2D", 31.5), ("ADD", -4.0), ("MEAN", 58.7)]
    layers = [{"name": "x", "operator": o, "decibels": d} for o, d in values]
    plot = noise_plot(layers)
    assert plot is not None
    assert [value for _, value in plot["grid"]] == [-10, 0, 10, 20, 30, 40, 50, 60]
    heights = {value: y for y, value in plot["grid"]}
    for point, (_, decibels) in zip(plot["points"], values, strict=True):
        low = 10 * (decibels // 10)
        assert heights[low + 10] < point["y"] < heights[low]
        assert plot["left"] <= point["x"] <= plot["right"]
    assert [point["group"] for point in plot["points"]] == [0, 1, 2]
