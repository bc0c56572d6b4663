"""What is exported: find the model directory, and refuse before any work what the exporter cannot do."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from serving import exportable
from serving.directory import MANIFEST, check_files, foreign_weights, identity, read_manifest
from serving.export import lora_folder
from serving.export.adapters import Adapter
from serving.export.attention import KvShape
from serving.export.fingerprint import fingerprint
from serving.export.generation import check_generation
from serving.export.heads import AUTO_CLASSES, accepted_classes
from serving.export.pooling import Pooling, is_pooled, read_pooling
from serving.export.probe import probe, refusal
from serving.export.refusing import refusing
from serving.export.weights import check_numbers, names_in, read_model
from serving.export_paths import ExportError, find_model, is_lora
from serving.manifest import NUMBER, SEVERAL, SINGLE

MIN_CONTEXT_LENGTH = {"causal_lm": 64}  # of the others 8: a word between its special tokens

LONGEST_CONTEXT = 1 << 24  # tokens: a graph holds a table of all positions

# These change the frequencies with the length of the whole text, also for keys that are already in the cache.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# transformers lets a pickle build nothing but tensors.
_CONVERT = (
    "import transformers as t; path = {}; name = t.AutoConfig.from_pretrained(path).architectures[0]; "
    "getattr(t, name).from_pretrained(path).save_pretrained(path)"
)

FEWEST_LABELS = {SINGLE: 2, SEVERAL: 1, NUMBER: 1}

Attach = Callable[[PreTrainedModel, Path], None]


@dataclass(frozen=True)
class Source:
    """A model directory that can be exported.

    `body`: where its config.json and most of its weights lie: elsewhere than in `folder` where that is an adapter, or
    holds one beside its base. `attach` puts a bottleneck adapter, and the head beside it, into the model of its base.
    `layers`: what each layer of a decoder for text caches; the other tasks cache nothing. `trained_length`: the longest
    row that a Trivet run trained on, None where that is not known. `text_pair`: whether it judges pairs of texts:
    always or never, as a Trivet run was trained; either, where nothing is known. `pooling`: of an embedding model.
    `loras`: the adapters that are kept beside it.
    """

    folder: Path
    body: Path
    task: str
    config: PreTrainedConfig
    architecture: str
    layers: list[KvShape]
    trained_length: int | None
    text_pair: str
    pooling: Pooling | None
    provenance: dict[str, Any]
    attach: Attach | None = None
    loras: tuple[Adapter, ...] = ()

    @property
    def is_lora(self) -> bool:
        """Whether `folder` is no more than a LoRA over the model in `body`."""
        return is_lora(self.folder)

    @property
    def labels(self) -> list[str]:
        """The names of a head's labels, in the order of its logits."""
        return [self.config.id2label[number] for number in range(self.config.num_labels)]

    @property
    def problem(self) -> str:
        """What a classifier says of a text: one label, several, or a number; transformers' words for it."""
        return getattr(self.config, "problem_type", None) or SINGLE

    def load(self) -> PreTrainedModel:
        """Return the untouched model in fp32 with its own plain attention, ready to evaluate; its LoRA is not merged.

        Raises ExportError when the weights cannot be read or are not all there: transformers would make up the rest.
        """
        adapter = self.folder / "adapter"
        may_lack = ("pooler.",) if self.pooling else ()
        model = read_model(AUTO_CLASSES[self.task], self.body, may_lack=names_in(adapter) if self.attach else may_lack)
        if self.attach is not None:
            self.attach(model, adapter)
        if self.is_lora:
            lora_folder.apply(model, self.folder, self.body)
        check_numbers(self.folder, model)
        return model.eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises ExportError when there is none that runs without Python code."""
        fix = "save the tokenizer into it with save_pretrained"
        has_own = self.is_lora and (self.folder / "tokenizer.json").is_file()
        where = self.folder if has_own else self.body
        with refusing(f"{where}: no tokenizer: tokenizer.json and tokenizer_config.json cannot be read", fix):
            tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ExportError(
                f"{self.folder}: {type(tokenizer).__name__} has no tokenizer.json form; {fix}, a fast one"
            )
        if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}:
            # transformers makes one up of the special tokens where the file is missing
            raise ExportError(f"{where}: no tokenizer: no vocabulary lies beside its tokenizer_config.json; {fix}")
        _check_tokenizer(where, tokenizer)
        return tokenizer


def _check_tokenizer(where: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ExportError for settings of a tokenizer that are not served as they are."""
    longest, settings = tokenizer.model_max_length, where / "tokenizer_config.json"
    if not isinstance(longest, int) or longest < 1:
        raise ExportError(f"{settings}: model_max_length {longest!r}; accepted: a whole number, 1 or more")
    if getattr(tokenizer, "split_special_tokens", False):
        raise ExportError(f"{settings}: split_special_tokens true; accepted: false, special tokens are read as such")


