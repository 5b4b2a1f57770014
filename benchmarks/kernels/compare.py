"""Where XNNPACK and LiteRT's reference kernels part on an int8 model, and which of them is right.

    python benchmarks/kernels/compare.py BUNDLE DATA [IMAGES]

BUNDLE holds model_int8.tflite and model_fp32.tflite of one network, with uint8 or int8 inputs; DATA is a
folder of labelled images, of whose training part the held-out split of seed 0 is used. Every operator
becomes a model of its own, once for XNNPACK and once for the reference kernels, and is computed a
third time in float64 and rounded once ("exact"). Given the same inputs, the outputs tell how each
kernel rounds; run one behind the other, kind by kind with the kernels of the one or the other, they
tell which kinds make the outputs of the model part. IMAGES (1,000) images go through the whole model,
a fifth of them operator by operator, a fiftieth through the comparison of rounding. Prints two tables
and writes results.json.
"""

from __future__ import annotations

import collections
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ghostedge.bundle import read_manifest
from ghostedge.convert.audit import kind_of
from ghostedge.convert.rewrites.flat import Flat, schema
from ghostedge.data.sources import open_data, split
from ghostedge.latency.runner import machine
from ghostedge.runtime import Classifier, interpreter

HERE = Path(__file__).parent
Values = dict[int, np.ndarray]
NUMPY = {
    schema.TensorType.INT8: np.int8,
    schema.TensorType.UINT8: np.uint8,
    schema.TensorType.INT32: np.int32,
}


class Kernel:
    """One operator in an interpreter of its own."""

    def __init__(self, model: Flat, op: Any, kernels: str) -> None:
        self.net = interpreter(model.part([op], list(op.outputs)), kernels=kernels)
        self.reads = list(dict.fromkeys(t for t in op.inputs if t >= 0 and model.data(t) is None))
        first = [t for t in model.graph.inputs if t in self.reads]
        self.reads = [*first, *(t for t in self.reads if t not in first)]
        self.given = [tensor["index"] for tensor in self.net.get_input_details()]
        self.made = self.net.get_output_details()[0]["index"]

    def __call__(self, values: Values) -> np.ndarray:
        for tensor, index in zip(self.reads, self.given, strict=True):
            self.net.set_tensor(index, values[tensor])
        self.net.invoke()
        return self.net.get_tensor(self.made)


