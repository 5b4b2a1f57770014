"""What is inside a model file: its operators and in what arithmetic they run, weights, MACs, memory."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ghostedge.errors import GhostEdgeError, needing
from ghostedge.latency.runner import ANY_SIZE

with needing("export"):
    import numpy as np
    import onnx

    from ghostedge.convert.rewrites.flat import OPS, Flat, schema

CONVERSIONS = ("QUANTIZE", "DEQUANTIZE", "CAST", "QuantizeLinear", "DequantizeLinear", "Cast")
ENDS = ("SOFTMAX", "SUB", "ADD", "MUL", "DIV", "Softmax", "Sub", "Add", "Mul", "Div", "Flatten")
"""What may run in float before the first or behind the last quantized operator of an int8 file: the
normalisation of pixels and the softmax."""
ALIGNMENT = 16

_KINDS = {number: name for name, number in vars(OPS).items() if not name.startswith("_")}
_TYPES = {
    number: name.lower()
    for name, number in vars(schema.TensorType).items()
    if not name.startswith("_")
}
_WIDTHS = {"float16": 2, "int16": 2, "int64": 8, "float64": 8, "int8": 1, "uint8": 1, "bool": 1}
_ONNX_TYPES = {"float": "float32", "double": "float64"}
KERNEL = "_kernel_time"
Tensor = tuple[str, list[int]]
"""Type and shape."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator in a form that both formats share; tensors by name."""

    kind: str
    arithmetic: str
    """"int8", "int16", "float32"; "int32" for what computes shapes, of either kind of file; "hybrid" for
    int8 weights and float32 values; "conversion"."""
    reads: list[str]
    """Computed tensors only."""
    makes: list[str]
    weights: int
    """Bytes of the constants that no operator before it reads."""
    macs: int
    stored: str = ""
    """Type of its weights, where it has any."""


def audit(path: Path) -> dict[str, Any]:
    """Return what is inside a .tflite or .onnx file, ready for JSON and the same each time.

    - operators: {arithmetic: {operator: count}}. Of an .onnx file: after ONNX Runtime's own fusions
      (level "extended", so that they do not depend on the CPU), as a QDQ file says nothing itself.
    - partitions: how many nodes XNNPACK makes of a .tflite here, and outside: the operators left
      to LiteRT's own kernels; both None for .onnx.
    - float_islands: where a file has integer operators, those in float that touch each other:
      {operators, macs, first: name of a tensor, inside: whether integer ones stand on both sides}.
    - half_weights: whether any are stored as float16.
    - weights: {bytes, layers: [{name, operator, bytes}]}, of the weights as they are stored.
    - macs: multiply-accumulates of one run, in the convolutions and matrix products that the file has.
    - peak_activation_bytes: see `arena`.
    - precision: see `precision_of`.
    """
    tflite = path.suffix == ".tflite"
    operators, sizes, ends = _of_tflite(path) if tflite else _of_onnx(path)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for operator in operators:
        counts[operator.arithmetic][operator.kind] += 1
    partitions, outside = _delegated(path) if tflite else (None, None)
    found: dict[str, Any] = {
        "operators": {kind: dict(sorted(names.items())) for kind, names in sorted(counts.items())},
        "partitions": partitions,
        "outside": outside,
        "float_islands": _islands(operators),
        "half_weights": any(operator.stored == "float16" for operator in operators),
        "weights": {
            "bytes": sum(operator.weights for operator in operators),
            "layers": [
                {"name": short(o.makes[0]), "operator": o.kind, "bytes": o.weights}
                for o in operators
                if o.weights
            ],
        },
        "macs": sum(operator.macs for operator in operators),
        "peak_activation_bytes": arena(operators, sizes, ends),
    }
    return {**found, "precision": precision_of(found)}


