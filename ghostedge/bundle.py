"""The bundle: the folder that export writes, and the proof that it still does what it did there.

Reading and verifying one needs numpy and one runtime, nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ghostedge.errors import CheckFailed, GhostEdgeError, expect
from ghostedge.files import sha256
from ghostedge.pixels import PixelContract, enlarged

MANIFEST, LABELS, GOLDEN = "manifest.json", "labels.txt", "golden.npz"
TIMINGS, REPORTS = "timings.json", ("report.md", "report.html")
CAMERA = "model_int8_camera.tflite"
FORMAT = 1
SEAL = "sha256"
"""Where the manifest holds a hash of itself."""
UNITS = ("step", "probability")


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder with a manifest that this ghostedge reads."""
    try:
        read_manifest(path)
    except (GhostEdgeError, OSError):  # such as a name that is too long here
        return False
    return True


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of the bundle at `path`.

    Raises GhostEdgeError where there is no bundle, and for a manifest that is damaged, foreign or
    of another format.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        what = "is a folder without manifest.json" if folder.is_dir() else "is no folder"
        raise GhostEdgeError(
            f"{folder} is no bundle, it {what}: name a folder that `ghostedge export` wrote."
        )
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GhostEdgeError(
            f"{file} cannot be read ({error}): restore the bundle or export it again."
        ) from error
    if not isinstance(manifest, dict) or not {"format", "ghostedge", "artefacts"} <= set(manifest):
        raise GhostEdgeError(
            f"{file} was not written by ghostedge: name a folder that `ghostedge export` wrote."
        )
    if manifest["format"] != FORMAT:
        raise GhostEdgeError(
            f"{folder} has bundle format {manifest['format']} and this ghostedge reads {FORMAT}: "
            f"use the version that wrote it, {manifest['ghostedge']}, or export it again."
        )
    try:
        _check_structure(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise GhostEdgeError(
            f"{file} is damaged ({error!r}): restore the bundle or export it again."
        ) from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, the same bytes for the same content, with a SHA-256 of all the rest."""
    (folder / MANIFEST).write_bytes(_sealed(manifest))


def _sealed(manifest: dict[str, Any]) -> bytes:
    content = {key: value for key, value in manifest.items() if key != SEAL}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{json.dumps({**content, SEAL: digest}, indent=1, sort_keys=True)}\n".encode()


def _check_structure(manifest: dict[str, Any]) -> None:
    """Touch everything that is used of a manifest, so that no use of it can fail later."""
    PixelContract.from_json(manifest["pixels"])
    expect(isinstance(manifest["name"], str), "name")
    expect(isinstance(manifest["source"], dict), "source")
    labels = manifest["labels"]
    expect(isinstance(labels, list) and all(isinstance(label, str) for label in labels), "labels")
    for name, artefact in manifest["artefacts"].items():
        expect(artefact["runtime"] in ("litert", "onnxruntime"), f"runtime of {name}")
        expect(isinstance(artefact["precision"], str), f"precision of {name}")
        expect(isinstance(artefact["bytes"], int), f"bytes of {name}")
        output = artefact["output"]
        for side in (artefact["input"], output):
            expect(isinstance(side["dtype"], str) and len(side["shape"]) > 1, f"shape of {name}")
        scaled = isinstance(output.get("scale"), float) and isinstance(
            output.get("zero_point"), int
        )
        expect(output["dtype"] == "float32" or scaled, f"scale of {name}")
    for name, entry in {**manifest["files"], **manifest["artefacts"]}.items():
        expect(Path(name).name == name, f"{name} lies outside the bundle")
        expect(isinstance(entry["sha256"], str), f"sha256 of {name}")
    expect({LABELS, GOLDEN} <= set(manifest["files"]), "files")
    for stage in manifest["stages"]:
        for parity in stage["parity"].values():
            expect(parity["top1"] is None or parity["images"] > 0, f"images of {stage['name']}")
    expect(manifest["golden"]["images"] > 0, "golden images")
    for entry in manifest["golden"]["expected"]:
        expect(entry["artefact"] in manifest["artefacts"], entry["artefact"])
        expect(entry["unit"] in UNITS and entry["tolerance"] >= 0, entry["key"])
        expect(isinstance(entry["kernels"], str), entry["key"])


def read_labels(path: Path) -> list[str]:
    """Read labels.txt: UTF-8, one label a line.

    Raises GhostEdgeError for a file that cannot be read as such.
    """
    try:
        return label_lines(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise GhostEdgeError(
            f"{path} cannot be read ({error}): write one label a line, in UTF-8."
        ) from error


def label_lines(text: str) -> list[str]:
    """Return the labels of a text with one a line; blank lines at its end are none."""
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def unnamed(count: int) -> list[str]:
    """Return the labels of classes that nothing names."""
    return [f"class {index}" for index in range(count)]


def is_label(text: str) -> bool:
    """Return whether a class name can stand in labels.txt, however its lines are told apart."""
    return bool(text.strip()) and text.splitlines() == [text]


@dataclasses.dataclass(frozen=True)
class Row:
    """One artefact, run on the golden images with one kind of kernels.

    exact: share of the outputs that are identical to the expected ones. difference: the largest
    one, in `unit`s ("step" of a quantized output, or "probability"), as is the tolerance.
    """

    artefact: str
    kernels: str
    images: int
    exact: float
    difference: float
    unit: str
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found. skipped: (artefact, why it was not run)."""

    bundle: Path
    rows: list[Row]
    skipped: list[tuple[str, str]]

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """A sentence about the first row outside its tolerance, None when all are inside."""
        for row in self.rows:
            if not row.ok:
                return (
                    f"{row.artefact} with {row.kernels} kernels differs from its golden outputs in "
                    f"{self.bundle} by {row.difference:.3g} {row.unit} where {row.tolerance:g} is "
                    "allowed: this runtime or CPU computes it differently than where it was "
                    "exported; compare the versions in manifest.json."
                )
        return None


def verify(bundle: str | os.PathLike[str]) -> Verification:
    """Check that a bundle is what was exported, and that it computes here what it did there.

    Every model, the labels and the golden images must have the SHA-256 that the manifest says, the
    manifest its own, and every model must be listed; the reports and timings are not looked at. Then each
    artefact whose runtime is installed is run on the images of golden.npz, with each kind of
    kernels that an expected output is stored for. The caller decides what to do where the result is
    not `ok`.

    Raises CheckFailed for a bundle that was changed or contradicts itself, and GhostEdgeError for
    what is no bundle and where none of its runtimes is installed.
    """
    from ghostedge.runtime import RUNTIMES, Classifier, installed  # it reads manifests from here

    folder = Path(bundle)
    manifest, golden = open_bundle(folder)
    missing = {
        name: RUNTIMES[artefact["runtime"]]
        for name, artefact in manifest["artefacts"].items()
        if not installed(artefact["runtime"])
    }
    if len(missing) == len(manifest["artefacts"]):
        packages = sorted({runtime.package for runtime in missing.values()})
        raise GhostEdgeError(
            f"Nothing in {folder} can be run: install a runtime with: "
            f"pip install {' or '.join(packages)}"
        )
    rows = []
    for entry in manifest["golden"]["expected"]:
        name, kernels = entry["artefact"], entry["kernels"]
        if name in missing:
            continue
        classifier = Classifier(folder / name, kernels=kernels)
        images = enlarged(golden["images"], classifier.size)
        found, expected = classifier.raw(images), golden[entry["key"]]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise _contract(
                folder,
                f"{entry['key']} in {GOLDEN} is {expected.dtype} {expected.shape} where the model "
                f"gives {found.dtype} {found.shape}",
            )
        apart = np.abs(found.astype(np.float64) - expected)
        if entry["unit"] == "probability" and classifier.step is not None:
            apart *= classifier.step
        exact, furthest = float((found == expected).mean()), float(apart.max())
        rows.append(
            Row(name, kernels, len(found), exact, furthest, entry["unit"], entry["tolerance"])
        )
    skipped = [(name, f"{runtime.title} is not installed") for name, runtime in missing.items()]
    return Verification(folder, rows, skipped)


def open_bundle(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest and the golden arrays of a bundle, every file of which has its SHA-256.

    Raises CheckFailed for a bundle that was changed or contradicts itself, and GhostEdgeError for
    what is no bundle.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    return manifest, _read_golden(folder, manifest)


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare hashes, and labels.txt with the labels in the manifest."""
    if (folder / MANIFEST).read_bytes() != _sealed(manifest):
        raise _changed(folder, "contract", MANIFEST)
    for name, entry in {**manifest["artefacts"], **manifest["files"]}.items():
        kind = "model" if name in manifest["artefacts"] else "contract"
        if not (folder / name).is_file():
            raise CheckFailed(f"{name} is missing from {folder}: restore it or export again.")
        if sha256(folder / name) != entry["sha256"]:
            raise _changed(folder, kind, name)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".tflite", ".onnx") and file.name not in manifest["artefacts"]:
            raise CheckFailed(
                f"{file.name} in {folder} is not in its manifest, so nothing is known of it: "
                "move it elsewhere or export again."
            )
    if read_labels(folder / LABELS) != manifest["labels"]:
        raise _contract(folder, f"{LABELS} and {MANIFEST} name different labels")


def _read_golden(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    try:
        with np.load(folder / GOLDEN, allow_pickle=False) as file:
            golden = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _contract(folder, f"{GOLDEN} cannot be read ({error})") from error
    size = manifest["pixels"]["size"]
    wanted = (manifest["golden"]["images"], size, size, 3)
    images = golden.get("images")
    if images is None or images.shape != wanted or images.dtype != np.uint8:
        raise _contract(folder, f"{GOLDEN} holds no uint8 images of the shape {wanted}")
    expected = manifest["golden"]["expected"]
    for name in sorted(set(manifest["artefacts"]) - {entry["artefact"] for entry in expected}):
        raise _contract(folder, f"{MANIFEST} expects no outputs of {name}")
    for key in sorted({entry["key"] for entry in expected} - set(golden)):
        raise _contract(folder, f"{GOLDEN} lacks the expected outputs {key}")
    return golden


def _changed(folder: Path, kind: str, name: str) -> CheckFailed:
    return CheckFailed(
        f"The {kind} changed: {name} in {folder} is not the file that was exported (its SHA-256 "
        "differs); restore it or export again."
    )


def _contract(folder: Path, contradiction: str) -> CheckFailed:
    return CheckFailed(
        f"The contract of {folder} contradicts itself: {contradiction}; restore it or export again."
    )
