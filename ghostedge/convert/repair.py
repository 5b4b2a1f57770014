"""The ladder of what int8 is made from, each step tried where those before lose more than is allowed."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

import ghostedge
from ghostedge.convert import (
    fake_quant,
    to_int8_onnx,
    to_int8_tflite,
    to_onnx,
    to_tflite,
    tune,
)
from ghostedge.convert.check import Stage, failure
from ghostedge.convert.fake_quant import Graph
from ghostedge.convert.plan import Limits
from ghostedge.convert.ranges import Ranges, observe, visit
from ghostedge.convert.rewrites.flat import Flat
from ghostedge.errors import CheckFailed, GhostEdgeError, in_a_line
from ghostedge.files import atomic_file, cache
from ghostedge.latency.runner import machine, saturates
from ghostedge.latency.timing import bench

IN_FLOAT = (2, 8, 32)
"""How many of the most sensitive operations are left in float, attempt by attempt."""
SENSED, PROBES = 200, 16
"""Images that sensitivities are measured on, and that tensors of two graphs are matched on."""
RUNS = 50
FEW = 1000
"""Labelled images below which a drop within the limit says little."""

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the quantizers are given: weights, ranges and what stays in float.

    graph: whose weights are used, None for those that the models have. ranges: of the graph's
    tensors, None for those that the calibration images show. in_float: outputs of the operations that
    are not quantized. narrow: ONNX weights in 7 bits. suffix: of the files that it is for.
    """

    name: str
    graph: Graph | None = None
    ranges: Ranges | None = None
    in_float: tuple[str, ...] = ()
    narrow: bool = False
    suffix: str = ""

    def weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        return model if self.graph is None else tune.changed(model, self.graph)


