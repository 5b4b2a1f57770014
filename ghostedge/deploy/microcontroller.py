"""The int8 model for TensorFlow Lite Micro: C arrays, operators, arena, constants, golden images."""

from __future__ import annotations

import math
import string
from pathlib import Path

import numpy as np

from ghostedge.bundle import GOLDEN, LABELS, SEAL
from ghostedge.deploy.target import Filled, Handover, Need, Target
from ghostedge.errors import GhostEdgeError

MODEL = "model_int8.tflite"
TESTED = "0.dev20261023182759"
"""The tflite-micro of PyPI that the tests run."""
IMAGES = 4
SCRATCH = 1.1
"""Room in the arena for what vendors' kernels take beside TFLM's own."""

# Of MicroMutableOpResolver: Add... without "Add", in capitals the operator's name without "_".
RESOLVER = {
    name.upper(): name
    for name in """
    Abs Add AddN AveragePool2D BatchMatMul BroadcastTo Cast Concatenation Conv2D DepthToSpace
    DepthwiseConv2D Dequantize Div Elu Exp ExpandDims FullyConnected Gather HardSwish L2Normalization
    L2Pool2D LeakyRelu Logistic LogSoftmax Maximum MaxPool2D Mean Minimum MirrorPad Mul Neg Pack Pad
    PadV2 Prelu Quantize ReduceMax ReduceMin Relu Relu6 Reshape ResizeBilinear ResizeNearestNeighbor
    Rsqrt Slice Softmax SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze StridedSlice
    Sub Sum Tanh Transpose TransposeConv Unpack
    """.split()
}


def _fill(handover: Handover) -> Filled:
    artefact = handover.manifest["artefacts"][MODEL]
    if artefact["precision"] != "int8":
        raise GhostEdgeError(
            f"microcontroller needs {MODEL} to compute in integers alone, and that of "
            f"{handover.bundle} keeps operators in float: export it again with a larger --max-drop."
        )
    content = (handover.bundle / MODEL).read_bytes()
    needed = arena(handover.bundle / MODEL)
    room = math.ceil(needed * SCRATCH / 1024) * 1024
    methods = _methods(artefact["audit"]["operators"])
    added = "".join(f"  TF_LITE_ENSURE_STATUS(ops.Add{method}());\n" for method in methods)
    labels = "".join(f"    {_literal(label)},\n" for label in handover.labels)
    output = artefact["output"]
    first = f"// Made by ghostedge of the bundle {handover.manifest[SEAL]}; do not edit.\n"
    files = {
        "model.h": f"""{first}#pragma once

#include <cstddef>
#include <cstdint>

namespace model {{

constexpr int kSize = {handover.size};  // height and width of an image, in RGB
constexpr int kClasses = {len(handover.labels)};
constexpr int kImageBytes = kSize * kSize * 3;

// An input value is a pixel, 0 to 255, less 128. An output value stands for the probability
// (value - kZeroPoint) * kScale.
constexpr int kPixelOffset = 128;
constexpr float kScale = {output["scale"]!r}f;
constexpr int kZeroPoint = {output["zero_point"]};

// {needed} bytes for TensorFlow Lite Micro's own kernels, and a tenth more for a vendor's.
constexpr size_t kArenaBytes = {room};

constexpr size_t kBytes = {len(content)};
extern const unsigned char kData[kBytes];  // the .tflite file, at a multiple of 16
extern const char* const kLabels[kClasses];  // in UTF-8

}}  // namespace model
""",
        "model.cc": f"""{first}#include "model.h"

namespace model {{

const char* const kLabels[kClasses] = {{
{labels}}};

alignas(16) const unsigned char kData[kBytes] = {{
{_numbers(content)}}};

}}  // namespace model
""",
        "model_ops.h": f"""{first}#pragma once

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

namespace model {{

using Ops = tflite::MicroMutableOpResolver<{len(methods)}>;

// The operators of the model, and no others, so that only their kernels are linked.
inline TfLiteStatus AddOps(Ops& ops) {{
{added}  return kTfLiteOk;
}}

}}  // namespace model
""",
        **_golden(handover, first),
    }
    encoded = {name: text.encode() for name, text in files.items()}
    encoded |= {name: (handover.bundle / name).read_bytes() for name in (LABELS, GOLDEN)}
    shown = min(IMAGES, handover.manifest["golden"]["images"])
    golden_bytes = shown * (3 * handover.size**2 + len(handover.labels))
    more = {"computed": needed, "arena": room, "golden_bytes": golden_bytes}
    return {**more, "methods": methods, "tested": TESTED}, encoded


