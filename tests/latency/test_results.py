from __future__ import annotations

import copy
import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ghostedge.errors import GhostEdgeError
from ghostedge.latency import results
from ghostedge.latency.timing import bench
from tests.runtime_fixtures import write_onnx


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("results")
    models = [write_onnx(folder / "a|b <c>.onnx"), write_onnx(folder / "other.onnx", softmax=False)]
    return bench(models, runs=5)


def changed(result: dict[str, Any], name: str, **row: Any) -> dict[str, Any]:
    other = copy.deepcopy(result)
    other["name"] = name
    other["rows"][0].update(row)
    return other


def test_the_json_has_its_schema(measured: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    results.write([measured, measured], file)
    stored = json.loads(file.read_text())
    jsonschema.Draft202012Validator.check_schema(results.schema())
    jsonschema.validate(stored, results.schema())
    assert results.read(file) == [measured, measured]


def test_what_is_no_result(measured: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with pytest.raises(GhostEdgeError, match="No such file"):
        results.read(file)
    for text in ("", "{}", "[]", json.dumps({"format": 2})):
        file.write_text(text)
        with pytest.raises(GhostEdgeError, match=r"out\.json is no result of a bench"):
            results.read(file)
    file.write_text(json.dumps({"format": 1}))
    with pytest.raises(
        GhostEdgeError, match=r"has bench format 1 and .* reads 2: repeat the bench"
    ):
        results.read(file)
    for key in ("median", "sha256", "verdict"):
        bad = changed(measured, "bad", **{key: "x"})
        results.write([bad], file)
        with pytest.raises(GhostEdgeError, match="is no result of a bench"):
            results.read(file)
    with pytest.raises(GhostEdgeError, match=r"should end in one of \.json"):
        results.write([measured], tmp_path / "out.pdf")


def test_side_by_side(measured: dict[str, Any]) -> None:
    first = measured["rows"][0]
    tight = {"low": 0.99, "median": 1.0, "high": 1.01}
    base = changed(measured, "pi4", **tight)
    twice = changed(measured, "pi5", model="elsewhere.onnx", low=1.97, median=2.0, high=2.03)
    again = changed(measured, "pi4", sha256="0" * 64, low=0.99, median=1.005, high=1.02)
    more = changed(measured, "pi5", sha256="1" * 64, model="new.onnx", **tight)
    _, heading, rows = results.compare([base, twice, again, more])
    names = [name for name in heading if name.startswith("pi")]
    assert names == ["pi4 (1)", "pi5 (1)", "pi4 (2)", "pi5 (2)"]
    one, _, two = rows
    assert one[:3] == [first["model"], "1", "1.000 ms"]
    assert one[3:6] == ["2.000 ms", "2.00 (1.96-2.04)", "slower"]  # the same file, another name
    assert one[6:9] == ["1.005 ms", "1.00 (0.99-1.02)", "noise, another file"]
    assert one[9:] == ["", "", ""]
    assert two[0] == "new.onnx" and two[2:9] == [""] * 7 and two[9] == "1.000 ms"


def test_the_same_file_comes_before_the_same_name(measured: dict[str, Any]) -> None:
    one, two = measured["rows"]
    renamed = {**measured, "rows": [two | {"model": one["model"]}, one | {"model": "old.onnx"}]}
    _, _, rows = results.compare([measured, renamed])
    assert [row[0] for row in rows] == [one["model"], two["model"]]
    assert not any("another file" in cell for row in rows for cell in row)


def test_a_profile_of_no_time(measured: dict[str, Any]) -> None:
    part = {"name": "conv", "operators": 1, "milliseconds": 0.0, "error": 0.0}
    profile = {"file": "a.onnx", "whole": 0.0, "blocks": [part], "kinds": [part]}
    profile |= {"runtime": "onnxruntime", "method": "none"}
    (_, _, blocks), _ = results.profiles(measured | {"profiles": [profile]})
    assert blocks == [["conv", "1", "0.0000", "0.0000", "0%"]]
    assert "conv" in results.writer(Path("x.html"))([measured | {"profiles": [profile]}])
    empty = profile | {"blocks": [], "kinds": []}
    assert profile["file"] in results.writer(Path("x.html"))([measured | {"profiles": [empty]}])


def test_for_people(measured: dict[str, Any], tmp_path: Path) -> None:
    both = [measured, changed(measured, "pi|4 <b>")]
    for suffix in ("csv", "md", "html"):
        results.write(both, tmp_path / f"out.{suffix}")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["machine"] for row in rows] == 2 * [measured["name"]] + 2 * ["pi|4 <b>"]
    assert float(rows[0]["median"]) == measured["rows"][0]["median"]

    text = (tmp_path / "out.md").read_text()
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
    assert "onnxruntime: CPUExecutionProvider" in text

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.words = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            for name, value in attrs:
                assert name not in ("src", "href"), value  # one file, which fetches nothing

        def handle_data(self, data: str) -> None:
            self.words += data

    page = Page()
    page.feed((tmp_path / "out.html").read_text())
    assert page.tags.count("table") == 7  # two pictures, one comparison, two tables of each
    assert "pi|4 <b>" in page.words and "a|b <c>.onnx" in page.words
