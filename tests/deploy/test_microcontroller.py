"""deploy/microcontroller: the real tflite-micro runs the model, and a compiler what needs no board.

tflite-micro is in an environment of its own (`make test` makes it).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ghostedge.bundle import write_manifest
from ghostedge.convert import Bundle
from ghostedge.convert.audit import audit
from ghostedge.deploy import deploy, microcontroller
from ghostedge.deploy.microcontroller import MODEL, RESOLVER, TESTED, arena
from ghostedge.errors import GhostEdgeError
from ghostedge.runtime import Classifier
from tests.runtime_fixtures import write_tflite

ROOT = Path(__file__).parents[2]
TFLM = ROOT / ".venv-tflm/bin/python"
needs_tflm = pytest.mark.skipif(
    not TFLM.exists()
    or subprocess.run([TFLM, "-c", "import tflite_micro"], capture_output=True).returncode != 0,
    reason="no tflite-micro in .venv-tflm: `make test` makes it on x86",
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror"]


@pytest.fixture(scope="session")
def board(int8_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy("microcontroller", int8_bundle, tmp_path_factory.mktemp("deployed") / "mcu")


def compiled(folder: Path, sources: list[Path], include: Path) -> Path:
    program = folder / "program"
    command = ["g++", *FLAGS, "-I", include, *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def check(board: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TFLM, board / "check.py"], capture_output=True, text=True)


@needs_tflm
def test_tflite_micro_says_what_the_reference_kernels_say(
    int8_bundle: Bundle, board: Path, tmp_path: Path
) -> None:
    done = check(board)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == found["same_class"] == int8_bundle.manifest["golden"]["images"]
    assert found["exact"] >= 0.98 and found["largest_step"] <= 2
    # What the check would find: the colours the wrong way round, and an arena that is too small.
    other = Path(shutil.copytree(board, tmp_path / "other"))
    with np.load(other / "golden.npz") as file:
        golden = dict(file)
    np.savez(other / "golden.npz", **{**golden, "images": golden["images"][..., ::-1]})
    assert check(other).returncode == 1
    np.savez(other / "golden.npz", **golden)
    header = (board / "model.h").read_text()
    small = header.replace(f"= {found['arena_bytes']};", f"= {found['arena_used'] - 1024};")
    assert small != header
    (other / "model.h").write_text(small)
    assert check(other).returncode != 0


@needs_tflm
def test_the_arena_is_what_tflite_micro_uses(
    int8_bundle: Bundle, bundle: Bundle, tmp_path: Path
) -> None:
    """Of a network with int8 ends, with uint8 ends, and of one of seven operators."""
    small = write_tflite(tmp_path / "small.tflite", "int8")
    code = (
        "import sys; from tflite_micro import runtime;"
        "runtime.Interpreter.from_file(sys.argv[1], arena_size=1 << 24).print_allocations()"
    )
    for path in (int8_bundle.path / MODEL, bundle.path / MODEL, small):
        done = subprocess.run([TFLM, "-c", code, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used = dict(re.findall(r"Arena allocation (\w+) (\d+) bytes", done.stderr))
        assert audit(path)["peak_activation_bytes"] == int(used["head"]), path
        total = int(used["total"])
        assert total <= arena(path) <= 1.07 * total + 1024, path


def test_versions_agree(board: Path) -> None:
    assert f".venv-tflm/{TESTED}" in (ROOT / "Makefile").read_text()
    assert f"tflite-micro=={TESTED}" in (board / "README.md").read_text()


PROGRAM = """
#include <cstdio>

#include "classify.h"
#include "golden.h"

