"""What is exported: find the model directory, and refuse before any work what the exporter cannot do."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from serving.directory import MANIFEST, check_files, identity, read_manifest
from serving.export.attention import ExportError, InPlaceAttention, KvShape
from serving.export.cache import PassThroughCache

OBJECTIVES = ("causal_lm", "sft")
MIN_CONTEXT_LENGTH = 64

# These change the frequencies with the length of the whole text, also for keys that are already in the cache.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Source:
    """A model directory that can be exported."""

    folder: Path
    config: PreTrainedConfig
    architecture: str
    num_layers: int
    kv_shape: KvShape
    provenance: dict[str, Any]

    def load(self) -> PreTrainedModel:
        """Return the untouched model in fp32 with its own plain attention, ready to evaluate.

        Raises ExportError when the weights cannot be read or are not all there: transformers would make up the rest.
        """
        try:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # so that the names of the tensors are told
                output_loading_info=True,
            )
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"{self.folder}: its weights cannot be read ({reason}); save the model again") from None
        wrong = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
        if wrong:
            named = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise ExportError(
                f"{self.folder}: its weights lack {named}, or hold another shape of it; save the model again"
            )
        return model.eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises ExportError when there is none that runs without Python code."""
        fix = "save the tokenizer into it with save_pretrained"
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ExportError(f"{self.folder}: no tokenizer ({str(error).splitlines()[0]}); {fix}") from None
        if not tokenizer.is_fast:
            raise ExportError(
                f"{self.folder}: {type(tokenizer).__name__} has no tokenizer.json form; {fix}, a fast one"
            )
        return tokenizer


def open_source(path: Path) -> Source:
    """Return the model behind `path`: a model directory (Trivet's or plain Hugging Face), a run, or a sweep's winner.

    Raises BadInput for a folder that is none of them, is altered, or holds a model that cannot be exported.
    """
    folder = find_model(Path(path))
    manifest = None
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, "model")
        check_files(folder, manifest)
        if manifest["objective"] not in OBJECTIVES:
            accepted = ", ".join(OBJECTIVES)
            raise ExportError(f"{folder}: objective {manifest['objective']} cannot be exported; accepted: {accepted}")
    _check_files_present(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(
            f"{folder}/config.json: transformers cannot read it ({reason}); save the model again"
        ) from None
    architecture = _check_config(folder, config)
    shapes = probe(folder, config)
    provenance = {"path": str(path), "identity": identity(folder) if manifest else None}
    provenance |= {key: manifest[key] if manifest else None for key in ("objective", "strategy", "step")}
    return Source(folder, config, architecture, len(shapes), shapes[0], provenance)


def find_model(path: Path) -> Path:
    """Return the model directory that `path` is, or that the run or the winner of the sweep at `path` holds."""
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; expected a model directory, a run or a sweep")
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "result.json").is_file():
        run = _best_run(path / "result.json")
        for candidate in (run / "model", path / run / "model", path / run.name / "model"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ExportError(f"{path}: its best run {run} has no model directory; train it to the end")
    raise ExportError(
        f"{path}: has no config.json, model/ or result.json; expected a model directory, a run or a sweep"
    )


def _best_run(result: Path) -> Path:
    try:
        return Path(json.loads(result.read_text(encoding="utf-8"))["ranking"][0]["run"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ExportError(f"{result}: has no ranking of runs; expected a sweep's; run the sweep again") from None


def probe(folder: Path, config: PreTrainedConfig) -> list[KvShape]:
    """Run the architecture once without weights and return what each layer's attention asks for.

    Raises ExportError when some layer does not go through the attention interface or asks for what is not handled.
    """
    attention = InPlaceAttention()
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        model.set_attn_implementation(attention.register())
        model.config.pad_token_id = None  # else the model looks for padding among tokens that are not there
        try:
            logits = model(
                input_ids=torch.ones(1, 3, dtype=torch.long),
                position_ids=torch.arange(3)[None],
                past_key_values=PassThroughCache(),
                use_cache=True,
                logits_to_keep=torch.tensor([1, 2]),
            ).logits
        except ExportError as error:
            raise ExportError(f"{folder}: {error}") from None
        except Exception as error:
            raise ExportError(f"{_refusal(folder, config)} ({type(error).__name__} in a trial run)") from error
    layers = range(config.num_hidden_layers)
    if sorted(attention.shapes) != list(layers) or logits.shape != (1, 2, config.vocab_size):
        raise ExportError(_refusal(folder, config))
    shapes = [attention.shapes[layer] for layer in layers]
    _check_shapes(folder, config, shapes)
    return shapes


def _refusal(folder: Path, config: PreTrainedConfig) -> str:
    return (
        f"{folder}: {MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__} cannot be exported: it does not put every "
        "layer through transformers' attention interface; accepted: decoders that do (Llama, Qwen, Mistral, GPT-2 ...)"
    )


def _check_shapes(folder: Path, config: PreTrainedConfig, shapes: list[KvShape]) -> None:
    if len({(shape.num_kv_heads, shape.head_dim) for shape in shapes}) > 1:
        raise ExportError(f"{folder}: its layers differ in KV heads or head size; one size for all layers is accepted")
    # Elsewhere the mask limits a sliding layer; here the keyword alone does, so a model must not forget to pass it.
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [("sliding" if window else "full") + "_attention"] * len(shapes)
    for layer, (kind, shape) in enumerate(zip(types, shapes, strict=True)):
        expected = {"full_attention": None, "sliding_attention": window}.get(kind, "unknown")
        if shape.sliding_window != expected:
            found = f"asks for sliding_window {shape.sliding_window}"
            raise ExportError(f"{folder}: layer {layer} is {kind} ({window=}) but {found}; it cannot be exported")


def _check_files_present(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"{folder}: has no *.safetensors weights; save the model again with save_pretrained")
    if (folder / "adapter_config.json").exists():
        raise ExportError(f"{folder}: an unmerged adapter lies beside the weights; merge it, or move it to adapter/")


def _check_config(folder: Path, config: PreTrainedConfig) -> str:
    """Return the architecture's name; raise ExportError for what config.json alone rules out."""
    where = folder / "config.json"
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ExportError(f"{where}: model_type {config.model_type!r} is no causal language model; only those export")
    if architecture != MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__:
        expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        raise ExportError(f"{where}: architecture {architecture} cannot be exported; accepted here: {expected}")
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{where}: the weights are quantized; export the unquantized model")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ExportError(f"{where}: rope_type {rope_type!r} changes with the text's length and cannot be exported")
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend:
        raise ExportError(_refusal(folder, config))
    context_length = getattr(config, "max_position_embeddings", None)
    if not context_length or context_length < MIN_CONTEXT_LENGTH:
        raise ExportError(f"{where}: max_position_embeddings {context_length}; accepted: {MIN_CONTEXT_LENGTH} or more")
    return architecture