def _check(graph: Graph, core: onnx.ModelProto, images: torch.Tensor) -> None:
    """Raise GhostEdgeError unless the graph computes what ONNX Runtime does."""
    session = onnxruntime.InferenceSession(
        core.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = np.concatenate(
        [session.run(None, {graph.input: image[None].numpy()})[0] for image in images]
    )
    try:
        with torch.no_grad():
            found = graph(images).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    # What an operation's unknown form ends in is any of them.
    except Exception as error:
        raise GhostEdgeError(
            f"The corrections of int8 do not compute what this network does ({in_a_line(error)})."
        ) from error


def _wide_and_narrow(variant: Variant, narrow: bool) -> Iterator[Variant]:
    yield variant
    if narrow:
        name = f"{variant.name}, weights in 7 bits"
        yield dataclasses.replace(variant, name=name, narrow=True, suffix=".onnx")


def ladder(
    core: onnx.ModelProto,
    calibration: np.ndarray,
    real: bool,
    training: np.ndarray | None,
    epochs: int,
    seed: int,
    say: Say,
) -> Iterator[Variant]:
    """Yield what can be tried; each is prepared when it is asked for.

    core: the core graph, as exported. calibration, training: raw pixels, uint8
    (images, size, size, 3). real: whether those to calibrate on are, so that corrections come first:
    from synthetic ones they gain nothing (benchmarks/int8). epochs: of quantization-aware training, 0
    for none.
    """
    plain, narrow = Variant("plain"), saturates(machine()["features"])
    if not real:
        yield from _wide_and_narrow(plain, narrow)
    core = to_onnx.simplified(core)
    images = tune.core_input(torch.from_numpy(calibration))
    try:
        graph = Graph(core)
        _check(graph, core, images[:PROBES])
    except GhostEdgeError as error:
        say(f"  {error}")
        if real:
            yield from _wide_and_narrow(plain, narrow)
        return
    ranges = tune.prepare(graph, images)
    corrected = Variant("channels equalised, biases corrected", graph, ranges)
    if real:
        yield from _wide_and_narrow(corrected, narrow)
    yield from _wide_and_narrow(plain if real else corrected, narrow)
    say("  measure how sensitive each operation is")
    content = onnx_bytes(core), _digest(calibration)
    order = cached(
        "sensitivity",
        content,
        lambda: {"names": np.array(tune.sensitivity(graph, ranges, images[:SENSED]))},
    )["names"]
    for count in IN_FLOAT:
        if count < len(order):
            names = tuple(order[:count].tolist())
            title = f"and {count} of {len(order)} operations in float"
            yield from _wide_and_narrow(Variant(title, graph, ranges, in_float=names), narrow)
    if epochs and training is not None:
        say(f"  quantization-aware training, {epochs} epochs of {len(training)} images")

        def train() -> dict[str, np.ndarray]:
            kept = tune.fine_tune(graph, ranges, training, epochs, seed, say)
            spans = {f"range {name}": np.array(span) for name, span in kept.items()}
            return spans | {k: p.detach().numpy() for k, p in graph.weights.items()}

        found = cached("qat", (*content, _digest(training), f"{epochs} {seed}".encode()), train)
        for key, parameter in graph.weights.items():
            parameter.data = torch.from_numpy(found[key])
        learned = {
            name.removeprefix("range "): (float(span[0]), float(span[1]))
            for name, span in found.items()
            if name.startswith("range ")
        }
        title = f"equalised, {epochs} epochs of quantization-aware training"
        yield from _wide_and_narrow(Variant(title, graph, learned), narrow)


def repair(
    names: list[str],
    attempts: Iterator[Variant],
    make: Callable[[str, Variant], Path],
    measure: Callable[[str, Path], Stage],
    limits: Limits,
    say: Say,
) -> tuple[dict[str, tuple[Path, Stage]], list[dict[str, Any]]]:
    """Try variants on each file until it is inside its limits.

    `make(name, variant)` writes a file, `measure` compares it with the unfolded net. Returns the file
    and figures of each name, and a row for every attempt. Raises CheckFailed with the table of all
    attempts when one is left that no variant brings inside.
    """
    done: dict[str, tuple[Path, Stage]] = {}
    rows: list[dict[str, Any]] = []
    reason = ""
    for variant in attempts:
        for name in [n for n in names if n not in done and n.endswith(variant.suffix)]:
            path = make(name, variant)
            stage = measure(name, path)
            rows.append(_row(variant, stage, path))
            found = failure(stage, limits)
            say(
                f"  {name}, {variant.name}: {_summary(rows[-1])}{'' if found is None else ': too much'}"
            )
            if found is None:
                done[name] = path, stage
            else:
                reason = found
        if len(done) == len(names):
            return done, rows
    raise CheckFailed(f"{reason} Nothing that was tried is inside:", as_text(rows))


class Files:
    """Makes the int8 files of variants, and keeps those it made.

    core, model: the exported core graph and the raw-pixel graph, of the same weights by name. fp32: the
    .tflite of them, where TFLite is wanted. calibration: raw pixels, uint8 (images, size, size, 3).
    """

    def __init__(
        self,
        core: onnx.ModelProto,
        model: Path,
        fp32: Path,
        calibration: np.ndarray,
        batch: int,
        io: str,
        scratch: Path,
    ) -> None:
        self.core, self.model, self.fp32 = core, model, fp32
        self.calibration, self.batch, self.io, self.scratch = calibration, batch, io, scratch
        self.made: list[Path] = []
        self.converted: tuple[bytes, bytes] | None = None

    def make(self, name: str, variant: Variant) -> Path:
        path = self.scratch / f"{len(self.made)}-{name}"
        (self.onnx if name.endswith(".onnx") else self.tflite)(path, variant)
        self.made.append(path)
        return path

    def onnx(self, path: Path, variant: Variant) -> None:
        model = variant.weights(onnx.load(self.model))
        file = self.scratch / "variant.onnx"
        onnx.save(model, file)
        outputs = {name for node in model.graph.node for name in node.output}
        ranges = {name: span for name, span in (variant.ranges or {}).items() if name in outputs}
        nodes = [
            n.name or n.output[0] for n in model.graph.node if set(n.output) & self.spread(variant)
        ]
        to_int8_onnx.quantize(file, path, self.calibration, ranges, nodes, variant.narrow)

    def tflite(self, path: Path, variant: Variant) -> None:
        model = self.float_tflite(variant)
        known: Ranges = {}
        floats: set[str] = set()
        if variant.graph is not None:
            same = match(variant.graph, model, self.calibration, self.batch)
            given = variant.ranges or {}
            known = {name: given[own] for name, own in same.items() if own in given}
            wanted = set(variant.in_float)
            computed = {
                flat.name(op.outputs[0]) for flat in [Flat(model)] for op in flat.graph.operators
            }
            floats = {name for name, own in same.items() if own in wanted and name in computed}
        ranges = observe(model, self.calibration, known)
        path.write_bytes(to_int8_tflite.quantize(model, ranges, self.io, floats))

    def float_tflite(self, variant: Variant) -> bytes:
        """Return the fp32 .tflite of a variant's weights; the last one converted is kept."""
        if variant.graph is None:
            return self.fp32.read_bytes()
        core = variant.weights(to_onnx.simplified(self.core))
        content = onnx_bytes(core)
        if self.converted is None or self.converted[0] != content:
            made = to_tflite.convert(to_onnx.simplified(core, self.batch))
            self.converted = content, made["fp32"]
        return self.converted[1]

    def spread(self, variant: Variant) -> set[str]:
        """Return the outputs of a variant's operations in float with those that they swallow."""
        if variant.graph is None:
            return set()
        return variant.graph.with_swallowed(variant.in_float)


def time_attempts(files: list[Path]) -> dict[str, Any]:
    """Time the files of all attempts side by side: {"unit": "ms", "median": [...]} in their order."""
    rows = bench(files, runs=RUNS)["rows"]
    return {"unit": "ms", "median": [row["median"] for row in rows]}


def _row(variant: Variant, stage: Stage, path: Path) -> dict[str, Any]:
    parity = stage.parity.get("validation") or stage.parity["synthetic"]
    row: dict[str, Any] = {
        "file": stage.name,
        "tried": variant.name,
        "precision": stage.precision,
        "kB": round(path.stat().st_size / 1000, 1),
    }
    if parity.top1 is not None:
        row |= {"top-1": f"{parity.top1:.2f}%"}
        row |= {"points lost": f"{parity.drop:.2f} ± {parity.drop_interval:.2f}"}
    return row | {"same class": f"{parity.agreement:.2%}", "images": parity.images}


def _summary(row: dict[str, Any]) -> str:
    lost = f"{row['points lost']} points lost, " if "points lost" in row else ""
    return f"{lost}same class on {row['same class']}"


def as_text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table for a terminal."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def few_images(stages: list[Stage]) -> str | None:
    """Return the warning about a validation set that is too small to tell, None for none."""
    parities = [s.parity["validation"] for s in stages if "validation" in s.parity]
    if not parities or parities[0].images >= FEW:
        return None
    widest = max(parity.drop_interval or 0 for parity in parities)
    return (
        f"The drop is measured on {parities[0].images} labelled images only: it is uncertain by "
        f"± {widest:.1f} points, so a worse model can pass. Give {FEW} and more."
    )


def match(graph: Graph, model: bytes, images: np.ndarray, batch: int) -> dict[str, str]:
    """Return for tensors of a fp32 .tflite the tensor of the graph that holds the same values.

    Rewrites and the converter rename, fuse and transpose. So both run on some of the `images`, raw
    pixels, and tensors are compared by what does not depend on the order of their values: extremes
    and means of their first three powers, image by image. `batch` is that of the .tflite.
    """
    images = images[: max(1, PROBES // batch) * batch]
    images = np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))
    found: dict[str, list[np.ndarray]] = {}
    wanted: dict[str, np.ndarray] = {}

    def signature(values: np.ndarray) -> np.ndarray:
        v = values.astype(np.float64)
        moments = [np.mean(v), np.mean(v**2) ** 0.5, np.cbrt(np.mean(v**3))]
        return np.array([v.min(), v.max(), *moments])

    def see(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in graph.quantized:
            wanted[name] = np.stack([signature(image.numpy()) for image in value])
        return value

    with torch.no_grad():
        graph(tune.core_input(torch.from_numpy(images)), see)

    def note(name: str, values: np.ndarray) -> None:
        if values.ndim:
            found.setdefault(name, []).extend(signature(image) for image in values)

    visit(model, images, note)
    names = list(wanted)
    table = np.stack([wanted[name] for name in names])
    result = {}
    for name, rows in found.items():
        if len(rows) != len(images):
            continue
        apart = np.abs(table - np.stack(rows)).max((1, 2))
        best = int(apart.argmin())
        span = np.abs(table[best]).max()
        if apart[best] <= 1e-3 * max(span, 1e-6):
            result[name] = names[best]
    return result


def onnx_bytes(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(
        str(array.shape).encode() + np.ascontiguousarray(array).tobytes()
    ).digest()


def cached(
    kind: str, content: tuple[bytes, ...], make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Return what `make` returns, from the user's cache where the same was made before.

    The key is a hash of `content`, of the code that makes it and of the versions; a damaged entry is
    made again. The cache is $XDG_CACHE_HOME/ghostedge, ~/.cache/ghostedge by default.
    """
    digest = hashlib.sha256(f"{ghostedge.__version__} {torch.__version__}".encode())
    for module in (tune, fake_quant):
        digest.update(Path(str(module.__file__)).read_bytes())
    for part in content:
        digest.update(len(part).to_bytes(8, "big") + part)
    file = cache() / f"{kind}-{digest.hexdigest()}.npz"
    try:
        with file.open("rb") as handle, np.load(handle) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        made = make()
    try:
        with atomic_file(file) as temporary, temporary.open("wb") as target:
            np.savez(target, **made)
    except GhostEdgeError:  # a home that cannot be written is no reason to fail
        pass
    return made
