"""Networks beside GhostNetV3 on the way from a checkpoint to an int8 model in one partition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ghostedge import checkpoint
from ghostedge.convert import to_int8_tflite, to_onnx, to_tflite
from ghostedge.convert.audit import audit
from ghostedge.convert.ranges import observe
from ghostedge.models import create, fold
from ghostedge.models.synthetic import noise
from ghostedge.pixels import PixelContract
from ghostedge.runtime import Classifier

LABELS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("densestride", {"width": 0.5, "branches": 2}),
        pytest.param("densestride-res", {"width": 0.5, "branches": 2}, marks=pytest.mark.slow),
        pytest.param("resnet8", {}, marks=pytest.mark.slow),
    ],
)
def test_a_family_comes_through_in_one_partition(
    architecture: str, arguments: dict[str, float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = create(architecture, num_classes=3, **arguments).train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.randn(16, 3, 32, 32))
    pixels = PixelContract(32)
    card = checkpoint.Checkpoint(architecture, {"num_classes": 3, **arguments}, LABELS, pixels)
    file = tmp_path / "net.safetensors"
    checkpoint.save(file, card, {k: v.numpy() for k, v in net.state_dict().items()})

    _, built = checkpoint.build(file)
    core = to_onnx.simplified(to_onnx.core(fold(built), pixels, to_onnx.TFLITE_OPSET), 1)
    single, quantized = tmp_path / "model_fp32.tflite", tmp_path / "model_int8.tflite"
    single.write_bytes(to_tflite.convert(core)["fp32"])
    images = noise(32)[:16]
    ranges = observe(single.read_bytes(), images)
    quantized.write_bytes(to_int8_tflite.quantize(single.read_bytes(), ranges, "uint8"))

    inputs = torch.from_numpy(pixels.normalize(images).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = built(inputs).softmax(1).numpy()
    np.testing.assert_allclose(Classifier(single)(images), expected, atol=1e-4)
    assert np.abs(Classifier(quantized)(images) - expected).mean() < 0.05
    for model, precision in ((single, "fp32"), (quantized, "int8")):
        found = audit(model)
        assert (found["partitions"], found["precision"]) == (1, precision)
