"""Where an export can be proven: which of this machine's providers run its number format, found by trying."""

from typing import get_args

import onnx_ir as ir

from serving.export_options import Dtype, Options
from serving.export_paths import ExportError
from serving.session import onnxruntime_version, why_not

_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def provider_of_proof(options: Options) -> str | None:
    """Return the provider to prove on: the one asked for, else the CPU; None where neither runs this format here.

    Raises ExportError where an export is for the CPU, which has no kernels for the format.
    """
    for provider in dict.fromkeys((options.optimize_for, "cpu")):
        reason = reason_against(options.dtype, provider)
        if reason is None:
            return provider
        if options.optimize_for == "cpu":
            fitting = [name for name in get_args(Dtype) if reason_against(name, "cpu") is None]
            raise ExportError(
                f"--dtype {options.dtype}: onnxruntime {onnxruntime_version()} cannot run it on cpu ({reason}); "
                f"accepted there: {', '.join(fitting)}; for a GPU add --optimize-for cuda"
            )
    return None


def reason_against(dtype: Dtype, provider: str) -> str | None:
    """Return why this provider cannot run this number format here; None where it can."""
    return why_not(_trial(_TYPES[dtype]), provider)


def _trial(kind: ir.DataType) -> bytes:
    """Return a graph of the operator that every model has most of."""
    rows, weight, product = (
        ir.Value(name=name, shape=ir.Shape([2, 2]), type=ir.TensorType(kind)) for name in ("rows", "weight", "product")
    )
    node = ir.Node("", "MatMul", [rows, weight], outputs=[product])
    graph = ir.Graph([rows, weight], [product], nodes=[node], opset_imports={"": 21}, name="trial")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
