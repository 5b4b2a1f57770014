"""What `ghostedge bench` times, and where: the runner does the timing, here or on a board."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ghostedge import checkpoint
from ghostedge.bundle import is_bundle, read_manifest
from ghostedge.errors import GhostEdgeError
from ghostedge.latency import boards, runner
from ghostedge.runtime import RUNTIMES, installed

BOARD_RUNTIMES = ("litert", "onnxruntime")
# A tensor's field external_data: {key: "location", ...}; reading it properly would take onnx.
EXTERNAL = re.compile(rb"j.{1,2}\n\x08location\x12", re.DOTALL)
Named = str | os.PathLike[str]


def bench(
    models: Sequence[Named],
    *,
    on: str | None = None,
    against: Sequence[Named] = (),
    runtimes: Sequence[str] | None = None,
    threads: Sequence[int] = (1,),
    runs: int = 200,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time models against each other as `runner.PROTOCOL` says.

    models, against: files, names of shipped weights, or bundles, of which every artefact is timed
    whose runtime is installed; those of `against` come first, and each model is compared with the
    one of its file name among them. on: a board's ssh name; None is this machine. runtimes: of
    `RUNTIMES`, all by default. threads: each number is a row of its own. runs: rounds, made up to a multiple
    of five. say: is given a line for each step. Returns one of the "results" in bench.schema.json, times
    in ms. Raises GhostEdgeError for what cannot be timed or reached.
    """
    if runs < 1 or not threads or min(threads) < 1:
        raise GhostEdgeError("A bench needs at least one run and one thread.")
    for runtime in runtimes or ():
        if runtime not in RUNTIMES:
            raise GhostEdgeError(
                f"There is no runtime {runtime!r}: choose of {', '.join(RUNTIMES)}."
            )
    allowed = RUNTIMES if on is None else BOARD_RUNTIMES
    chosen = set(allowed).intersection(runtimes or allowed)
    base = [file for model in against for file in _files(model, chosen, on)]
    files = base + [f for model in models for f in _files(model, chosen, on) if f not in base]
    if len(files) == len(base):
        if any(_files(model, chosen, on) for model in models):
            raise GhostEdgeError("Every model is one of --against: name another one to time.")
        remedy = (
            f"name one that runs on {' or '.join(sorted(chosen))}, and whose runtime is installed."
            if on is None
            else "a board runs .tflite and .onnx files; export a checkpoint first."
        )
        raise GhostEdgeError(f"There is no model to time: {remedy}")
    result = boards.run(on, files, len(base), threads, runs, say)
    for row, (path, _) in zip(result["rows"], files * len(threads), strict=True):
        row |= _of_bundle(path, row["sha256"])
    return result


def _files(model: Named, runtimes: set[str], on: str | None) -> list[tuple[Path, str]]:
    """Return (file, what to call it) of a model, or of each artefact of a bundle."""
    path, name = Path(model), os.fspath(model)
    if path.is_dir():
        artefacts = read_manifest(path)["artefacts"].items()
        return [
            (path / name, str(path / name))
            for name, entry in artefacts
            if entry["runtime"] in runtimes and (on is not None or installed(entry["runtime"]))
        ]
    if not path.exists() and path.suffix not in (".tflite", ".onnx"):
        path = checkpoint.find(name)
    try:
        runtime = runner.kind(os.fspath(path))
    except runner.Problem as problem:
        raise GhostEdgeError(str(problem)) from problem
    if runtime == "onnxruntime" and EXTERNAL.search(path.read_bytes()):
        raise GhostEdgeError(
            f"{path} keeps its weights in another file, which a bench does not take along: export it "
            "into one (torch.onnx.export has external_data=False for that), or make one of a float "
            f"classifier with: ghostedge export {path} --format onnx (and its --mean and --std)."
        )
    return [(path, name)] if runtime in runtimes else []


def _of_bundle(path: Path, digest: str) -> dict[str, Any]:
    """Return the precision and the top-1 that the bundle of a model tells, which read its operators."""
    manifest = read_manifest(path.parent) if is_bundle(path.parent) else {"artefacts": {}}
    entry = manifest["artefacts"].get(path.name)
    if entry is None or entry["sha256"] != digest:
        return {"accuracy": None}
    return {
        "precision": entry["precision"],
        "accuracy": _accuracy(manifest["stages"], path.name),
    }


def _accuracy(stages: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the top-1 that a bundle reports of a file, of its test part where it has one."""
    for stage in stages:
        for part in ("test", "validation"):
            parity = stage["parity"].get(part)
            if stage["name"] == name and parity and parity["top1"] is not None:
                return {"top1": parity["top1"], "set": part, "images": parity["images"]}
    return None
