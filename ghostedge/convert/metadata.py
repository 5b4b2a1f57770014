"""What a model file says of itself: TFLite metadata as MediaPipe reads it, ONNX metadata_props.

The TFLite tables are those of metadata_schema.fbs (its version 1.0), written one by one: MediaPipe's
own writer fails in 1.2.2, and its generated code is 3,000 lines for these nine.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np

from ghostedge.bundle import LABELS
from ghostedge.convert.check import Stage
from ghostedge.convert.rewrites.flat import Flat, schema
from ghostedge.convert.to_onnx import PRODUCER
from ghostedge.pixels import PixelContract

FIELDS = {
    "ModelMetadata": "name description version subgraph_metadata author license associated_files "
    "min_parser_version",
    "SubGraphMetadata": "name description input_tensor_metadata output_tensor_metadata",
    "TensorMetadata": "name description dimension_names content process_units stats "
    "associated_files",
    "AssociatedFile": "name description type locale",
    "Content": "content_properties_type content_properties range",
    "ImageProperties": "color_space default_size",
    "ProcessUnit": "options_type options",
    "NormalizationOptions": "mean std",
    "Stats": "max min",
}
"""The fields of each table in the order of the schema, a union's type before it."""
IMAGE_PROPERTIES, NORMALIZATION, RGB, TENSOR_AXIS_LABELS = 2, 1, 1, 2


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is written into every model of an export, beside what its own tensors say."""

    name: str
    version: str
    author: str
    licence: str | None
    labels: list[str]
    pixels: PixelContract


def accuracy(stage: Stage, data: str | None, source: Mapping[str, Any]) -> str:
    """Return what was measured of a stage, on what, in a sentence or two.

    Without labelled images of `data` that is the agreement with the float net, and that net's top-1
    where `source`, which is what a checkpoint records as JSON, has it.
    """
    measured = [
        f"{parity.top1:.2f}% of {parity.images} {name} images"
        for name, parity in stage.parity.items()
        if parity.top1 is not None
    ]
    if measured:
        return f"Top-1: {' and '.join(measured)} of {data}."
    synthetic = stage.parity["synthetic"]
    line = (
        f"It names the same class as the float net on {synthetic.agreement:.2%} of "
        f"{synthetic.images} synthetic images; no labelled images were given."
    )
    known = source.get("accuracy", {})
    recorded = [
        f"{known[name]['top1']:.2f}% of {known[name]['images']} {name} images"
        for name in ("validation", "test")
        if name in known
    ]
    if recorded:
        where = source.get("data", {}).get("name", "its data")
        line += (
            f" That net's top-1, as its checkpoint records: {' and '.join(recorded)} of {where}."
        )
    return line


def write(path: Path, facts: Facts, measured: str) -> None:
    """Write the facts into a .tflite or .onnx file; what it computes stays."""
    if path.suffix == ".tflite":
        path.write_bytes(into_tflite(path.read_bytes(), facts, measured))
        return
    import onnx

    model = onnx.load(path)
    into_onnx(model, facts, measured)
    onnx.save(model, path)


def into_onnx(model: Any, facts: Facts, measured: str) -> None:
    """Write the facts into the model's metadata_props, in place."""
    from onnx import helper

    size = facts.pixels.size
    model.producer_name = PRODUCER
    props = {
        "name": facts.name,
        "description": _description(facts, size, measured),
        "version": facts.version,
        "author": facts.author,
        "license": facts.licence,
        "labels": "\n".join(facts.labels),
        "input_range": "0 255",
        "pixels": json.dumps(facts.pixels.to_json(), sort_keys=True),
        "accuracy": measured,
    }
    helper.set_model_props(model, {key: text for key, text in props.items() if text is not None})


def into_tflite(content: bytes, facts: Facts, measured: str) -> bytes:
    """Return a .tflite file with the facts as its metadata, and the labels packed behind it.

    A float input declares mean 0 and std 1, that is, pixels as they are: MediaPipe asks for both. A
    uint8 one declares none, as MediaPipe copies the pixels in. The passes on the converted file come
    before: they would lose what is behind it. Same input, same bytes.
    """
    model = Flat(content)
    image = model.tensors[model.graph.inputs[0]]
    signed = image.type == schema.TensorType.INT8
    described = _table(
        "ModelMetadata",
        name=facts.name,
        description=_description(facts, int(image.shape[1]), measured),
        version=facts.version,
        author=facts.author,
        license=facts.licence,
        subgraph_metadata=[
            _table(
                "SubGraphMetadata",
                input_tensor_metadata=[
                    _table(
                        "TensorMetadata",
                        name="image",
                        description=f"RGB pixels, 0 to 255{', minus 128' if signed else ''}.",
                        content=_table(
                            "Content",
                            content_properties_type=IMAGE_PROPERTIES,
                            content_properties=_table("ImageProperties", color_space=RGB),
                        ),
                        process_units=_unchanged()
                        if image.type == schema.TensorType.FLOAT32
                        else None,
                        stats=_table(
                            "Stats",
                            max=[127.0 if signed else 255.0],
                            min=[-128.0 if signed else 0.0],
                        ),
                    )
                ],
                output_tensor_metadata=[
                    _table(
                        "TensorMetadata",
                        name="probabilities",
                        description="Of each label, 0 to 1; they add up to 1.",
                        stats=_table("Stats", max=[1.0], min=[0.0]),
                        associated_files=[
                            _table("AssociatedFile", name=LABELS, type=TENSOR_AXIS_LABELS)
                        ],
                    )
                ],
            )
        ],
        min_parser_version="1.0.0",
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, described), b"M001")
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = np.frombuffer(bytes(builder.Output()), np.uint8)
    model.model.buffers.append(buffer)
    entry.name, entry.buffer = "TFLITE_METADATA", len(model.model.buffers) - 1
    model.model.metadata = [*(model.model.metadata or []), entry]
    packed = io.BytesIO(bytes(model))
    with zipfile.ZipFile(packed, "a") as archive:
        # A ZipInfo of one's own has a fixed date.
        archive.writestr(zipfile.ZipInfo(LABELS), "".join(f"{x}\n" for x in facts.labels))
    return packed.getvalue()


def _description(facts: Facts, side: int, measured: str) -> str:
    size = facts.pixels.size
    averaged = f" (averaged to {size}x{size} inside)" if side != size else ""
    return (
        f"Classifies RGB images of {side}x{side} pixels{averaged} into {len(facts.labels)} classes. "
        f"Takes raw pixels: normalisation and softmax are inside. {measured}"
    )


def _unchanged() -> list[dict[int, Any]]:
    options = _table("NormalizationOptions", mean=[0.0], std=[1.0])
    return [_table("ProcessUnit", options_type=NORMALIZATION, options=options)]


def _table(kind: str, **fields: Any) -> dict[int, Any]:
    """Return a table as its slots: text, a table, a list of tables or of floats, or a byte."""
    slots = FIELDS[kind].split()
    return {slots.index(name): value for name, value in fields.items() if value is not None}


def _write(builder: Any, value: Any) -> int:
    """Write a value and what it refers to; return its offset."""
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, list) and isinstance(value[0], float):
        return builder.CreateNumpyVector(np.array(value, np.float32))
    if isinstance(value, list):
        offsets = [_write(builder, item) for item in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    written = {s: _write(builder, item) for s, item in value.items() if not isinstance(item, int)}
    builder.StartObject(max(value) + 1)
    for slot, item in value.items():
        if slot in written:
            builder.PrependUOffsetTRelativeSlot(slot, written[slot], 0)
        else:
            builder.PrependInt8Slot(slot, item, 0)
    return builder.EndObject()
