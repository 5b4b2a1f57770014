from __future__ import annotations

from ghostedge.convert.rewrites.flat import OPS, Flat, schema

COPYING = (OPS.CONCATENATION, OPS.DEPTH_TO_SPACE)


def copied_scale(model: Flat) -> int:
    """Remove a QUANTIZE between a tensor and its copies: the copies take the tensor's scale.

    Matches int8 -> QUANTIZE -> int8 -> CONCATENATION of that tensor with itself -> DEPTH_TO_SPACE, as
    the upsample of a sigmoid becomes: LOGISTIC has a fixed scale of 1/256, and the converter gives the
    copies one of their own, from the range it saw.

    Proves: the QUANTIZE is read by that CONCATENATION alone, and all of its inputs are it; the
    CONCATENATION and the DEPTH_TO_SPACE are no model outputs; the DEPTH_TO_SPACE is read only by MUL,
    which takes any scale.

    More exact than before: the values are those of the tensor, no longer rounded to another scale.
    """
    changed = 0
    for quantize in model.operators(OPS.QUANTIZE):
        source, target = quantize.inputs[0], quantize.outputs[0]
        if any(model.tensors[t].type != schema.TensorType.INT8 for t in (source, target)):
            continue
        tensor, path = target, []
        for kind in COPYING:
            readers = model.readers(tensor)
            if readers is None or len(readers) != 1 or model.kind(readers[0]) != kind:
                break
            path.append(readers[0])
            tensor = readers[0].outputs[0]
        after = model.readers(tensor)
        if len(path) != len(COPYING) or not after or set(path[0].inputs) != {target}:
            continue
        if any(model.kind(op) != OPS.MUL for op in after):
            continue
        path[0].inputs = [source] * len(path[0].inputs)
        for op in path:
            model.tensors[op.outputs[0]].quantization = model.tensors[source].quantization
        model.graph.operators.remove(quantize)
        changed += 1
    return changed
