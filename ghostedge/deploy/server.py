"""ONNX Runtime, and Triton's model repository."""

from __future__ import annotations

from ghostedge.deploy.target import Need, Target

TARGET = Target(
    summary="ONNX Runtime, and Triton's model repository",
    needs=(Need("model.onnx", "models/classifier/1/model.onnx", "--recipe server"),),
)