class Exact:
    """One operator in float64, rounded once to the nearest step, ties to even."""

    def __init__(self, model: Flat, op: Any) -> None:
        self.model, self.op = model, op
        self.output = model.tensors[op.outputs[0]]
        self.dtype = NUMPY[self.output.type]
        self.compute = getattr(self, kind_of(model, op).lower())
        self.low, self.high = float(np.iinfo(self.dtype).min), float(np.iinfo(self.dtype).max)
        activation = getattr(op.builtinOptions, "fusedActivationFunction", 0)
        scale, zero = self.scales(op.outputs[0])
        if activation:
            self.low = max(self.low, float(zero))
        if activation == schema.ActivationFunctionType.RELU6:
            self.high = min(self.high, float(np.round(6 / scale[0]) + zero))

    def scales(self, tensor: int) -> tuple[np.ndarray, int]:
        stored = self.model.tensors[tensor].quantization
        return np.asarray(stored.scale, np.float64), int(stored.zeroPoint[0])

    def real(self, values: Values, position: int) -> np.ndarray:
        tensor = self.op.inputs[position]
        scale, zero = self.scales(tensor)
        return (values[tensor].astype(np.float64) - zero) * scale[0]

    def constant(self, position: int) -> np.ndarray:
        entry = self.model.tensors[self.op.inputs[position]]
        data = self.model.data(self.op.inputs[position])
        assert data is not None
        return np.frombuffer(data.tobytes(), NUMPY[entry.type]).reshape(entry.shape)

    def unrounded(self, values: Values) -> np.ndarray:
        """Return the output in steps before rounding, within the range of the activation."""
        scale, zero = self.scales(self.op.outputs[0])
        return np.clip(self.compute(values) / scale[0] + zero, self.low, self.high)

    def __call__(self, values: Values) -> np.ndarray:
        return np.rint(self.unrounded(values)).astype(self.dtype)

    def products(self, values: Values, depthwise: bool) -> np.ndarray:
        """The convolution, its sums in whole numbers."""
        options = self.op.builtinOptions
        scale, zero = self.scales(self.op.inputs[0])
        weight_scale, _ = self.scales(self.op.inputs[1])
        x = values[self.op.inputs[0]].astype(np.int64) - zero
        w = self.constant(1).astype(np.int64)
        kernel, strides = w.shape[1:3], (options.strideH, options.strideW)
        margins = [(0, 0)]
        for side, size, stride in zip(x.shape[1:3], kernel, strides, strict=True):
            total = 0
            if options.padding == schema.Padding.SAME:
                total = max((-(-side // stride) - 1) * stride + size - side, 0)
            margins.append((total // 2, total - total // 2))
        x = np.pad(x, [*margins, (0, 0)])
        windows = sliding_window_view(x, kernel, (1, 2))[:, :: strides[0], :: strides[1]]
        if depthwise:
            sums = np.einsum("nhwcij,ijc->nhwc", windows, w[0])
        else:
            n, h, width = windows.shape[:3]
            flat = windows.reshape(n * h * width, -1).astype(np.float64)
            matrix = w.transpose(3, 1, 2, 0).reshape(-1, len(w)).astype(np.float64)
            sums = (flat @ matrix).reshape(n, h, width, -1)  # below 2^53: exact
        return (sums + self.constant(2)) * (scale[0] * weight_scale)

    def conv_2d(self, values: Values) -> np.ndarray:
        return self.products(values, depthwise=False)

    def depthwise_conv_2d(self, values: Values) -> np.ndarray:
        return self.products(values, depthwise=True)

    def fully_connected(self, values: Values) -> np.ndarray:
        scale, zero = self.scales(self.op.inputs[0])
        weight_scale, _ = self.scales(self.op.inputs[1])
        w = self.constant(1).astype(np.int64)
        x = values[self.op.inputs[0]].astype(np.int64).reshape(-1, w.shape[1]) - zero
        return (x @ w.T + self.constant(2)) * (scale[0] * weight_scale)

    def add(self, values: Values) -> np.ndarray:
        return self.real(values, 0) + self.real(values, 1)

    def mul(self, values: Values) -> np.ndarray:
        return self.real(values, 0) * self.real(values, 1)

    def logistic(self, values: Values) -> np.ndarray:
        return 1 / (1 + np.exp(-self.real(values, 0)))

    def softmax(self, values: Values) -> np.ndarray:
        powers = np.exp(self.real(values, 0) * self.op.builtinOptions.beta)
        return powers / powers.sum(-1, keepdims=True)

    def mean(self, values: Values) -> np.ndarray:
        axes = tuple(self.constant(1).tolist())
        return self.real(values, 0).mean(axes, keepdims=self.op.builtinOptions.keepDims)

    def reshape(self, values: Values) -> np.ndarray:
        return self.real(values, 0).reshape(self.output.shape)

    def pad(self, values: Values) -> np.ndarray:
        return np.pad(self.real(values, 0), self.constant(1))

    def concatenation(self, values: Values) -> np.ndarray:
        parts = [self.real(values, position) for position in range(len(self.op.inputs))]
        return np.concatenate(parts, self.op.builtinOptions.axis)

    def quantize(self, values: Values) -> np.ndarray:
        return self.real(values, 0)


class Disturbed:
    """A kernel with a share of its outputs moved up or down by one step, at random."""

    def __init__(self, kernel: Kernel, share: float, random: np.random.Generator) -> None:
        self.kernel, self.share, self.random = kernel, share, random

    def __call__(self, values: Values) -> np.ndarray:
        output = self.kernel(values)
        moved = self.random.random(output.shape) < self.share
        steps = output.astype(int) + moved * self.random.choice([-1, 1], output.shape)
        # A ReLU's zeros stay: the reference kernels do not move them either.
        return np.clip(steps, output.min(), output.max()).astype(output.dtype)


Run = Callable[[Values], np.ndarray]


def forward(model: Flat, runs: list[Run], image: np.ndarray) -> Values:
    values = {model.graph.inputs[0]: image}
    for op, run in zip(model.graph.operators, runs, strict=True):
        values[op.outputs[0]] = run(values)
    return values


def chain(model: Flat, runs: list[Run], images: np.ndarray) -> np.ndarray:
    """Return the model's outputs, operator behind operator."""
    end = model.graph.outputs[0]
    return np.concatenate([forward(model, runs, image[None])[end] for image in images])


def rounding(
    model: Flat, kernels: Mapping[str, list[Any]], images: np.ndarray
) -> dict[str, dict[str, Any]]:
    """By kind: share of outputs that each kernel rounds to another step, and how far it is off."""
    found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    errors: dict[tuple[str, str], list[np.ndarray]] = collections.defaultdict(list)
    apart: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for image in images:
        values = forward(model, kernels["xnnpack"], image[None])
        for index, op in enumerate(model.graph.operators):
            kind = kind_of(model, op)
            exact = kernels["exact"][index].unrounded(values)
            made = {name: kernels[name][index](values) for name in ("xnnpack", "reference")}
            for name, output in made.items():
                errors[kind, name].append((output.astype(np.float64) - exact).ravel())
            steps = made["xnnpack"].astype(int) - made["reference"].astype(int)
            apart[kind].append(steps.ravel())
    for kind, parts in apart.items():
        steps = np.concatenate(parts)
        found[kind] = {"values": len(steps), "differ": float((steps != 0).mean())}
        found[kind]["steps apart"] = int(np.abs(steps).max())
        for name in ("xnnpack", "reference"):
            error = np.concatenate(errors[kind, name])
            found[kind][name] = {
                "not nearest": float((np.abs(error) > 0.5 + 1e-4).mean()),
                "furthest": round(float(np.abs(error).max()), 3),
                "bias": round(float(error.mean()), 5),
            }
    return dict(sorted(found.items()))


def compared(found: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    steps = np.abs(found.astype(int) - other.astype(int))
    return {
        "identical bytes": float((steps == 0).mean()),
        "furthest step": int(steps.max()),
        "same top-1": float((found.argmax(1) == other.argmax(1)).mean()),
    }


def closeness(found: np.ndarray, floats: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    shares = (found.astype(np.float64) - np.iinfo(found.dtype).min) / 256
    return {
        "same top-1 as float": float((found.argmax(1) == floats.argmax(1)).mean()),
        "mean distance to float": float(np.abs(shares - floats).mean()),
        "top-1": float((found.argmax(1) == labels).mean()),
    }


def main(bundle: str, data: str, count: str = "1000") -> None:
    source = open_data(data).train
    assert source is not None
    _, rest = split(source, 0.1, 0)
    chosen = np.sort(np.random.default_rng(0).choice(rest, int(count), replace=False))
    manifest = read_manifest(bundle)
    file = Path(bundle, "model_int8.tflite")
    classifier = Classifier(file)
    read = source.read(classifier.size, chosen)
    images, labels = read.pixels, read.labels
    floats = Classifier(Path(bundle, "model_fp32.tflite"))(images)
    model = Flat(file.read_bytes())
    operators = list(model.graph.operators)
    kernels: dict[str, list[Any]] = {
        "xnnpack": [Kernel(model, op, "default") for op in operators],
        "reference": [Kernel(model, op, "reference") for op in operators],
        "exact": [Exact(model, op) for op in operators],
    }
    whole = {
        "xnnpack": classifier.raw(images),
        "reference": Classifier(file, kernels="reference").raw(images),
    }
    everything = {
        name: {
            "against xnnpack": compared(found, whole["xnnpack"]),
            **closeness(found, floats, labels),
        }
        for name, found in whole.items()
    }
    images, labels, floats = (x[: max(1, len(x) // 5)] for x in (images, labels, floats))
    whole = {name: found[: len(images)] for name, found in whole.items()}
    for name, outputs in whole.items():
        same = (chain(model, kernels[name], images[:20]) == outputs[:20]).all()
        assert same, f"one operator at a time, {name} gives other outputs"
    few = images[: max(1, int(count) // 50)]
    by_kind = rounding(model, kernels, few)
    whole["exact"] = chain(model, kernels["exact"], images)
    rows = {f"all {name}": whole[name] for name in whole}
    for kind in by_kind:
        if by_kind[kind]["differ"]:
            mixed = [
                kernels["reference" if kind_of(model, op) == kind else "xnnpack"][index]
                for index, op in enumerate(operators)
            ]
            rows[f"{kind} reference, the rest xnnpack"] = chain(model, mixed, images)
    sound = [
        kernels["exact" if kind_of(model, op) == "MEAN" else "reference"][index]
        for index, op in enumerate(operators)
    ]
    rows["MEAN exact, the rest reference"] = chain(model, sound, images)
    random = np.random.default_rng(0)
    moved = [
        Disturbed(run, by_kind[kind_of(model, op)]["reference"]["not nearest"], random)
        if kind_of(model, op) in ("CONV_2D", "DEPTHWISE_CONV_2D", "MUL")
        else run
        for op, run in zip(operators, kernels["xnnpack"], strict=True)
    ]
    rows["xnnpack, as many values moved at random"] = chain(model, moved, images)
    outputs = {
        name: {
            "against xnnpack": compared(found, whole["xnnpack"]),
            "against exact": compared(found, whole["exact"]),
            **closeness(found, floats, labels),
        }
        for name, found in rows.items()
    }
    result = {
        "command": shlex.join(["python", "benchmarks/kernels/compare.py", "BUNDLE", data, count]),
        "bundle": {key: manifest[key] for key in ("name", "versions", "calibration")},
        "machine": machine(),
        "images": {"whole": int(count), "outputs": len(images), "rounding": len(few)},
        "whole": everything,
        "rounding": by_kind,
        "outputs": outputs,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{'kind':20}{'differ':>9}{'apart':>7}   not nearest, furthest, bias: xnnpack | reference"
    )
    for kind, row in by_kind.items():
        print(f"{kind:20}{row['differ']:9.3%}{row['steps apart']:7}   ", end="")
        print(
            " | ".join(
                f"{r['not nearest']:8.3%} {r['furthest']:7.3f} {r['bias']:+.4f}"
                for r in (row["xnnpack"], row["reference"])
            )
        )
    for name, row in everything.items():
        print(f"{count} images, whole model, {name}: {row}")
    print(f"\n{'':46}identical to xnnpack / exact   same top-1   steps   float: top-1, distance")
    for name, row in outputs.items():
        first, second = row["against xnnpack"], row["against exact"]
        print(
            f"{name:46}{first['identical bytes']:9.1%} /{second['identical bytes']:7.1%}"
            f"{first['same top-1']:9.1%} /{second['same top-1']:7.1%}"
            f"{first['furthest step']:5} /{second['furthest step']:3}"
            f"{row['same top-1 as float']:9.1%} {row['mean distance to float']:.5f} {row['top-1']:.1%}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
