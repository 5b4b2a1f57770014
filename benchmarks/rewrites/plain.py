"""The plain conversion that ours is compared with: each tool as it comes, nothing rewritten.

    python benchmarks/rewrites/plain.py CHECKPOINT CALIBRATION.npy OUTPUT

Folded net, TorchScript export (constant upsample sizes, no channel cut, as the nets are written), onnxsim
in process, onnx2tf and TensorFlow's converter at their defaults. Input and output are those of our
own files: raw pixels, float32 or uint8, probabilities. For the input that is better than plain: its
int8 scale is given, and costs no normalisation. CALIBRATION.npy holds uint8 (images, size, size, 3).
Writes model_fp32.tflite, model_fp16.tflite and model_int8.tflite into OUTPUT.

It shares no code with ghostedge.convert, so that it stays what it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SAMPLE = "calibration_image_sample_data_20x128x128x3_float32.npy"  # keeps onnx2tf off the network


def to_onnx(checkpoint: str, file: Path) -> None:
    import onnx
    import onnxsim
    import torch

    from ghostedge import checkpoint as checkpoints
    from ghostedge.models import fold

    card, net = checkpoints.build(checkpoint)
    assert card.pixels.is_default
    torch.onnx.export(
        torch.nn.Sequential(fold(net), torch.nn.Softmax(1)).eval(),
        (torch.zeros(1, 3, card.pixels.size, card.pixels.size),),
        str(file),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["probabilities"],
    )
    model, ok = onnxsim.simplify(onnx.load(file))
    assert ok
    onnx.save(model, file)


def to_tflite(folder: Path, calibration: np.ndarray) -> None:
    import onnx2tf
    import tensorflow as tf

    backend = {} if onnx2tf.__version__.startswith("1.") else {"tflite_backend": "tf_converter"}
    net = onnx2tf.convert(
        input_onnx_file_path=str(folder / "plain.onnx"),
        output_folder_path=str(folder / "onnx2tf"),
        not_use_onnxsim=True,
        disable_model_save=True,
        non_verbose=True,
        **backend,
    )
    signature = [tf.TensorSpec(net.inputs[0].shape, tf.float32, name="image")]
    core = tf.function(lambda image: {"probabilities": net(image)}, input_signature=signature)
    raw = tf.function(
        lambda image: {"probabilities": net((image - 128.0) * (1 / 64))}, input_signature=signature
    )

    def samples() -> Iterator[list[np.ndarray]]:
        for index, image in enumerate(calibration.astype(np.float32)):
            if index == 0:
                image[0, 0], image[0, 1] = 0, 255  # the whole range of a pixel
            yield [(image[None] - 128) / 64]

    for precision, function in (("fp32", raw), ("fp16", raw), ("int8", core)):
        concrete = function.get_concrete_function()
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], net)
        if precision != "fp32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "fp16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            converter.representative_dataset = samples
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        (folder / f"model_{precision}.tflite").write_bytes(converter.convert())


def main(checkpoint: str, calibration: str, output: str) -> None:
    folder = Path(output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = np.load(calibration)
    if (folder / "plain.onnx").exists():  # the second process: TensorFlow, and no torch
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            np.save(SAMPLE, np.zeros((20, 128, 128, 3), np.float32))
            to_tflite(folder, images)
        return
    to_onnx(checkpoint, folder / "plain.onnx")
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    try:
        subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=environment, check=True)
    finally:
        (folder / "plain.onnx").unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
