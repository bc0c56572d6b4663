"""Any torch.nn.Module as an ONNX directory with its proof: tensors in, tensors out, and the batch of any size.

The first size of every input and output is the batch, and a row's answer must not depend on the other rows.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from serving.directory import seal, staged
from serving.export.reference import save_reference
from serving.export.trace import Example, give_weights, quiet, trace
from serving.export.versions import versions
from serving.export.weights import check_numbers
from serving.export_paths import ExportError, check_target
from serving.proofs import append_verification
from serving.reference_file import FACTS
from serving.session import GRAPH
from serving.verify import VerificationFailed, prove

NUM_ROWS = 12  # of the reference: those that were given, and others like them

Tensors = dict[str, torch.Tensor]


def export_module(
    module: torch.nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    onnx_dir: str | Path,
    *,
    labels: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export `module` in fp32, as it evaluates, to `onnx_dir`; return the verification record.

    `example_inputs` are what `forward` takes, by position or name, a batch of real rows. It returns a tensor, several
    or a dict of them. `labels` name the numbers of an answer, for who serves it. The folder appears whole and verified
    on the CPU, or not at all. Raises ExportError for what cannot be exported, and VerificationFailed with the evidence.
    """
    report = progress or (lambda stage: None)
    onnx_dir = Path(onnx_dir).resolve()
    check_target(onnx_dir)
    inputs = _named(module, example_inputs)
    check_numbers(onnx_dir, module)
    with staged(onnx_dir) as folder, _evaluating(module):
        report("running the source model")
        rows = _rows(inputs)
        answers = _ask(module, rows)
        facts = _facts(module, rows, answers, labels)
        save_reference(folder, _reference(rows, answers), {FACTS: facts})
        report("writing the graph")
        graph = _graph(module, rows, list(answers))
        ir.save(graph, folder / GRAPH, external_data=f"{GRAPH}.data")
        seal(folder, "onnx", **facts, versions=versions())
        record = prove(folder, "cpu", progress=report)
        append_verification(folder, record)
        if not record["passed"]:
            raise VerificationFailed(
                f"{_kind(module)}: exported, but not equal to its source, so nothing was published: {record['reason']}"
            )
    return record


class _Outputs(torch.nn.Module):
    """A module whose outputs come as a tuple."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.model = module

    def forward(self, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        return tuple(_outputs(self.model(**inputs)).values())


def _named(module: torch.nn.Module, given: Any) -> Tensors:
    """Return the inputs by the names that `forward` has for them. Raises ExportError for what is no batch of rows."""
    if not isinstance(given, Mapping):
        values = [given] if isinstance(given, torch.Tensor) else list(given)
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [each.name for each in inspect.signature(module.forward).parameters.values() if each.kind in kinds]
        if len(names) < len(values):
            raise ExportError(
                f"example_inputs: {len(values)} found, but forward of {_kind(module)} takes "
                f"{', '.join(names) or 'none'} by position; give a dict of the inputs by name"
            )
        given = dict(zip(names, values, strict=False))
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 1 or not len(value):
            raise ExportError(
                f"example_inputs: {name} is {getattr(value, 'shape', type(value).__name__)}; accepted: tensors whose "
                "first size is the batch, one row or more"
            )
    if not given or len({len(value) for value in given.values()}) > 1:
        sizes = {name: len(value) for name, value in given.items()}
        raise ExportError(f"example_inputs: batches of {sizes or 'nothing'}; accepted: of one size, one or more")
    return {name: value.detach().cpu() for name, value in given.items()}


def _rows(inputs: Tensors) -> Tensors:
    """Return NUM_ROWS rows: those that were given, and where they are fewer the same again with noise."""
    random, found = torch.Generator().manual_seed(0), {}
    for name, value in inputs.items():
        rows = value[:NUM_ROWS]
        again = rows.repeat(-(-NUM_ROWS // len(rows)), *[1] * (rows.dim() - 1))[len(rows) : NUM_ROWS]
        if rows.is_floating_point():
            noise = torch.randn(again.shape, generator=random) * float(rows.std(correction=0) or 1)
            again = again + noise.to(rows.dtype)
        found[name] = torch.cat([rows, again])
    return found


def _ask(module: torch.nn.Module, rows: Tensors) -> Tensors:
    """Return what the module says of every row, each alone. Raises ExportError for what is no answer row by row."""
    with torch.no_grad(), quiet():
        try:
            each = [
                _outputs(module(**{name: value[i : i + 1] for name, value in rows.items()})) for i in range(NUM_ROWS)
            ]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(f"{_kind(module)}: cannot answer one row of example_inputs alone ({reason})") from error
    answers = {name: [one[name] for one in each] for name in each[0]}
    for name, values in answers.items():
        if any(value.dim() < 1 or len(value) != 1 for value in values):
            raise ExportError(f"{_kind(module)}: {name} of one row is {tuple(values[0].shape)}; accepted: [1, ...]")
        if not all(torch.isfinite(value).all() for value in values):
            raise ExportError(f"{_kind(module)}: {name} is not finite; was its training diverging?")
    return {name: torch.cat(values) for name, values in answers.items()}


def _outputs(found: Any) -> Tensors:
    """Return the outputs by name: those of a dict, `output`, or `output_0`, `output_1` and so on."""
    if isinstance(found, torch.Tensor):
        return {"output": found}
    named = found if isinstance(found, Mapping) else {f"output_{i}": value for i, value in enumerate(found)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _graph(module: torch.nn.Module, rows: Tensors, outputs: list[str]) -> ir.Model:
    batch = torch.export.Dim("batch")
    inputs = {name: value[:3] for name, value in rows.items()}  # not 1, which the tracer would take for a constant
    whole = _Outputs(module)
    example = Example({"inputs": inputs}, {"inputs": {name: {0: batch} for name in inputs}}, list(inputs), outputs)
    model = trace(whole, example)
    give_weights(model, whole)
    return model


def _reference(rows: Tensors, answers: Tensors) -> dict[str, np.ndarray]:
    kept = {f"inputs.{name}": value for name, value in rows.items()}
    kept |= {f"outputs.{name}": value for name, value in answers.items()}
    return {name: value.numpy() for name, value in kept.items()}


def _facts(module: torch.nn.Module, rows: Tensors, answers: Tensors, labels: Sequence[str] | None) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        weights.update(name.encode())
        weights.update(value.cpu().numpy().tobytes())
    return {
        "task": "module",
        "architecture": _kind(module),
        "dtype": "fp32",
        "quantization": None,
        "optimize_for": "cpu",
        "labels": None if labels is None else list(labels),
        "inputs": list(rows),
        "outputs": list(answers),
        "row_shapes": {name: list(value.shape[1:]) for name, value in rows.items()},
        "row_types": {name: str(value.numpy().dtype) for name, value in rows.items()},
        "source": {"path": None, "identity": None, "sha256": weights.hexdigest()},
    }


def _kind(module: torch.nn.Module) -> str:
    return type(module).__name__


@contextmanager
def _evaluating(module: torch.nn.Module) -> Any:
    """While open, the module and every part of it evaluates; then each is as it was."""
    learning = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in learning:
            each.training = True