def arena(path: Path) -> int:
    """Return the bytes that TensorFlow Lite Micro needs beside an int8 model, without other kernels.

    Its plan of the activations, exactly, and an upper bound of what it keeps of every tensor,
    operator and channel on a 64-bit machine; on a 32-bit one that is less. In all 0.1 to 4.7% above
    what tflite-micro (TESTED) used for 57 models, registered networks at 32 and 96 pixels.
    """
    from ghostedge.convert.audit import audit, kind_of
    from ghostedge.convert.rewrites.flat import Flat

    model = Flat(path.read_bytes())
    scaled = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
    channels = sum(
        int(model.tensors[op.outputs[0]].shape[-1])
        for op in model.graph.operators
        if kind_of(model, op) in scaled
    )
    # A TfLiteEvalTensor; a node with its registration and at most 112 bytes of its kernel's own; a
    # multiplier and a shift.
    kept = 24 * len(model.tensors) + (64 + 112) * len(model.graph.operators) + 8 * channels
    return int(audit(path)["peak_activation_bytes"]) + kept + 1024


def _methods(operators: dict[str, dict[str, int]]) -> list[str]:
    kinds = sorted({kind for counts in operators.values() for kind in counts})
    unknown = [kind for kind in kinds if kind.replace("_", "") not in RESOLVER]
    if unknown:
        raise GhostEdgeError(
            f"TensorFlow Lite Micro has no {', '.join(unknown)}, which {MODEL} needs: choose another "
            "network (`ghostedge list`)."
        )
    return [RESOLVER[kind.replace("_", "")] for kind in kinds]


def _golden(handover: Handover, first: str) -> dict[str, str]:
    """Return the first golden images with a clear best class, and the reference kernels' outputs."""
    outputs = handover.golden[f"{MODEL}:reference"]
    chosen = handover.clearest(MODEL, "reference", IMAGES)

    def rows(values: np.ndarray) -> str:
        return "".join(f"    {{\n{_numbers(row.ravel().tolist())}    }},\n" for row in values)

    return {
        "golden.h": f"""{first}#pragma once

#include "model.h"

namespace golden {{

// Synthetic images as a camera gives them, and what the reference kernels say of each.
constexpr int kImages = {len(chosen)};
extern const uint8_t kPixels[kImages][model::kImageBytes];
extern const int8_t kOutputs[kImages][model::kClasses];

}}  // namespace golden
""",
        "golden.cc": f"""{first}#include "golden.h"

namespace golden {{

const uint8_t kPixels[kImages][model::kImageBytes] = {{
{rows(handover.golden["images"][chosen])}}};

const int8_t kOutputs[kImages][model::kClasses] = {{
{rows(outputs[chosen])}}};

}}  // namespace golden
""",
    }


def _numbers(values: bytes | list[int]) -> str:
    lines = (values[start : start + 20] for start in range(0, len(values), 20))
    return "".join(f"    {', '.join(map(str, line))},\n" for line in lines)


def _literal(text: str) -> str:
    """Return a string literal of C; octal is the one escape that ends by itself."""
    plain = string.ascii_letters + string.digits + " _-+.,:;()/&"
    inside = "".join(chr(b) if chr(b) in plain else f"\\{b:03o}" for b in text.encode())
    return f'"{inside}"'


TARGET = Target(
    summary="TensorFlow Lite Micro: C arrays, operators, arena, constants, a main.cc, a self-test",
    needs=(
        Need(
            MODEL,
            MODEL,
            "--recipe microcontroller",
            "int8",
            "a board's fast kernels are int8 ones and bytes as they are would cost two operators",
        ),
    ),
    fill=_fill,
)
