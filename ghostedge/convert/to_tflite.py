"""From a core ONNX graph to .tflite files, with onnx2tf and TensorFlow's converter.

They run in a process of their own (`python -m ghostedge.convert.to_tflite fp32`): TensorFlow does not
share an address space with torch, its messages stay out of the user's terminal, its memory is given
back, and the working directory can hold the file that keeps onnx2tf off the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ghostedge.convert.rewrites import CONVERTED, TFLITE, FlatPass, Pass, finish, rewrite
from ghostedge.errors import GhostEdgeError
from ghostedge.pixels import MIDDLE, STEP

CORE, MADE = "core.onnx", "model_{}.tflite"
SAMPLE = "calibration_image_sample_data_20x128x128x3_float32.npy"
"""onnx2tf fetches a file of this name from the internet unless the working directory has it."""


def convert(
    core: onnx.ModelProto,
    wanted: Sequence[str] = ("fp32",),
    before: Sequence[Pass] = TFLITE,
    after: Sequence[FlatPass] = CONVERTED,
) -> dict[str, bytes]:
    """Return float .tflite models of a core graph, which take raw pixels, by precision.

    Args:
        core: what `to_onnx.simplified` returns of it, with a fixed batch.
        wanted: of "fp32" and "fp16".
        before, after: the rewrites on both sides of the converter.

    Raises GhostEdgeError with the converter's last words when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="ghostedge-") as scratch:
        folder = Path(scratch)
        onnx.save(rewrite(core, before), folder / CORE)
        np.save(folder / SAMPLE, np.zeros((20, 128, 128, 3), np.float32))
        _run(folder, wanted)
        return {name: finish((folder / MADE.format(name)).read_bytes(), after) for name in wanted}


def _run(folder: Path, wanted: Sequence[str]) -> None:
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_USE_LEGACY_KERAS": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, *wanted],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        words = [line for line in done.stdout.splitlines() if line.strip()] or ["no message"]
        raise GhostEdgeError(
            f"The TFLite conversion failed with code {done.returncode}: {words[-1]}. "
            "`ghostedge doctor` shows the installed versions."
        )


def main(wanted: Sequence[str]) -> None:
    """Convert the core graph in the working directory."""
    import onnx2tf
    import tensorflow as tf

    # From 2.0 on onnx2tf has a backend of its own, whose int8 fails on these nets.
    backend = {} if onnx2tf.__version__.startswith("1.") else {"tflite_backend": "tf_converter"}
    net = onnx2tf.convert(
        input_onnx_file_path=CORE,
        output_folder_path="onnx2tf",
        not_use_onnxsim=True,  # done already; it would call a command that may not be on the PATH
        disable_model_save=True,
        non_verbose=True,
        verbosity="error",
        **backend,
    )
    signature = [tf.TensorSpec(net.inputs[0].shape, tf.float32, name="image")]

    @tf.function(input_signature=signature)
    def raw(image: Any) -> dict[str, Any]:
        return {"probabilities": net((image - MIDDLE) * (1 / STEP))}

    # What keeps the weights alive. The net itself, given here, would be saved as a whole before each
    # conversion, which takes longer than the conversion; the result is the same.
    held = tf.Module()
    held.weights = net.variables
    for precision in wanted:
        made = tf.lite.TFLiteConverter.from_concrete_functions([raw.get_concrete_function()], held)
        if precision == "fp16":
            made.optimizations = [tf.lite.Optimize.DEFAULT]
            made.target_spec.supported_types = [tf.float16]
        Path(MADE.format(precision)).write_bytes(made.convert())


if __name__ == "__main__":
    main(sys.argv[1:])
