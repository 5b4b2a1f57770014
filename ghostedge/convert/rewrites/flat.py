"""A finished .tflite file as objects, for the passes that run after the converter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from ai_edge_litert import schema_py_generated as schema

__all__ = ["OPS", "Flat", "schema"]

OPS = schema.BuiltinOperator


class Flat:
    """A model of one subgraph; `bytes()` gives the file again."""

    def __init__(self, content: bytes) -> None:
        self.model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytearray(content), 0))
        self.graph = self.model.subgraphs[0]
        self.tensors: list[Any] = self.graph.tensors

    def __bytes__(self) -> bytes:
        return _packed(self.model)

    def operators(self, kind: int) -> Iterator[Any]:
        return (op for op in list(self.graph.operators) if self.kind(op) == kind)

    def kind(self, op: Any) -> int:
        code = self.model.operatorCodes[op.opcodeIndex]
        # Codes above 127 are in one field, older ones in both.
        return max(code.builtinCode, code.deprecatedBuiltinCode)

    def set_kind(self, op: Any, kind: int, version: int) -> None:
        """Make an operator one of a kind, with the version that its types need."""
        codes = self.model.operatorCodes
        for index, known in enumerate(codes):
            if (known.builtinCode, known.version) == (kind, version):
                op.opcodeIndex = index
                return
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, min(kind, 127), version
        codes.append(code)
        op.opcodeIndex = len(codes) - 1

    def name(self, tensor: int) -> str:
        name = self.tensors[tensor].name
        return name.decode() if isinstance(name, bytes) else name

    def producer(self, tensor: int) -> Any | None:
        return next((op for op in self.graph.operators if tensor in op.outputs), None)

    def readers(self, tensor: int) -> list[Any] | None:
        """Return the operators that read a tensor, each once, None where it is a model output."""
        if tensor in self.graph.outputs:
            return None
        return [op for op in self.graph.operators if tensor in op.inputs]

    def fixed_shape(self, tensor: int) -> list[int] | None:
        """Return a tensor's shape, None where it has none or a side of it is free."""
        entry = self.tensors[tensor]
        signature = entry.shape if entry.shapeSignature is None else entry.shapeSignature
        if signature is None or min(signature, default=0) < 0:
            return None
        return [int(side) for side in entry.shape]

    def part(self, operators: Sequence[Any], outputs: Sequence[int]) -> bytes:
        """Return the file of a model of some operators alone, in the order given.

        Its inputs are the computed tensors that they read and do not make, the model's own ones
        first; its outputs are the tensors `outputs`.
        """
        made = {t for op in operators for t in op.outputs}
        read = [t for op in operators for t in op.inputs if t >= 0 and t not in made]
        given = [t for t in self.graph.inputs if t in read]
        given += [t for t in read if self.data(t) is None]
        numbers = {t: i for i, t in enumerate(dict.fromkeys([*given, *read, *sorted(made)]))}
        result, graph = copy.copy(self.model), copy.copy(self.graph)
        result.buffers = [schema.BufferT()]
        graph.tensors = []
        for old in numbers:
            tensor = copy.copy(self.tensors[old])
            if self.data(old) is not None:
                result.buffers.append(self.model.buffers[tensor.buffer])
            tensor.buffer = 0 if self.data(old) is None else len(result.buffers) - 1
            graph.tensors.append(tensor)
        graph.operators = [copy.copy(op) for op in operators]
        for op in graph.operators:
            op.inputs = [numbers.get(t, -1) for t in op.inputs]
            op.outputs = [numbers[t] for t in op.outputs]
        graph.inputs = [numbers[t] for t in dict.fromkeys(given)]
        graph.outputs = [numbers[t] for t in outputs]
        result.subgraphs = [graph]
        result.metadata = result.metadataBuffer = result.signatureDefs = None
        return _packed(result)

    def add(self, tensor: Any) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def data(self, tensor: int) -> np.ndarray | None:
        """Return the bytes of a constant, uint8, None for a tensor that is computed."""
        data = self.model.buffers[self.tensors[tensor].buffer].data
        return None if data is None or len(data) == 0 else data

    def set_data(self, tensor: int, data: np.ndarray) -> None:
        """Replace a constant's bytes, for this tensor alone."""
        entry, buffers = self.tensors[tensor], self.model.buffers
        if not entry.buffer or sum(other.buffer == entry.buffer for other in self.tensors) > 1:
            buffers.append(schema.BufferT())
            entry.buffer = len(buffers) - 1
        buffers[entry.buffer].data = np.frombuffer(data.tobytes(), np.uint8)

    def prune(self) -> None:
        """Remove tensors that no operator names, kinds of operators and constants not in use."""
        graph, model = self.graph, self.model
        operators = graph.operators
        ends = [*graph.inputs, *graph.outputs]
        named = {tensor for op in operators for tensor in (*op.inputs, *op.outputs)}
        kept = sorted({*named, *ends} - {-1})
        place = {tensor: index for index, tensor in enumerate(kept)} | {-1: -1}
        self.tensors = graph.tensors = [self.tensors[tensor] for tensor in kept]
        for tensors in [graph, *operators]:
            tensors.inputs = [place[tensor] for tensor in tensors.inputs]
            tensors.outputs = [place[tensor] for tensor in tensors.outputs]
        for signature in model.signatureDefs or []:
            for end in (*signature.inputs, *signature.outputs):
                end.tensorIndex = place[end.tensorIndex]
        codes = sorted({op.opcodeIndex for op in operators})
        model.operatorCodes = [model.operatorCodes[code] for code in codes]
        for op in operators:
            op.opcodeIndex = codes.index(op.opcodeIndex)
        holders = [*self.tensors, *(model.metadata or [])]
        buffers = sorted({0} | {holder.buffer for holder in holders})
        model.buffers = [model.buffers[buffer] for buffer in buffers]
        for holder in holders:
            holder.buffer = buffers.index(holder.buffer)


def _packed(model: Any) -> bytes:
    builder = _Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Builder(flatbuffers.Builder):
    """Aligns constants to 16 bytes, as the schema asks; the generated code does not."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:
        return super().StartVector(elemSize, numElems, 16 if elemSize == 1 else alignment)