def precision_of(found: dict[str, Any]) -> str:
    """Return what an audited file may be called.

    "int8" only where every operator computes in integers, except conversions and, at the very
    ends, the normalisation of pixels and the softmax (`ENDS`; ONNX keeps both in float). "mixed"
    where any other float is left in a quantized file, "fp16" for float arithmetic on weights stored
    in 16 bits, else "fp32".
    """
    kinds = set(found["operators"])
    if kinds & {"int8", "int16", "hybrid"}:
        islands = found["float_islands"]
        at_ends = all(not i["inside"] and set(i["operators"]) <= set(ENDS) for i in islands)
        return "int8" if at_ends and not kinds & {"hybrid", "int16"} else "mixed"
    return "fp16" if found["half_weights"] else "fp32"


def short(name: str) -> str:
    """Return the first of the names that TensorFlow joins for a fused operator."""
    return name.split(";")[0]


def arena(operators: Sequence[Operator], sizes: dict[str, int], ends: Iterable[str]) -> int:
    """Return the bytes that hold all activations of one run, weights and scratch not counted.

    Every tensor lives from the operator that makes it to the last one that reads it; inputs from the
    start, `ends` to the end. The largest tensors are placed first, of equal ones the last in `sizes`,
    each at the lowest address free during its life, at multiples of 16 bytes: the greedy planner of
    TensorFlow Lite Micro, whose figure this is where `sizes` are in the file's order.
    """
    rounded = {name: math.ceil(size / ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
    order = {name: index for index, name in enumerate(sizes)}
    first: dict[str, int] = {}
    last: dict[str, int] = dict.fromkeys(ends, len(operators))
    for index, operator in enumerate(operators):
        for name in operator.reads:
            first.setdefault(name, 0)
            last[name] = max(index, last.get(name, 0))
        for name in operator.makes:
            first[name] = index
            last.setdefault(name, index)
    placed: list[tuple[int, int, int, int]] = []
    for name in sorted(first, key=lambda n: (rounded[n], order[n]), reverse=True):
        size, start = rounded[name], 0
        for low, high, born, dead in sorted(placed):
            if born <= last[name] and first[name] <= dead:
                if start + size <= low:
                    break
                start = max(start, high)
        placed.append((start, start + size, first[name], last[name]))
    return max((high for _, high, _, _ in placed), default=0)


def macs(model: Flat, operator: Any) -> int:
    """Return the multiply-accumulates of one operator of a .tflite model, 0 where it has none."""
    kind = _KINDS[model.kind(operator)]
    if kind == "BATCH_MATMUL":
        shapes = [model.tensors[t].shape for t in (operator.inputs[0], operator.outputs[0])]
        shared = shapes[0][-2 if operator.builtinOptions.adjX else -1]
        return int(shared) * math.prod(int(side) for side in shapes[1])
    if kind not in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"):
        return 0
    weight = math.prod(int(side) for side in model.tensors[operator.inputs[1]].shape)
    # A kernel is applied once at each position: of the output, of the input where it is transposed.
    moved = operator.inputs[2] if kind == "TRANSPOSE_CONV" else operator.outputs[0]
    return weight * math.prod(int(side) for side in model.tensors[moved].shape[:-1])


def kind_of(model: Flat, operator: Any) -> str:
    return _KINDS[model.kind(operator)]


def _of_tflite(path: Path) -> tuple[list[Operator], dict[str, int], list[str]]:
    model = Flat(path.read_bytes())

    def name(tensor: int) -> str:
        return f"{model.tensors[tensor].name.decode(errors='replace')};{tensor}"

    def kind(tensor: int) -> str:
        return _TYPES[model.tensors[tensor].type]

    operators, counted = [], {0}
    stored: dict[int, int] = {}
    for op in model.graph.operators:
        reads = [stored.get(t, t) for t in op.inputs if t >= 0]
        constants = [t for t in reads if model.data(t) is not None]
        if kind_of(model, op) == "DEQUANTIZE" and constants:
            # Weights in 16 bits: unpacked once, when the model is loaded.
            stored[op.outputs[0]] = constants[0]
            operators.append(Operator("DEQUANTIZE", "conversion", [], [], 0, 0))
            continue
        new = {model.tensors[t].buffer for t in constants} - counted
        counted |= new
        operators.append(
            Operator(
                kind_of(model, op),
                _arithmetic(
                    kind_of(model, op),
                    [kind(t) for t in (*reads, *op.outputs) if t not in constants],
                    [kind(t) for t in constants],
                ),
                [name(t) for t in reads if t not in constants],
                [name(t) for t in op.outputs],
                sum(len(model.model.buffers[buffer].data) for buffer in new),
                macs(model, op),
                kind(constants[0]) if constants else "",
            )
        )
    sizes = {
        name(t): math.prod(map(int, entry.shape if entry.shape is not None else ()))
        * _WIDTHS.get(kind(t), 4)
        for t, entry in enumerate(model.tensors)
    }
    return operators, sizes, [name(t) for t in model.graph.outputs]


def _arithmetic(kind: str, values: list[str], constants: list[str]) -> str:
    if kind in CONVERSIONS:
        return "conversion"
    computed = set(values)
    if computed & {"float32", "float64", "float16"}:
        return "hybrid" if {"int8", "uint8"} & set(constants) else "float32"
    if "int16" in computed:
        return "int16"
    return "int8" if computed & {"int8", "uint8"} else "int32"


def _delegated(path: Path) -> tuple[int, dict[str, int]]:
    """Return the number of XNNPACK's nodes, and the operators that are in none of them."""
    from ghostedge.runtime import interpreter

    # LiteRT lists the operators of the file first, and each delegate's node behind them.
    listed = interpreter(path.read_bytes())._get_ops_details()
    nodes = [op for op in listed if op["op_name"] == "DELEGATE"]
    own = [op for op in listed if op["op_name"] != "DELEGATE"]
    maker = {int(t): op for op in own for t in op["outputs"]}
    inside = set()
    for node in nodes:
        given, pending = set(map(int, node["inputs"])), list(map(int, node["outputs"]))
        while pending:
            op = maker.get(pending.pop())
            if op is not None and op["index"] not in inside:
                inside.add(op["index"])
                pending += [int(t) for t in op["inputs"] if int(t) not in given]
    left = collections.Counter(op["op_name"] for op in own if op["index"] not in inside)
    return len(nodes), dict(sorted(left.items()))


def _of_onnx(path: Path) -> tuple[list[Operator], dict[str, int], list[str]]:
    model, events = run_onnx(path)
    constants = {t.name: t for t in model.graph.initializer}
    tensors = {
        name: (str(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)), list(t.dims))
        for name, t in constants.items()
    }
    for given in model.graph.input:
        kind = given.type.tensor_type
        sides = [side.dim_value or 1 for side in kind.shape.dim]
        tensors[given.name] = (str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), sides)
    operators: list[Operator] = []
    counted: set[str] = set()
    for node, made in zip(model.graph.node, events, strict=True):
        reads, makes = list(filter(None, node.input)), list(filter(None, node.output))
        tensors.update(zip(makes, made, strict=True))
        weights = [name for name in reads if name in constants]
        new = set(weights) - counted
        counted |= new
        computed = [name for name in reads if name not in constants]
        operators.append(
            Operator(
                node.op_type,
                # Float constants of an integer operator are scales; int8 ones make no hybrid here.
                _arithmetic(node.op_type, [tensors[name][0] for name in computed + makes], []),
                computed,
                makes,
                sum(onnx.numpy_helper.to_array(constants[name]).nbytes for name in new),
                _onnx_macs(node, tensors),
                tensors[weights[0]][0] if weights else "",
            )
        )
    # Reversed, `arena` places equal tensors as they are made; no planner sets an order here.
    sizes = {
        name: math.prod(shape) * _WIDTHS.get(kind, 4)
        for name, (kind, shape) in reversed(tensors.items())
    }
    return operators, sizes, [output.name for output in model.graph.output]


