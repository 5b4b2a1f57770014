"""Files of benches: JSON, which `compare` reads again, and CSV, Markdown and HTML for people."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ghostedge import markdown
from ghostedge.errors import GhostEdgeError, needing
from ghostedge.files import atomic_write
from ghostedge.latency import runner

Result = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 80rem; margin: 0 auto; padding: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.bar { height: .9rem; background: #4a8; min-width: 1px; }
"""


def schema() -> dict[str, Any]:
    """Return the JSON schema of the files that `write` makes."""
    return dict(json.loads(Path(__file__).with_name("bench.schema.json").read_text("utf-8")))


def read(path: Path) -> list[Result]:
    """Read the results in a JSON file of `ghostedge bench` or of a board's bench.py.

    Raises GhostEdgeError for anything else.
    """
    with needing("bench"):
        import jsonschema
    try:
        stored = json.loads(
            path.read_text("utf-8"),
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
        found = stored.get("format") if isinstance(stored, dict) else None
        if isinstance(found, int) and found != runner.FORMAT:
            raise GhostEdgeError(
                f"{path} has bench format {found} and this ghostedge reads {runner.FORMAT}: repeat the "
                "bench with this version (copy bench.py anew where it ran by hand)."
            )
        jsonschema.validate(stored, schema())
    except (OSError, ValueError, RecursionError, jsonschema.ValidationError) as error:
        reason = error.message if isinstance(error, jsonschema.ValidationError) else error
        raise GhostEdgeError(
            f"{path} is no result of a bench ({str(reason)[:200]}): name a .json file that "
            "`ghostedge bench --output` wrote."
        ) from error
    return list(stored["results"])


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no figure")
    return number


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def write(results: Sequence[Result], path: Path) -> None:
    """Write results in the format that the file name's ending tells; all except JSON are for people.

    Raises GhostEdgeError for another ending and where the file cannot be written.
    """
    text = writer(path)(results)
    atomic_write(path, text)


def writer(path: Path) -> Callable[[Sequence[Result]], str]:
    formats = {".json": _json, ".csv": _csv, ".md": _markdown, ".html": _html}
    if path.suffix not in formats:
        raise GhostEdgeError(f"{path} should end in one of {', '.join(formats)}.")
    return formats[path.suffix]


def tables(results: Sequence[Result]) -> list[Table]:
    """Return every table of the results, side by side first where there are several."""
    side_by_side = [compare(results)] if len(results) > 1 else []
    each = [table for result in results for table in (*runner.tables(result), *profiles(result))]
    return side_by_side + each


def profiles(result: Result) -> list[Table]:
    """Return the tables of where the time goes, one by block and one by operator, of each file.

    Shares are of the sum: operators measured alone, or by a profiler, take more or less than together.
    """
    found = []
    for profile in result.get("profiles", []):
        for kind in ("block", "kind"):
            parts = profile[f"{kind}s"]
            total = sum(part["milliseconds"] for part in parts) or 1.0
            rows = [
                [
                    part["name"],
                    str(part["operators"]),
                    f"{part['milliseconds']:.4f}",
                    *([] if part["error"] is None else [f"{part['error']:.4f}"]),
                    f"{part['milliseconds'] / total:.0%}",
                ]
                for part in parts
            ]
            what = "block" if kind == "block" else "operator"
            error = ["±"] if kind == "block" else []
            if rows:
                title = f"{profile['file']}: {profile['whole']:.4f} ms, by {what}"
                found.append((title, [what, "operators", "ms", *error, "share"], rows))
    return found


def compare(results: Sequence[Result]) -> Table:
    """Put the medians of several results side by side: a row for each model and number of threads.

    Rows are of one model where the file is the same, else where the name is. Each ratio is to the
    first result that has the row; as the runs were apart, its 95% interval is that of two independent
    medians, and holds 1 where the difference is noise.
    """
    lines: list[list[dict[str, Any] | None]] = []
    for column, result in enumerate(results):
        left = result["rows"]
        for same in ("sha256", "model"):
            unknown = []
            for row in left:
                line = next((ln for ln in lines if _is_same(ln, row, column, same)), None)
                if line is None:
                    unknown.append(row)
                else:
                    line[column] = row
            left = unknown
        lines += [[*[None] * column, row, *[None] * (len(results) - column - 1)] for row in left]
    heading = ["model", "threads", result_names(results)[0]]
    for name in result_names(results)[1:]:
        heading += [name, "ratio (95%)", "verdict"]
    rows = []
    for line in lines:
        first = next(row for row in line if row is not None)
        cells = [runner.called(first), str(first["threads"])]
        for column, row in enumerate(line):
            cells.append("" if row is None else f"{row['median']:.3f} ms")
            if column:
                cells += ["", ""] if row is None or row is first else _ratio(row, first)
        rows.append(cells)
    return "Median of one invoke, side by side", heading, rows


def result_names(results: Sequence[Result]) -> list[str]:
    """Return a heading for each result: its machine, with a number where two have the same."""
    names = [result["name"] for result in results]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _is_same(line: list[dict[str, Any] | None], row: dict[str, Any], column: int, key: str) -> bool:
    first = next(other for other in line if other is not None)
    keys = (key, "runtime", "threads", "batch")
    return line[column] is None and all(first[k] == row[k] for k in keys)


def _ratio(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    halves = [math.log(r["high"] / r["low"]) / 2 for r in (row, first)]
    ratio, spread = row["median"] / first["median"], math.exp(math.hypot(*halves))
    low, high = ratio / spread, ratio * spread
    verdict = "faster" if high < 1 else "slower" if low > 1 else "noise"
    if row["sha256"] != first["sha256"]:
        verdict += ", another file"
    return [f"{ratio:.2f} ({low:.2f}-{high:.2f})", verdict]


def _json(results: Sequence[Result]) -> str:
    return json.dumps(runner.document(results), indent=1) + "\n"


def _csv(results: Sequence[Result]) -> str:
    rows = [
        {
            "machine": result["name"],
            "cpu": result["machine"]["cpu"],
            **row,
            "accuracy": row["accuracy"] and row["accuracy"]["top1"],
        }
        for result in results
        for row in result["rows"]
    ]
    text = io.StringIO()
    out = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return text.getvalue()


def conditions(result: Result) -> str:
    """Return what of the machine decided a result, as one line."""
    before, after, here = result["before"], result["after"], result["machine"]
    facts = [
        here["cpu"],
        f"{here['cores']} cores",
        " ".join(here["features"]),
        f"governor {before['governor']}" if before["governor"] else "",
        _change("clock", before["frequency_mhz"], after["frequency_mhz"], " MHz"),
        _change("temperature", before["temperature_c"], after["temperature_c"], " C"),
        _change("load", before["load_average"], after["load_average"], ""),
        *(f"{name} {version}" for name, version in here["versions"].items()),
        *(f"{name}: {flags}" for name, flags in here["delegates"].items()),
    ]
    return ", ".join(fact for fact in facts if fact)


def _change(what: str, before: float | None, after: float | None, unit: str) -> str:
    return "" if before is None else f"{what} {before} to {after}{unit}"


def _markdown(results: Sequence[Result]) -> str:
    parts = ["# Latency"]
    for title, heading, rows in tables(results):
        parts += [f"## {title}", markdown.table(heading, rows)]
    for name, result in zip(result_names(results), results, strict=True):
        parts += [f"{name}: {conditions(result)}.", *(f"- {line}" for line in result["warnings"])]
    return "\n\n".join([*parts, runner.PROTOCOL, *_methods(results)]) + "\n"


def _methods(results: Sequence[Result]) -> list[str]:
    """Return how the profiles of each runtime were measured."""
    found = {p["runtime"]: p["method"] for r in results for p in r.get("profiles", [])}
    return [f"Where the time goes, {runtime}: {method}" for runtime, method in found.items()]


def _bar(cells: Sequence[str], share: float) -> str:
    texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    bar = f"<div class=bar style='width: {100 * share:.1f}%'></div>"
    return f"<tr>{texts}<td style='width: 30rem'>{bar}</td></tr>"


def _html(results: Sequence[Result]) -> str:
    parts = ["<h1>Latency</h1>"]
    longest = max(row["median"] for result in results for row in result["rows"])
    for name, result in zip(result_names(results), results, strict=True):
        bars = [
            _bar(
                [row["model"], str(row["threads"]), f"{row['median']:.3f} ms"],
                row["median"] / longest,
            )
            for row in result["rows"]
        ]
        parts.append(
            f"<h2>{escape(name)}</h2><div class=scroll><table>{''.join(bars)}</table></div>"
        )
        for profile in result.get("profiles", []):
            shown = profile["blocks"] or profile["kinds"]
            most = max((part["milliseconds"] for part in shown), default=0) or 1.0
            bars = [
                _bar([p["name"], f"{p['milliseconds']:.4f} ms"], max(0, p["milliseconds"]) / most)
                for p in shown
            ]
            parts.append(
                f"<h2>Where the time of {escape(profile['file'])} goes</h2>"
                f"<div class=scroll><table>{''.join(bars)}</table></div>"
            )
        parts.append(f"<p>{escape(conditions(result))}.</p>")
        parts += [f"<p><strong>{escape(line)}</strong></p>" for line in result["warnings"]]
    for title, heading, rows in tables(results):
        lines = [f"<tr>{''.join(f'<th>{escape(c)}</th>' for c in heading)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows]
        parts.append(f"<h2>{escape(title)}</h2>")
        parts.append(f"<div class=scroll><table>{''.join(lines)}</table></div>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    notes = [f"<p>{escape(note)}</p>" for note in (runner.PROTOCOL, *_methods(results))]
    page = "\n".join([*parts, *notes])
    return (
        f"<!doctype html>\n<html lang=en>{head}<title>Latency</title><style>{STYLE}</style>\n"
        f"{page}\n</html>\n"
    )
