"""What is installed here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys

from ghostedge.checkpoint import shipped
from ghostedge.latency.runner import DOT_PRODUCTS, machine, saturates

NEEDED_FOR = {
    "train": "ghostedge train, distill and study",
    "export": "ghostedge export, deploy and import",
    "bench": "predict, eval, bench and verify of exported models",
}


def examine() -> tuple[list[str], list[list[str]], list[str]]:
    """Return a heading, a row for each package of the extras, and lines of advice."""
    here = machine()
    rows = [
        ["Python", platform.python_version(), "", sys.executable],
        ["CPU", here["cpu"], "", f"{here['cores']} cores; {', '.join(here['features'])}"],
        ["shipped weights", str(len(shipped())), "", ", ".join(shipped())],
    ]
    advice = []
    try:
        requirements = importlib.metadata.requires("ghostedge") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
        advice.append(
            "ghostedge is not installed but run from its source, so what it needs is not known "
            "here: install it with pip install -e ."
        )
    for extra, purpose in NEEDED_FOR.items():
        missing = []
        for package in _packages(requirements, extra):
            try:
                version = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                version = "missing"
                missing.append(package)
            rows.append([package, version, extra, purpose])
        if missing:
            advice.append(
                f"Missing for {purpose}: {', '.join(missing)}. pip install 'ghostedge[{extra}]'"
            )
    features = here["features"]
    if features and not DOT_PRODUCTS & set(features):
        advice.append("This CPU has no int8 dot products: int8 gains less here.")
    if saturates(features):
        advice.append(
            "ONNX Runtime's int8 sums saturate on this CPU: check int8 .onnx models' accuracy here."
        )
    return ["what", "version", "extra", "for"], rows, advice or ["Nothing is missing."]


def _packages(requirements: list[str], extra: str) -> list[str]:
    """Return the names of the packages that an extra asks for, from our own metadata."""
    names = set()
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        if f"extra == '{extra}'" in marker.replace('"', "'"):
            names.add(re.split(r"[\s\[<>=!~(]", name.strip(), maxsplit=1)[0])
    return sorted(names - {"ghostedge"})
