"""Small real models in every format, of the same weights, and a bundle of them."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ghostedge.bundle import write_manifest
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier

SIZE, LABELS = 24, ["ant", "bee", "cat", "dog"]


def pictures(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Noise around a colour, so that a small random net tells them apart."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (count, 1, 1, 3))
    noise = random.integers(-40, 41, (count, size, size, 3))
    return np.clip(colours + noise, 0, 255).astype(np.uint8)


class Net(nn.Module):
    """Pixels 0-255, NCHW, to probabilities (or logits)."""

    def __init__(self, channels: int = 3, softmax: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.softmax = softmax
        self.conv = nn.Conv2d(channels, 8, 3, 2)
        self.linear = nn.Linear(8, len(LABELS))
        with torch.no_grad():
            self.linear.weight *= 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv((x - 128) / 64)).mean((2, 3))
        return torch.softmax(self.linear(x), 1) if self.softmax else self.linear(x)


def expected(images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return Net()(pixels).numpy()


def write_onnx(
    path: Path,
    *,
    batch: int | None = None,
    channels: int = 3,
    softmax: bool = True,
    labels: list[str] | None = None,
) -> Path:
    """A free batch axis where `batch` is None."""
    import onnx

    axes = {"image": {0: "batch"}, "probabilities": {0: "batch"}} if batch is None else None
    example = torch.zeros(batch or 1, channels, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that we use
        torch.onnx.export(
            Net(channels, softmax).eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["probabilities"],
            dynamic_axes=axes,
        )
    if labels is not None:
        model = onnx.load(path)
        model.metadata_props.add(key="labels", value="\n".join(labels))
        onnx.save(model, path)
    return path


@functools.cache
def tflite(io: str, batch: int = 1, channels: int = 3) -> bytes:
    """The bytes of a .tflite: `io` float32, float16 (weights only), uint8 or int8 (int8 inside)."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's own, while it imports and converts
        import tensorflow as tf

        net = Net(channels)
        layers = tf.keras.layers
        given = tf.keras.Input((SIZE, SIZE, channels), batch_size=batch)
        conv, dense = layers.Conv2D(8, 3, 2, activation="relu"), layers.Dense(len(LABELS))
        x = conv(layers.Rescaling(1 / 64, -2)(given))
        x = layers.Softmax()(dense(layers.GlobalAveragePooling2D()(x)))
        weights = {name: value.detach().numpy() for name, value in net.named_parameters()}
        conv.set_weights([weights["conv.weight"].transpose(2, 3, 1, 0), weights["conv.bias"]])
        dense.set_weights([weights["linear.weight"].T, weights["linear.bias"]])
        converter = tf.lite.TFLiteConverter.from_keras_model(tf.keras.Model(given, x))
        if io == "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        elif io != "float32":
            # The colours of the tests' pictures: those beyond the calibrated ranges saturate.
            samples = pictures(300 * batch).astype(np.float32)
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [chunk] for chunk in np.split(samples[..., :channels], 300)
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = getattr(tf, io)
        return bytes(converter.convert())


def write_tflite(path: Path, io: str, batch: int = 1, channels: int = 3) -> Path:
    path.write_bytes(tflite(io, batch, channels))
    return path


def write_checkpoint(path: Path, size: int = 32) -> Path:
    """An untrained ghostnetv3-small at half width."""
    from ghostedge import checkpoint
    from ghostedge.models import create

    torch.manual_seed(0)
    arguments = {"num_classes": len(LABELS), "width": 0.5, "branches": 1}
    net = create("ghostnetv3-small", **arguments)
    pixels = PixelContract(size, (120.0, 121.0, 122.0), (60.0, 61.0, 62.0))
    stored = checkpoint.Checkpoint("ghostnetv3-small", arguments, LABELS, pixels)
    checkpoint.save(path, stored, {k: v.numpy() for k, v in net.state_dict().items()})
    return path


def write_bundle(folder: Path, images: int = 6) -> Path:
    """model.onnx, model_fp32.tflite and model_int8.tflite, with the contract around them."""
    folder.mkdir()
    write_onnx(folder / "model.onnx")
    write_tflite(folder / "model_fp32.tflite", "float32")
    write_tflite(folder / "model_int8.tflite", "uint8")
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n", "utf-8")
    golden = {"images": pictures(images, seed=2)}
    wanted: list[dict[str, Any]] = []
    for name, kernels, tolerance, unit in (
        ("model.onnx", "default", 1e-5, "probability"),
        ("model_fp32.tflite", "default", 1e-5, "probability"),
        ("model_int8.tflite", "default", 2, "step"),
        ("model_int8.tflite", "reference", 0, "step"),
    ):
        key = f"{name}:{kernels}"
        golden[key] = Classifier(folder / name, kernels=kernels).raw(golden["images"])
        wanted.append(
            {"artefact": name, "kernels": kernels, "key": key, "tolerance": tolerance, "unit": unit}
        )
    np.savez(folder / "golden.npz", **golden)
    manifest: dict[str, Any] = {
        "format": 1,
        "name": "tiny",
        "ghostedge": "0.1.0",
        "labels": LABELS,
        "pixels": PixelContract(SIZE).to_json(),
        "source": {},
        "artefacts": {
            name: {
                "runtime": "onnxruntime" if name.endswith(".onnx") else "litert",
                "precision": precision,
                "bytes": (folder / name).stat().st_size,
                "input": {"dtype": dtype, "shape": [1, SIZE, SIZE, 3]},
                "output": {"dtype": dtype, "shape": [1, 4], "scale": 1 / 256, "zero_point": 0},
            }
            for name, precision, dtype in (
                ("model.onnx", "fp32", "float32"),
                ("model_fp32.tflite", "fp32", "float32"),
                ("model_int8.tflite", "int8", "uint8"),
            )
        },
        "files": {"labels.txt": {}, "golden.npz": {}},
        "golden": {"images": images, "expected": wanted},
        "stages": [],
    }
    rewrite_manifest(folder, manifest)
    return folder


def free_size(model: Path) -> Path:
    """Leave height and width of a .onnx or .tflite free."""
    if model.suffix == ".onnx":
        import onnx

        net = onnx.load(model)
        for axis in (2, 3):
            net.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side {axis}"
        onnx.save(net, model)
    else:
        from ghostedge.convert.rewrites.flat import Flat

        flat = Flat(model.read_bytes())
        (image,) = flat.graph.inputs
        flat.tensors[image].shapeSignature = np.array([1, -1, -1, 3], np.int32)
        model.write_bytes(bytes(flat))
    return model


class Malicious:
    """Its pickle creates a folder where it is loaded."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


def rewrite_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the hashes that the files have now."""
    for name, entry in {**manifest["artefacts"], **manifest["files"]}.items():
        entry["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_manifest(folder, manifest)