int main(int count, char**) {
  if (count > 1) {
    std::fwrite(model::kData, 1, model::kBytes, stdout);
    return 0;
  }
  std::printf("%d\\n", static_cast<int>(reinterpret_cast<uintptr_t>(model::kData) % 16));
  for (const char* label : model::kLabels) std::printf("%s\\n", label);
  static int8_t input[model::kImageBytes];
  for (int image = 0; image < golden::kImages; ++image) {
    model::ToInput(golden::kPixels[image], input);
    for (int8_t value : input) std::printf("%d ", value);
    const int8_t* output = golden::kOutputs[image];
    const int best = model::Best(output);
    std::printf("%d %.8f\\n", best, static_cast<double>(model::Score(output[best])));
  }
}
"""


@needs_compiler
def test_the_compiled_arrays_and_arithmetic_are_the_bundles(
    int8_bundle: Bundle, board: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.cc").write_text(PROGRAM)
    sources = [tmp_path / "program.cc", board / "model.cc", board / "golden.cc"]
    program = compiled(tmp_path, sources, board)
    model = subprocess.run([program, "model"], capture_output=True, check=True).stdout
    assert model == (int8_bundle.path / MODEL).read_bytes()
    lines = subprocess.run([program], capture_output=True, check=True).stdout.decode().splitlines()
    labels = int8_bundle.manifest["labels"]
    assert lines[: 1 + len(labels)] == ["0", *labels]
    rows = [line.split() for line in lines[1 + len(labels) :]]
    assert len(rows) == microcontroller.IMAGES
    size = int8_bundle.manifest["pixels"]["size"]
    inputs = np.array([row[:-2] for row in rows]).astype(np.int8).reshape(-1, size, size, 3)
    reference = Classifier(int8_bundle.path / MODEL, kernels="reference")
    scores = reference(inputs.view(np.uint8) ^ 128)
    assert [int(row[-2]) for row in rows] == scores.argmax(1).tolist()
    np.testing.assert_allclose([float(row[-1]) for row in rows], scores.max(1), atol=1e-6)
    with np.load(int8_bundle.path / "golden.npz") as golden:
        own = {picture.tobytes() for picture in golden["images"]}
    assert {picture.tobytes() for picture in inputs.view(np.uint8) ^ 128} <= own


@needs_compiler
def test_any_label_is_a_literal(tmp_path: Path) -> None:
    labels = ['Zwölf "Äpfel"', "a\\b", "what??/", "1\x00012", "%d", "魚\\"]
    lines = "".join(
        f"std::fwrite({microcontroller._literal(x)}, 1, {len(x.encode())}, stdout);\n"
        for x in labels
    )
    (tmp_path / "labels.cc").write_text(f"#include <cstdio>\nint main() {{\n{lines}}}\n")
    program = compiled(tmp_path, [tmp_path / "labels.cc"], tmp_path)
    assert subprocess.run([program], capture_output=True).stdout == "".join(labels).encode()


DECLARED = """
#pragma once
#include <cstddef>
#include <cstdint>
enum TfLiteStatus { kTfLiteOk = 0, kTfLiteError = 1 };
#define TF_LITE_ENSURE_STATUS(a) \\
  do { const TfLiteStatus s = (a); if (s != kTfLiteOk) return s; } while (0)
#define TFLITE_SCHEMA_VERSION (3)
struct TfLiteTensor { union { int8_t* int8; } data; };
void MicroPrintf(const char* format, ...);
namespace tflite {
void InitializeTarget();
struct Model { uint32_t version() const; };
const Model* GetModel(const void* buffer);
class MicroOpResolver {};
template <unsigned int count>
struct MicroMutableOpResolver : MicroOpResolver {
METHODS};
struct MicroInterpreter {
  MicroInterpreter(const Model*, const MicroOpResolver&, uint8_t* arena, size_t bytes);
  TfLiteStatus AllocateTensors();
  TfLiteStatus Invoke();
  TfLiteTensor* input(size_t index);
  TfLiteTensor* output(size_t index);
  size_t arena_used_bytes() const;
};
}
"""


@needs_compiler
def test_main_has_no_error_against_the_names_that_it_uses(board: Path, tmp_path: Path) -> None:
    """Syntax and types only: the declarations are ours, written after tflite-micro's headers."""
    methods = "".join(f"  TfLiteStatus Add{name}();\n" for name in RESOLVER.values())
    (tmp_path / "declared.h").write_text(DECLARED.replace("METHODS", methods))
    text = (board / "main.cc").read_text() + (board / "model_ops.h").read_text()
    for name in re.findall(r'#include "(tensorflow/.*)"', text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('#include "declared.h"\n')
    command = ["g++", *FLAGS, "-fsyntax-only", "-I", tmp_path, "-I", board, board / "main.cc"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_resolver_has_the_models_operators(int8_bundle: Bundle, board: Path) -> None:
    text = (board / "model_ops.h").read_text()
    added = re.findall(r"ops\.Add(\w+)\(\)", text)
    assert f"MicroMutableOpResolver<{len(added)}>" in text
    kinds = int8_bundle.manifest["artefacts"][MODEL]["audit"]["operators"]["int8"]
    assert {name.upper() for name in added} == {kind.replace("_", "") for kind in kinds}
    assert {"DepthwiseConv2D", "FullyConnected", "Softmax"} <= set(added)


def test_refused(int8_bundle: Bundle, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(GhostEdgeError, match=r"takes uint8: export it again with --recipe micro"):
        deploy("microcontroller", bundle, tmp_path / "out")
    copy = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = manifest["artefacts"][MODEL]

    def refused(reason: str, **change: object) -> None:
        changed = {**manifest["artefacts"], MODEL: {**entry, **change}}
        write_manifest(copy, {**manifest, "artefacts": changed})
        with pytest.raises(GhostEdgeError, match=reason):
            deploy("microcontroller", copy, tmp_path / "out")

    refused("keeps operators in float", precision="mixed")
    refused("--batch 1", input={**entry["input"], "shape": [4, 32, 32, 3]})
    refused("has no RELU_0_TO_1,", audit={"operators": {"int8": {"RELU_0_TO_1": 1, "ADD": 1}}})
    assert not (tmp_path / "out").exists()
