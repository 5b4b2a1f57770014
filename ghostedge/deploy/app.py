"""The drop-in for a phone's app: models, labels, the pixel contract, golden images, a page a platform."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.bundle import CAMERA, LABELS, SEAL
from ghostedge.deploy.target import Filled, Handover, Need, Target
from ghostedge.errors import GhostEdgeError
from ghostedge.pixels import enlarged

PLAIN = "model_int8.tflite"
NAMES = ("TFLITE_METADATA", b"TFLITE_METADATA")
"""Of the metadata in a .tflite file; LiteRT versions read it as one or the other."""
IMAGES, FRAMES = 16, 4


def _fill(handover: Handover) -> Filled:
    artefacts = handover.manifest["artefacts"]
    sides = {name: int(artefacts[name]["input"]["shape"][1]) for name in (PLAIN, CAMERA)}
    for name in sides:
        _check_normalization(handover.bundle / name)
    output = artefacts[PLAIN]["output"]
    contract = {
        "bundle": handover.manifest[SEAL],
        "name": handover.manifest["name"],
        "colour": "RGB",
        "range": [0, 255],
        "dtype": "uint8",
        "layout": "NHWC",
        "normalisation": "none: it is inside the models",
        "crop": "centre square, after turning the picture upright",
        "resize": "averaging (anti-aliased) down to the model's size",
        "models": {name: {"size": side, "labels": LABELS} for name, side in sides.items()},
        "output": {key: output[key] for key in ("dtype", "scale", "zero_point")},
        "labels": handover.labels,
    }
    files = {
        f"assets/{LABELS}": (handover.bundle / LABELS).read_bytes(),
        "assets/contract.json": _json(contract),
        **_golden(handover, sides[CAMERA]),
    }
    more = {"camera": sides[CAMERA], "plain_model": PLAIN, "camera_model": CAMERA}
    return more, files


def _golden(handover: Handover, side: int) -> dict[str, bytes]:
    """Return golden images, larger frames of some of them, and what the models say of each.

    A frame is one and a third times as wide as high. Its centre square averages, block by block, to a
    golden image, though none of its pixels need be one of that; the bars beside it are another's.
    """
    raw = handover.golden[f"{PLAIN}:default"]
    artefact = handover.manifest["artefacts"][PLAIN]["output"]
    scores = (raw.astype(np.float64) - artefact["zero_point"]) * artefact["scale"]
    chosen = handover.clearest(PLAIN, "default", IMAGES)
    images = handover.golden["images"][chosen]
    squares = enlarged(images, side)
    bar = side // 6
    frames = [
        np.concatenate([squares[-1 - i][:, :bar], squares[i], squares[-1 - i][:, -bar:]], axis=1)
        for i in range(min(FRAMES, len(images)))
    ]
    files, said = {}, {}
    for kind, pictures in (("image", images), ("frame", frames)):
        entries = []
        for index, (pixels, place) in enumerate(zip(pictures, chosen, strict=False)):
            name = f"{kind}_{index:02}.png"
            files[f"golden/{name}"] = _png(pixels)
            best = int(scores[place].argmax())
            entries.append(
                {
                    "file": name,
                    "top1": best,
                    "label": handover.labels[best],
                    "scores": [round(float(score), 8) for score in scores[place]],
                }
            )
        said[f"{kind}s"] = entries
    tolerance = artefact["scale"] + 1e-6
    files["golden/golden.json"] = _json(
        {"bundle": handover.manifest[SEAL], "tolerance": tolerance, **said}
    )
    return files


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()


def _check_normalization(path: Path) -> None:
    declared = declared_normalization(path.read_bytes())
    if declared is not None and (set(declared[0]), set(declared[1])) != ({0.0}, {1.0}):
        mean, std = declared
        raise GhostEdgeError(
            f"The metadata of {path} declares a normalisation of mean {mean} and std {std}, but the "
            "model takes raw pixels: an app that heeds it would lose accuracy without an error. "
            "Export it again, and leave the metadata as it is."
        )


def declared_normalization(content: bytes) -> tuple[list[float], list[float]] | None:
    """Return the mean and std that the metadata of a .tflite file declare for its input.

    None where it declares none. Raises GhostEdgeError for a file without metadata.
    """
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers.table import Table  # type: ignore[import-untyped]

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(content), 0))
    packed = [e.buffer for e in model.metadata or [] if e.name in NAMES]
    if not packed:
        raise GhostEdgeError(
            "The model has no metadata, so that MediaPipe cannot read it: export it again."
        )
    data = bytes(model.buffers[packed[0]].data)

    def first(table: Any, slot: int) -> Any:
        """The first of a vector of tables, by its slot in metadata_schema.fbs."""
        offset = table.Offset(4 + 2 * slot)
        return Table(data, table.Indirect(table.Vector(offset))) if offset else None

    def numbers(table: Any, slot: int) -> list[float]:
        offset = table.Offset(4 + 2 * slot)
        return np.frombuffer(data, "<f4", table.VectorLen(offset), table.Vector(offset)).tolist()

    # ModelMetadata.subgraph_metadata, .input_tensor_metadata, .process_units, .options
    table = Table(data, int.from_bytes(data[:4], "little"))
    for slot in (3, 2, 4):
        table = first(table, slot)
        if table is None:
            return None
    options = Table(data, table.Indirect(table.Pos + table.Offset(6)))
    return numbers(options, 0), numbers(options, 1)


REFUSED = "MediaPipe and ML Kit refuse int8, and the pages' code writes bytes"
TARGET = Target(
    summary="a phone's app: models, labels, contract, golden images, a page a platform",
    needs=(
        Need(PLAIN, f"assets/{PLAIN}", "--recipe app --camera {camera}", "uint8", REFUSED),
        Need(CAMERA, f"assets/{CAMERA}", "--recipe app --camera {camera}", "uint8", REFUSED),
    ),
    fill=_fill,
)
