"""Where a model's time goes: by block, and by kind of operator."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.errors import GhostEdgeError, needing
from ghostedge.latency.runner import ANY_SIZE, rounds
from ghostedge.runtime import interpreter

COPIES = 4
ROUNDS = (10, 200)
SECONDS = 1.5
"""Each of the two measurements of a .tflite takes about as long, within `ROUNDS`."""

QUARTILE, RESAMPLES = 25, 300

METHODS = {
    "litert": (
        "One thread, XNNPACK; lower quartiles over the rounds, because what else runs on the machine "
        "only adds. Blocks: the file is cut where a single tensor passes, and the prefixes "
        "are timed side by side, each once in every round; a block is the difference of two, with "
        "its 95% bootstrap interval over whole rounds, so that all blocks add up to the whole. "
        f"Operators: each distinct one in models of its own, once with 1 and once with {COPIES} copies "
        "of it; their difference leaves the cost of a call out. A PAD "
        "that only convolutions read counts as nothing: XNNPACK takes it into them. They need not add "
        "up to the whole, as alone they find other caches."
    ),
    "onnxruntime": (
        "One thread, ONNX Runtime's own profiler: the lower quartile of each node. The whole is that "
        "of runs without the profiler; the rest is what stands between nodes, and the profiler itself."
    ),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A block or a kind of operators. Times in milliseconds; error: half width of the 95% interval.

    macs: multiply-accumulates, None where they are not known.
    """

    name: str
    operators: int
    milliseconds: float
    error: float | None
    macs: int | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where one run of a model spends its time, in milliseconds."""

    file: str
    runtime: str
    whole: float
    """The whole model, measured in the same rounds as the blocks."""
    blocks: list[Part]
    """In order, adding up to `whole`; empty for .onnx."""
    kinds: list[Part]
    """Longest first; they do not add up to `whole` (see `METHODS`)."""

    @property
    def method(self) -> str:
        return METHODS[self.runtime]

    def to_json(self) -> dict[str, Any]:
        return _rounded({**dataclasses.asdict(self), "method": self.method, "unit": "ms"})


def profile(path: str | os.PathLike[str]) -> Profile:
    """Measure where one run of a .tflite or .onnx file spends its time, as `METHODS` says.

    Takes a few seconds. Raises GhostEdgeError for other files, for those that cannot be loaded or take
    images of any size, and where the packages of the export extra are not installed.
    """
    path = Path(path)
    if path.suffix not in (".tflite", ".onnx") or not path.is_file():
        raise GhostEdgeError(f"{path} cannot be profiled: name a .tflite or .onnx file.")
    return _litert(path) if path.suffix == ".tflite" else _onnxruntime(path)


def add_profiles(result: dict[str, Any]) -> None:
    """Add "profiles", of each .tflite and .onnx file once, to a result of a bench on this machine."""
    files = dict.fromkeys(row["model"] for row in result["rows"] if row["runtime"] in METHODS)
    result["profiles"] = [{**profile(file).to_json(), "file": file} for file in files]


def _litert(path: Path) -> Profile:
    with needing("export"):
        from ghostedge.convert.audit import kind_of, macs
        from ghostedge.convert.rewrites.flat import Flat
    model = Flat(path.read_bytes())
    for given in model.graph.inputs:
        signature = model.tensors[given].shapeSignature
        if signature is not None and min(signature[1:], default=1) < 1:
            raise GhostEdgeError(ANY_SIZE.format(path))
    # What only unpacks weights (fp16) is done when the model is loaded: it goes with its reader.
    unpacked = {
        op.outputs[0]: op
        for op in model.graph.operators
        if all(model.data(t) is not None for t in op.inputs)
    }

    def part(operators: Sequence[Any], outputs: Sequence[int]) -> bytes:
        read = dict.fromkeys(t for op in operators for t in op.inputs if t in unpacked)
        return model.part([*(unpacked[t] for t in read), *operators], outputs)

    operators = [op for op in model.graph.operators if op.outputs[0] not in unpacked]
    model.graph.operators = operators
    ends = [0, *blocks(model)]
    prefixes = [part(operators[:end], _live(model, end)) for end in ends[1:-1]]
    times = _timed([*map(_invoke, prefixes), _invoke(path.read_bytes())])
    drawn = np.random.default_rng(0).integers(0, times.shape[1], (RESAMPLES, times.shape[1]))
    resampled = np.diff([_low(row[drawn]) for row in times], axis=0, prepend=0)
    spent = np.diff(_low(times), prepend=0)
    parts = []
    for index, (start, end) in enumerate(itertools.pairwise(ends)):
        inside = operators[start:end]
        low, high = np.percentile(resampled[index], (2.5, 97.5))
        shape = "x".join(str(side) for side in model.tensors[inside[-1].outputs[0]].shape[1:])
        parts.append(
            Part(
                name=f"{index + 1} to {shape}",
                operators=len(inside),
                milliseconds=float(spent[index]),
                error=float(high - low) / 2,
                macs=sum(macs(model, op) for op in inside),
            )
        )
    alike = collections.defaultdict(list)
    kinds: dict[str, list[tuple[int, float, int]]] = collections.defaultdict(list)
    for op in operators:
        if _taken_in(model, op):
            kinds["PAD"].append((1, 0.0, 0))
        else:
            alike[_signature(model, op)].append(op)
    alone = _timed(
        [
            _invoke(part(*_copied(model, same[0], count)))
            for same in alike.values()
            for count in (1, COPIES)
        ]
    )
    each = np.maximum(_low(alone[1::2]) - _low(alone[::2]), 0) / (COPIES - 1)
    for same, milliseconds in zip(alike.values(), each, strict=True):
        kinds[kind_of(model, same[0])].append(
            (len(same), len(same) * float(milliseconds), sum(macs(model, op) for op in same))
        )
    return Profile(path.name, "litert", float(_low(times[-1])), parts, _by_time(kinds.items()))


def blocks(model: Any) -> list[int]:
    """Return where a model (`Flat`) can be cut into blocks: numbers of operators, ascending.

    A cut lies where a single computed tensor passes. Operators that follow each other without a
    branch stay together, so that a block is a branch with its join, or a chain between two.
    """
    count = len(model.graph.operators)
    cuts = [end for end in range(1, count) if len(_live(model, end)) == 1] + [count]
    kept, start = [], 0
    for end, following in itertools.pairwise(cuts):
        if end - start > 1 or following - end > 1:
            kept.append(end)
        start = end
    return [*kept, count]


def _live(model: Any, end: int) -> list[int]:
    """Return the tensors that the first `end` operators make and that are still needed."""
    operators = model.graph.operators
    made = {t for op in operators[:end] for t in op.outputs}
    wanted = {t for op in operators[end:] for t in op.inputs} | set(model.graph.outputs)
    given = [t for t in model.graph.inputs if t in wanted]
    return [*sorted(made & wanted), *given]


def _taken_in(model: Any, op: Any) -> bool:
    """Return whether XNNPACK computes a PAD within the convolutions that read it.

    In models of their own PAD and convolution take 2.27 us together, the convolution alone 2.27 and
    the PAD alone 11.2 (34x34x16, int8, x86).
    """
    from ghostedge.convert.audit import kind_of

    if kind_of(model, op) != "PAD":
        return False
    readers = model.readers(op.outputs[0]) or [op]
    return all(kind_of(model, r) in ("CONV_2D", "DEPTHWISE_CONV_2D") for r in readers)


def _signature(model: Any, op: Any) -> tuple[Any, ...]:
    """Return what operators have in common that take the same time."""

    def tensor(number: int) -> tuple[Any, ...] | None:
        if number < 0:
            return None
        entry = model.tensors[number]
        shape = () if entry.shape is None else tuple(entry.shape)
        return entry.type, shape, model.data(number) is None

    options = vars(op.builtinOptions) if op.builtinOptions is not None else {}
    tensors = [tensor(t) for t in (*op.inputs, *op.outputs)]
    return model.kind(op), str(sorted(options.items())), *tensors


def _copied(model: Any, op: Any, count: int) -> tuple[list[Any], list[int]]:
    """Return some copies of one operator, which read the same tensors, and what they make."""
    copies = []
    for _ in range(count):
        twin = copy.copy(op)
        twin.outputs = [model.add(copy.copy(model.tensors[t])) for t in op.outputs]
        copies.append(twin)
    return copies, [t for twin in copies for t in twin.outputs]


def _invoke(content: bytes) -> Callable[[], object]:
    net = interpreter(content)
    random = np.random.default_rng(0)
    for given in net.get_input_details():
        # Any bytes serve an integer; of a float they would be denormals and infinities.
        values = random.integers(0, 128, given["shape"])
        net.set_tensor(given["index"], values.astype(given["dtype"]))
    return net.invoke


def _timed(invokes: Sequence[Callable[[], object]]) -> np.ndarray:
    """Return milliseconds (invokes, rounds), in as many rounds as fit `SECONDS`."""
    rounds(invokes, 3)
    start = time.perf_counter()
    rounds(invokes, 3)
    fitting = SECONDS / ((time.perf_counter() - start) / 3)
    return rounds(invokes, int(np.clip(fitting, *ROUNDS)))


def _low(times: np.ndarray) -> Any:
    """Return lower quartiles over the last axis."""
    return np.percentile(times, QUARTILE, axis=-1)


def _by_time(kinds: Any) -> list[Part]:
    parts = []
    for name, rows in kinds:
        counts, milliseconds, products = zip(*rows, strict=True)
        parts.append(Part(name, sum(counts), sum(milliseconds), None, _total(products)))
    return sorted(parts, key=lambda part: -part.milliseconds)


def _total(products: Sequence[int | None]) -> int | None:
    return None if None in products else sum(p for p in products if p is not None)


def _onnxruntime(path: Path) -> Profile:
    with needing("export"):
        import onnxruntime

        from ghostedge.convert.audit import black, profiled
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    image = black(session, path)
    whole = _timed([lambda: session.run(None, image)])
    nodes: dict[str, list[float]] = collections.defaultdict(list)
    kinds: dict[str, list[tuple[int, float, None]]] = collections.defaultdict(list)
    operator = {}
    for event in profiled(path, onnxruntime.SessionOptions(), whole.shape[1]):
        name = event["args"]["node_index"]
        nodes[name].append(event["dur"] / 1000)
        operator[name] = event["args"]["op_name"]
    for name, times in nodes.items():
        kinds[operator[name]].append((1, float(_low(np.array(times))), None))
    return Profile(path.name, "onnxruntime", float(_low(whole[0])), [], _by_time(kinds.items()))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value
