"""torchvision's networks, untrained, through every stage to TFLite and ONNX in int8.

Their weights are random, with the statistics of drawn images in their BatchNorms and scores spread like
a trained net's: float stages must agree; how int8 ranks random scores means nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from ai_edge_litert.interpreter import Interpreter
from torch import nn

import ghostedge
from ghostedge.bundle import verify
from ghostedge.convert.audit import audit
from ghostedge.convert.rewrites.flat import OPS, Flat
from ghostedge.data.drawn import drawn_source

SIZE = 32
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def calibrated(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, num_classes=4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    images = torch.from_numpy(drawn_source(4, 8, 0).read(SIZE).pixels).permute(0, 3, 1, 2)
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        values = (images / 255 - 0.45) / 0.225
        net.train()(values)
        scores = net.eval()(values)
        gain = 1 / scores.std(0)
        head.weight *= gain[:, None]
        head.bias[:] = (head.bias - scores.mean(0)) * gain
    return net


@pytest.mark.parametrize(
    "name",
    [
        "shufflenet_v2_x0_5",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mobilenet_v3_small", "mobilenet_v2", "resnet18")
        ),
    ],
)
def test_torchvision_net(name: str, tmp_path: Path) -> None:
    made = ghostedge.export(
        calibrated(name),
        tmp_path / "out",
        int8=True,
        imgsz=SIZE,
        data="drawn",
        max_drop=100.0,
        calib_samples=40,
        check_samples=20,
        **IMAGENET,
    )
    for stage in ("exported ONNX", "model.onnx", "model_fp32.tflite"):
        for parity in made.parity[stage].values():
            assert parity["log_difference"] < 1e-3
    for precision in ("fp32", "int8"):
        content = (made.path / f"model_{precision}.tflite").read_bytes()
        model = Flat(content)
        found = {model.kind(op) for op in model.graph.operators}
        assert not found & {OPS.DEQUANTIZE, OPS.GATHER}
        assert name.startswith("shufflenet") or OPS.TRANSPOSE not in found
        assert audit(made.path / f"model_{precision}.tflite")["partitions"] == 1
        # No scale beyond any pixel: a max pool padded with the lowest float gives 1e36.
        scales = [t.quantization.scale for t in model.tensors if t.quantization is not None]
        assert max((float(np.max(s)) for s in scales if s is not None), default=0) < 100
        Interpreter(model_content=content).allocate_tensors()
    assert verify(made).ok


def test_timm_onnx_file(tmp_path: Path) -> None:
    """files/timm.onnx: written by timm 1.0.31's own timm.utils.onnx.onnx_export (opset 17, batch free).

    A mobilenetv3_small of width 0.15 with a head of 96 channels, 51,692 parameters, its weights random
    and calibrated as above.
    """
    file = Path(__file__).with_name("files") / "timm.onnx"
    made = ghostedge.export(
        file,
        tmp_path / "out",
        int8=True,
        data="drawn",
        max_drop=100.0,
        calib_samples=40,
        check_samples=20,
        **IMAGENET,
    )
    assert next(iter(made.parity)) == "ONNX file"
    for stage in ("exported ONNX", "model.onnx", "model_fp32.tflite"):
        for parity in made.parity[stage].values():
            assert parity["log_difference"] < 1e-3
    assert made.manifest["source"]["source"] == "ONNX opset 17, pytorch 2.14.1"
    assert set(made.manifest["artefacts"]) == {
        "model.onnx",
        "model_int8.onnx",
        "model_fp32.tflite",
        "model_int8.tflite",
    }
    assert verify(made).ok