def open_source(path: Path, attach: Attach | None = None) -> Source:
    """Return the model behind `path`: a model directory (Trivet's or plain Hugging Face), a run, or a sweep's winner.

    `attach` puts a bottleneck adapter into the model of its base, for a directory that holds both.
    Raises BadInput for a folder that is none of them, is altered, or holds a model that cannot be exported.
    """
    folder = find_model(Path(path))
    manifest = None
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, "model")
        check_files(folder, manifest)
        if why := exportable.refusal(folder, manifest):
            raise ExportError(f"{folder}: {why}")
    is_unmerged = manifest is not None and manifest.get("strategy") == "adapter"
    if is_unmerged and attach is None:
        raise ExportError(
            f"{folder}: a base and a bottleneck adapter, which only `trivet export` puts together; use it"
        )
    body = _body(folder, is_unmerged)
    _check_files_present(body)
    with refusing(f"{body}/config.json: transformers cannot make a model of it", "mend it, or save the model again"):
        config = AutoConfig.from_pretrained(body, local_files_only=True, trust_remote_code=False)
        task, architecture = _check_config(body, config)
        layers = probe(body, config) if task == "causal_lm" else []
    if task == "causal_lm":
        check_generation(body, config)
    pooling = read_pooling(body) if task == "embedding" else None
    if task in ("classification", "token_classification"):
        _check_labels(body, config, task)
    if manifest is not None and exportable.TASK_OF[manifest["objective"]] != task:
        raise ExportError(f"{folder}: {MANIFEST} says {manifest['objective']}, but config.json {architecture}")
    provenance = {"path": str(path), **_provenance(folder, body, manifest)}
    trained_length = pooling.max_length if pooling else (manifest or {}).get("max_length")
    text_pair = _text_pair(task, manifest)
    attach = attach if is_unmerged else None
    return Source(
        folder, body, task, config, architecture, layers, trained_length, text_pair, pooling, provenance, attach
    )


