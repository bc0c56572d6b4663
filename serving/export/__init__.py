"""Export: a trained model directory becomes an ONNX directory that is proven equal to it, or nothing at all."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.directory import seal, staged
from serving.export import decoder, lora_folder, rows
from serving.export.adapters import read_adapters
from serving.export.experts import check_experts
from serving.export.half import check_weights, hollow, watched
from serving.export.heads import HEADS
from serving.export.held_out import HeldOutRows, add_held_out
from serving.export.loras import check_fits
from serving.export.plain_module import export_module
from serving.export.proof import proven, require_passed
from serving.export.providers import provider_of_proof
from serving.export.source import Attach, Source, open_source
from serving.export.trace import quiet
from serving.export.versions import versions
from serving.export.weights import check_vocabulary
from serving.export_options import Dtype, Options
from serving.export_paths import ExportError, check_target, find_model
from serving.proofs import append_verification
from serving.session import GRAPH
from serving.verify import VerificationFailed

__all__ = ["ExportError", "HeldOutRows", "Options", "VerificationFailed", "export_model", "export_module"]

# Each has write_reference, write_graph and write_settings.
EXPORTERS: dict[str, ModuleType] = {"causal_lm": decoder, **dict.fromkeys(HEADS, rows)}


def export_model(
    source: str | Path,
    onnx_dir: str | Path,
    options: Options | None = None,
    *,
    held_out: HeldOutRows | None = None,
    attach: Attach | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export the model behind `source` (model directory, run or sweep) to `onnx_dir`; return the verification record.

    The folder appears whole and verified, on the provider that it is for or else on the CPU, in place of an older one,
    or not at all. What is quantised, or in half precision, is the graph in fp32 after its own proof, which the record
    keeps; what quantisation costs is then measured on `held_out` rows. Where an export is for a GPU and nothing here
    runs its number format, that proof is all there is and the record's `provider` is None: the engine refuses the
    folder until it is verified where it is to be served. `attach` puts a bottleneck adapter (its folder) into the model
    of its base. `progress` is called with a word or two at the start of each stage.
    Raises ExportError for what cannot be exported, or an `onnx_dir` that holds something else, before any work, and
    VerificationFailed with the evidence when the graph does not answer as the source does.
    """
    report = progress or (lambda stage: None)
    options = options or Options()
    onnx_dir = Path(onnx_dir).resolve()
    if options.quantization is not None and held_out is None:
        raise ExportError(f"quantization {options.quantization}: nothing to measure its cost on; give held_out rows")
    check_target(onnx_dir, find_model(Path(source)).resolve())
    provider = provider_of_proof(options)
    report("reading the model")
    opened, tokenizer, model = _read(Path(source), options, attach)
    with staged(onnx_dir) as folder:
        _write(model, tokenizer, opened, options, held_out, folder, report)
        del model
        record = proven(folder, provider, options, lambda path: _write_again(opened, options, path), report)
        append_verification(folder, record)
        require_passed(source, record)
    return record


def _read(
    path: Path, options: Options, attach: Attach | None
) -> tuple[Source, PreTrainedTokenizerBase, PreTrainedModel]:
    with quiet():
        opened = _with_loras(open_source(path, attach), options)
        tokenizer, model = opened.load_tokenizer(), opened.load()
        check_vocabulary(model, tokenizer, opened.folder)
        check_experts(opened.folder, model)
        check_weights(model, options.dtype)
    return opened, tokenizer, model


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: Source,
    options: Options,
    held_out: HeldOutRows | None,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Write all of an ONNX directory but its proof: first what the untouched model answers, then what is made of it."""
    exporter = EXPORTERS[opened.task]
    report("running the source model")
    with quiet(), watched(model, options.dtype):
        facts = _facts(opened, options, tokenizer) | exporter.write_settings(model, tokenizer, opened, folder)
        exporter.write_reference(model, tokenizer, opened, facts, folder)
        if held_out is not None:
            add_held_out(model, tokenizer, opened, held_out, folder)
    report("writing the graph")
    inputs, outputs = _write_graph(model, opened, options, "fp32", folder / GRAPH)
    hollow(model, "fp32")  # what tracing leaves behind knows its weights, and the proof takes as much memory again
    with quiet():
        # Written by transformers, not copied: for some classes it changes tokenizer.json when it loads it.
        tokenizer.save_pretrained(folder)
    # Both until the graph is rounded: see halved.py and quantized.py.
    rounded = {"dtype": "fp32", "quantization": None}
    seal(folder, "onnx", **facts, **rounded, inputs=inputs, outputs=outputs, versions=versions())


def _write_graph(
    model: PreTrainedModel, opened: Source, options: Options, dtype: Dtype, path: Path
) -> tuple[list[str], list[str]]:
    """Write the graph that `options` ask for; return the names of its inputs and outputs.

    In half precision only its nodes: its weights are those of the graph in fp32.
    """
    if opened.is_lora:
        lora_folder.merge(model, opened.folder, opened.body)
    if dtype != "fp32":
        hollow(model, dtype)
    return EXPORTERS[opened.task].write_graph(model, opened, options, path)


def _write_again(opened: Source, options: Options, path: Path) -> None:
    """Write the nodes of the graph in the number format that is asked for, from the source read anew."""
    with quiet():
        model = opened.load()
    _write_graph(model, opened, options, options.dtype, path)


def _with_loras(source: Source, options: Options) -> Source:
    """Return the source with the adapters that are asked for. Raises ExportError for those that do not fit it."""
    if options.loras and (source.task != "causal_lm" or source.body != source.folder):
        found = f"a model for {source.task}" if source.body == source.folder else f"an adapter over {source.body}"
        raise ExportError(f"--loras: {source.folder} is {found}; accepted: language models, whole")
    adapters = read_adapters(options.loras, source.folder, source.provenance["sha256"])
    check_fits(source.config, adapters)
    return replace(source, loras=adapters)


def _facts(source: Source, options: Options, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is known of every model before it is asked anything; see the exporters' write_settings for more."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return {
        "task": source.task,
        "architecture": source.architecture,
        "optimize_for": options.optimize_for,
        "labels": None,
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "source": source.provenance,
    }
