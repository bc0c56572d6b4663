"""What is exported: find the model directory, and refuse before any work what the exporter cannot do."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from serving import exportable
from serving.directory import MANIFEST, check_files, current, foreign_weights, identity, read_manifest
from serving.export.adapters import CONFIG, Adapter
from serving.export.attention import ExportError, KvShape
from serving.export.fingerprint import fingerprint
from serving.export.probe import probe, refusal

# How transformers loads the models of each task that can be exported.
AUTO_CLASSES = {"causal_lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
MAPPINGS = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
MIN_CONTEXT_LENGTH = {"causal_lm": 64, "classification": 8}

# These change the frequencies with the length of the whole text, also for keys that are already in the cache.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Source:
    """A model directory that can be exported.

    `layers`: what each layer of a decoder for text caches; a classifier caches nothing. `trained_length`: the longest
    row that a Trivet run trained on, None where that is not known. `loras`: the adapters that are kept beside it.
    """

    folder: Path
    task: str
    config: PreTrainedConfig
    architecture: str
    layers: list[KvShape]
    trained_length: int | None
    provenance: dict[str, Any]
    loras: tuple[Adapter, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The names of a classifier's labels, in the order of its logits."""
        return [self.config.id2label[number] for number in range(self.config.num_labels)]

    def load(self) -> PreTrainedModel:
        """Return the untouched model in fp32 with its own plain attention, ready to evaluate.

        Raises ExportError when the weights cannot be read or are not all there: transformers would make up the rest.
        """
        try:
            model, loaded = AUTO_CLASSES[self.task].from_pretrained(
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
        if why := exportable.refusal(folder, manifest):
            raise ExportError(f"{folder}: {why}")
    _check_files_present(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(
            f"{folder}/config.json: transformers cannot read it ({reason}); save the model again"
        ) from None
    task, architecture = _check_config(folder, config)
    layers = []
    if task == "causal_lm":
        layers = probe(folder, config)
    else:
        _check_labels(folder, config)
    facts = manifest or {}
    if manifest is not None and exportable.TASK_OF[manifest["objective"]] != task:
        raise ExportError(f"{folder}: {MANIFEST} says {manifest['objective']}, but config.json {architecture}")
    provenance = {"path": str(path), "identity": identity(folder) if manifest else None}
    provenance["sha256"] = fingerprint(folder)
    provenance |= {key: facts.get(key) for key in ("objective", "strategy", "step")}
    return Source(folder, task, config, architecture, layers, facts.get("max_length"), provenance)


def find_model(path: Path) -> Path:
    """Return the model directory that `path` is, or that the run or the winner of the sweep at `path` holds."""
    if not path.is_dir():
        raise ExportError(f"{path}: no such folder; expected a model directory, a run or a sweep")
    if (path / "config.json").is_file():
        return path
    if (path / CONFIG).is_file():
        base = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path") or "its base"
        raise ExportError(
            f"{path}: is an adapter without its base; export the base with it: trivet export {base} ... --loras {path}"
        )
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "result.json").is_file():
        run = _best_run(path / "result.json")
        for candidate in (run / "model", path / run / "model", path / run.name / "model"):
            if (candidate / "config.json").is_file():
                return candidate
        raise ExportError(f"{path}: its best run {run} has no model directory; train it to the end")
    if (path / "status.json").is_file():
        raise ExportError(f"{path}: the run has not finished; finish it: trivet train {path / 'config.yaml'}")
    raise ExportError(
        f"{path}: has no config.json, model/ or result.json; expected a model directory, a run or a sweep"
    )


def _best_run(result: Path) -> Path:
    try:
        return Path(current(result, json.loads(result.read_text(encoding="utf-8")))["ranking"][0]["run"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ExportError(f"{result}: has no ranking of runs; expected a sweep's; run the sweep again") from None


def _check_files_present(folder: Path) -> None:
    if not list(folder.glob("*.safetensors")):
        raise ExportError(f"{folder}: has no *.safetensors weights; save the model again with save_pretrained")
    if name := foreign_weights(folder):
        raise ExportError(f"{folder}: names {name!r} as a file of its weights, which is no safetensors file of it")
    if (folder / "adapter_config.json").exists():
        raise ExportError(f"{folder}: an unmerged adapter lies beside the weights; merge it, or move it to adapter/")


def _check_config(folder: Path, config: PreTrainedConfig) -> tuple[str, str]:
    """Return the task and the architecture's name; raise ExportError for what config.json alone rules out."""
    where = folder / "config.json"
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    accepted = {task: mapping[type(config)].__name__ for task, mapping in MAPPINGS.items() if type(config) in mapping}
    if not accepted:
        raise ExportError(f"{where}: model_type {config.model_type!r} is neither a language model nor a classifier")
    if architecture not in accepted.values():
        raise ExportError(
            f"{where}: architecture {architecture} cannot be exported; accepted here: {', '.join(accepted.values())}"
        )
    task = next(task for task, name in accepted.items() if name == architecture)
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{where}: the weights are quantized; export the unquantized model")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ExportError(f"{where}: rope_type {rope_type!r} changes with the text's length and cannot be exported")
    if task == "causal_lm" and not MAPPINGS[task][type(config)]._supports_attention_backend:
        raise ExportError(refusal(folder, config))
    context_length, shortest = getattr(config, "max_position_embeddings", None), MIN_CONTEXT_LENGTH[task]
    if not context_length or context_length < shortest:
        raise ExportError(f"{where}: max_position_embeddings {context_length}; accepted: {shortest} or more")
    return task, architecture


def _check_labels(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ExportError for a classifier whose answer is not one of two or more labels, or cannot be batched."""
    where = folder / "config.json"
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise ExportError(f"{where}: problem_type {problem} cannot be exported; accepted: single_label_classification")
    if config.is_encoder_decoder:
        raise ExportError(f"{where}: {config.model_type} is an encoder-decoder; accepted: encoders and decoders")
    names = set(config.id2label.values())
    if len(names) < 2 or len(names) != config.num_labels or sorted(config.id2label) != list(range(config.num_labels)):
        raise ExportError(
            f"{where}: id2label has {len(names)} names for {config.num_labels} outputs, numbered "
            f"{', '.join(map(str, config.id2label))}; accepted: two or more, numbered from 0, each name once"
        )
    if config.pad_token_id is None:
        raise ExportError(f"{where}: has no pad_token_id; set it to the token that texts were padded with in training")