def _provenance(folder: Path, body: Path, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Return what an ONNX directory says of the model that it was made of."""
    facts = manifest or {}
    return {
        "identity": identity(folder) if manifest else None,
        "sha256": fingerprint(body, folder if body != folder else None),
        **{key: facts.get(key) for key in ("objective", "strategy", "step")},
    }


def _body(folder: Path, is_unmerged: bool) -> Path:
    """Return where the config.json and the weights lie that a model directory is about."""
    if is_lora(folder):
        return lora_folder.base_of(folder)
    return folder / "base" if is_unmerged else folder


def _check_files_present(folder: Path) -> None:
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        if pickles := sorted(folder.glob("pytorch_model*.bin")):
            raise ExportError(
                f"{folder}: has no *.safetensors weights, only {pickles[0].name}: a pickle, which is not read because "
                f"it can run code; convert it: python -c {shlex.quote(_CONVERT.format(json.dumps(str(folder))))}"
            )
        raise ExportError(f"{folder}: has no *.safetensors weights; save the model again with save_pretrained")
    if name := foreign_weights(folder):
        raise ExportError(f"{folder}: names {name!r} as a file of its weights, which is no safetensors file of it")
    if (folder / "adapter_config.json").exists():
        raise ExportError(f"{folder}: an unmerged adapter lies beside the weights; merge it, or move it to adapter/")


def _check_config(folder: Path, config: PreTrainedConfig) -> tuple[str, str]:
    """Return the task and the architecture's name; raise ExportError for what config.json alone rules out."""
    where = folder / "config.json"
    architecture = (getattr(config, "architectures", None) or ["none"])[0]
    accepted = accepted_classes(config)
    if not accepted:
        raise ExportError(f"{where}: model_type {config.model_type!r} is neither a language model nor an encoder")
    task = next((task for task, names in accepted.items() if architecture in names), None)
    if task is None:
        names = ", ".join(name for names in accepted.values() for name in names)
        raise ExportError(f"{where}: architecture {architecture} cannot be exported; accepted here: {names}")
    if task in ("causal_lm", "masked_lm") and is_pooled(folder):
        task = "embedding"  # made of a language model, whose name it has kept
    if config.is_encoder_decoder:
        raise ExportError(f"{where}: {config.model_type} is an encoder-decoder; accepted: encoders and decoders")
    if getattr(config, "quantization_config", None):
        raise ExportError(f"{where}: the weights are quantized; export the unquantized model")
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _LENGTH_DEPENDENT_ROPE:
            raise ExportError(f"{where}: rope_type {rope_type!r} changes with the text's length and cannot be exported")
    if task == "causal_lm" and not AUTO_CLASSES[task]._model_mapping[type(config)]._supports_attention_backend:
        raise ExportError(refusal(folder, config))
    context_length, shortest = getattr(config, "max_position_embeddings", None), MIN_CONTEXT_LENGTH.get(task, 8)
    if not isinstance(context_length, int) or not shortest <= context_length <= LONGEST_CONTEXT:
        raise ExportError(
            f"{where}: max_position_embeddings {context_length}; accepted: {shortest} to {LONGEST_CONTEXT}"
        )
    return task, architecture


def _rope_types(parameters: Any) -> list[str]:
    """Return how positions are rotated: in all layers, or in each type of layer, whose settings are nested."""
    if not isinstance(parameters, dict):
        return []
    nested = [found for value in parameters.values() for found in _rope_types(value)]
    return [str(parameters.get("rope_type", parameters.get("type", "default"))), *nested]


def _check_labels(folder: Path, config: PreTrainedConfig, task: str) -> None:
    """Raise ExportError for a head whose answers have no names, or cannot be batched."""
    where = folder / "config.json"
    problem = getattr(config, "problem_type", None) if task == "classification" else None
    problem = problem or SINGLE
    if problem not in FEWEST_LABELS:
        raise ExportError(f"{where}: problem_type {problem!r} is unknown; accepted: {', '.join(FEWEST_LABELS)}")
    names = set(config.id2label.values())
    right = len(names) == 1 if problem == NUMBER else len(names) >= FEWEST_LABELS[problem]
    if not right or len(names) != config.num_labels or sorted(config.id2label) != list(range(config.num_labels)):
        wanted = {NUMBER: "one", SEVERAL: "one or more"}.get(problem, "two or more")
        hint = "; of one: problem_type regression or multi_label_classification" if problem == SINGLE else ""
        raise ExportError(
            f"{where}: id2label has {len(names)} names for {config.num_labels} outputs, numbered "
            f"{', '.join(map(str, config.id2label))}; accepted: {wanted}, numbered from 0, each name once{hint}"
        )
    if task == "classification" and config.pad_token_id is None:
        raise ExportError(f"{where}: has no pad_token_id; set it to the token that texts were padded with in training")


def _text_pair(task: str, manifest: dict[str, Any] | None) -> str:
    """Return whether the model judges pairs of texts."""
    if task != "classification":
        return "never"
    if manifest is None:
        return "either"
    return "always" if manifest.get("text_pair") else "never"