def _onnx_macs(node: onnx.NodeProto, tensors: dict[str, Tensor]) -> int:
    kind = node.op_type.removeprefix("Fused").removeprefix("QLinear")
    if kind not in ("Conv", "Gemm", "QGemm", "MatMul"):
        return 0
    output = tensors[node.output[0]][1]
    if kind == "Conv":
        # Where a scale and a zero point stand behind each operand, the kernel is the fourth.
        weight = tensors[node.input[3 if node.op_type.startswith("Q") else 1]][1]
        return math.prod(weight) * math.prod(output[2:]) * output[0]
    turned = any(a.name == "transA" and a.i for a in node.attribute)
    return int(tensors[node.input[0]][1][-2 if turned else -1]) * math.prod(output)


def run_onnx(path: Path) -> tuple[onnx.ModelProto, list[list[Tensor]]]:
    """Return the graph that ONNX Runtime runs, and what each of its nodes makes, in their order.

    From ONNX Runtime's profiler, which alone knows the shapes behind its fusions. Nodes that it made
    itself have no name to find them by: those of a kind are taken in the order that they ran in.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="ghostedge-") as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        events = profiled(path, options, 1)
        optimized = onnx.load(options.optimized_model_filepath)
    names = {node.name for node in optimized.graph.node}
    made: dict[str, list[list[Tensor]]] = collections.defaultdict(list)
    for event in events:
        name = event["name"].removesuffix(KERNEL)
        made[name if name in names else event["args"]["op_name"]].append(
            [
                (_ONNX_TYPES.get(kind, kind), shape)
                for tensor in event["args"]["output_type_shape"]
                for kind, shape in tensor.items()
            ]
        )
    return optimized, [made[node.name or node.op_type].pop(0) for node in optimized.graph.node]


def black(session: Any, path: Path) -> dict[str, np.ndarray]:
    """Return one black image as the input of a session.

    Raises GhostEdgeError where it takes anything else, or an image of any size.
    """
    given, *others = session.get_inputs()
    if others or given.type != "tensor(float)":
        raise GhostEdgeError(
            f"{path} takes more, or other, than one float image: it has no profile."
        )
    batch, *sides = given.shape
    if not all(isinstance(side, int) for side in sides):
        raise GhostEdgeError(ANY_SIZE.format(path))
    return {given.name: np.zeros([batch if isinstance(batch, int) else 1, *sides], np.float32)}


def profiled(path: Path, options: Any, runs: int) -> list[dict[str, Any]]:
    """Return the events of ONNX Runtime's profiler for the kernels of `runs` runs, one thread."""
    import onnxruntime

    model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = f"{index}:{node.name}"  # events are told apart by it
    with tempfile.TemporaryDirectory(prefix="ghostedge-") as folder:
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        image = black(session, path)
        for _ in range(runs):
            session.run(None, image)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return [event for event in events if event["name"].endswith(KERNEL)]


