"""Markdown, as reports and benchmarks write it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, without a newline at its end."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (heading, *rows)]
    first, *others = (f"| {' | '.join(line)} |" for line in cells)
    return "\n".join([first, f"{'|---' * len(heading)}|", *others])
