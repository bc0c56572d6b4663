"""Export: a trained model directory becomes an ONNX directory that is proven equal to it, or nothing at all."""

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.directory import DirectoryError, append_verification, read_manifest, seal, staged
from serving.export.attention import ExportError
from serving.export.graph import quiet, write_graph
from serving.export.reference import write_reference
from serving.export.source import Source, find_model, open_source
from serving.session import GRAPH, onnxruntime_version
from serving.verify import VerificationFailed, prove

__all__ = ["ExportError", "VerificationFailed", "export_model"]


def export_model(
    source: str | Path, onnx_dir: str | Path, *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Export the model behind `source` (model directory, run or sweep) to `onnx_dir`; return the verification record.

    The folder appears whole and verified on CPU, in place of an older one, or not at all. `progress` is called with a
    word or two at the start of each stage. Raises ExportError for what cannot be exported, or an `onnx_dir` that holds
    something else, before any work, and VerificationFailed with the evidence when the graph does not answer as the
    source does.
    """
    report = progress or (lambda stage: None)
    onnx_dir = Path(onnx_dir).resolve()
    _check_target(onnx_dir, find_model(Path(source)).resolve())
    report("reading the model")
    with quiet():
        opened = open_source(Path(source))
        tokenizer = opened.load_tokenizer()
        model = opened.load()
    with staged(onnx_dir) as folder:
        report("running the source model")
        with quiet():
            write_reference(model, tokenizer, folder)
        report("writing the graph")
        inputs, outputs = write_graph(model, opened, folder / GRAPH)
        with quiet():
            _write_text_files(opened, model, tokenizer, folder)
        seal(folder, "onnx", **_manifest(opened, model, tokenizer), inputs=inputs, outputs=outputs)
        record = prove(folder, "cpu", progress=report)
        append_verification(folder, record)
        if not record["passed"]:
            raise VerificationFailed(
                f"{source}: exported, but not equal to its source, so nothing was published: {record['reason']}"
            )
    return record


def _check_target(onnx_dir: Path, model_dir: Path) -> None:
    """Raise ExportError where `onnx_dir` holds anything else than an older export, or overlaps with the model."""
    if onnx_dir == model_dir or model_dir in onnx_dir.parents or onnx_dir in model_dir.parents:
        raise ExportError(f"{onnx_dir}: holds, is or lies in the source {model_dir}; give a folder beside it")
    if onnx_dir.exists() and not onnx_dir.is_dir():
        raise ExportError(f"{onnx_dir}: is a file; give a folder to write to")
    if onnx_dir.is_dir() and any(onnx_dir.iterdir()):
        try:
            read_manifest(onnx_dir, "onnx")
        except DirectoryError as error:
            raise ExportError(f"{error}; only an older ONNX directory is replaced: give a new folder") from None


def _write_text_files(source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # Written by transformers, not copied: for some classes it changes what tokenizer.json says when it loads it.
    tokenizer.save_pretrained(folder)
    settings = source.folder / "generation_config.json"
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    else:
        model.generation_config.to_json_file(folder / settings.name)


def _manifest(source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = tokenizer.chat_template
    return {
        "task": "causal_lm",
        "architecture": source.architecture,
        "dtype": "fp32",
        "quantization": None,
        "num_layers": source.num_layers,
        "num_kv_heads": source.kv_shape.num_kv_heads,
        "head_dim": source.kv_shape.head_dim,
        "vocab_size": source.config.vocab_size,
        "context_length": source.config.max_position_embeddings,
        "end_token_ids": _end_token_ids(model, tokenizer),
        "labels": None,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        "source": source.provenance,
        "versions": {
            # The distribution may be onnxruntime or onnxruntime-gpu; the module is the same.
            **{name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
            "onnxruntime": onnxruntime_version(),
        },
    }


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: what generation_config.json says, else the tokenizer's end token."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return sorted(ids) if isinstance(ids, list) else [ids]