def _islands(operators: Sequence[Operator]) -> list[dict[str, Any]]:
    """Return the groups of float operators that touch, where the file has integer ones too."""
    whole = ("int8", "int16")
    if not any(operator.arithmetic in whole for operator in operators):
        return []
    before = _reached(operators, whole)
    behind = _reached(_reversed(operators), whole)
    floats = [o for o in operators if o.arithmetic in ("float32", "hybrid")]
    groups: list[list[Operator]] = []
    for operator in floats:
        touched = [g for g in groups if any(set(o.makes) & set(operator.reads) for o in g)]
        groups = [g for g in groups if g not in touched]
        groups.append([*(o for g in touched for o in g), operator])
    return [
        {
            "operators": dict(sorted(collections.Counter(o.kind for o in group).items())),
            "macs": sum(o.macs for o in group),
            "first": short(group[0].makes[0]),
            "inside": any(before & set(o.reads) for o in group)
            and any(behind & set(o.makes) for o in group),
        }
        for group in groups
    ]


def _reached(operators: Sequence[Operator], arithmetic: tuple[str, ...]) -> set[str]:
    """Return the tensors that an operator of some arithmetic takes part in making."""
    found: set[str] = set()
    for operator in operators:
        if operator.arithmetic in arithmetic or found & set(operator.reads):
            found |= set(operator.makes)
    return found


def _reversed(operators: Sequence[Operator]) -> list[Operator]:
    return [dataclasses.replace(o, reads=o.makes, makes=o.reads) for o in reversed(operators)]
