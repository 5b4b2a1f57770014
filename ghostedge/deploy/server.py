"""The bundle's ONNX model in ONNX Runtime, and as Triton's model repository."""

from __future__ import annotations

from ghostedge.bundle import GOLDEN, LABELS
from ghostedge.deploy.target import Filled, Handover, Need, Target
from ghostedge.runtime import Classifier, OnnxRuntime

MODEL = "model.onnx"
FOLDER = "models/classifier"


def _fill(handover: Handover) -> Filled:
    """Return the names and shapes of the model's tensors, without the batch axis, which is free."""
    backend = Classifier(handover.bundle / MODEL).backend
    assert isinstance(backend, OnnxRuntime)
    (image,), (scores,) = backend.session.get_inputs(), backend.session.get_outputs()
    files = {
        f"{FOLDER}/{LABELS}": (handover.bundle / LABELS).read_bytes(),
        GOLDEN: (handover.bundle / GOLDEN).read_bytes(),
    }
    names = {
        end: {"name": tensor.name, "dims": tensor.shape[1:]}
        for end, tensor in (("input", image), ("output", scores))
    }
    return names, files


TARGET = Target(
    summary="the fp32 ONNX model in ONNX Runtime, and as Triton's model repository",
    needs=(Need(MODEL, f"{FOLDER}/1/{MODEL}", "--recipe server"),),
    fill=_fill,
)
