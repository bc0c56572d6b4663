"""The model that a new config starts from, and what is known about it before anything heavy is loaded."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import config_file, pretrained, shipped
from launch.init.token_counter import TokenCounter, estimate, tokenizer_counter
from serving.directory import BadInput
from trainer.config import NewModel, RunConfig, TrainedTokenizer

EXAMPLE = "pretrain_tiny.yaml"  # makes the base model where there is no other

# (letters of ASCII to a token, tokens to a byte of other scripts), measured: English, and Chinese, Thai and Russian
_LARGE = (4.0, 0.65)  # in a vocabulary of 30,000 and more
_TINY = (2.4, 1.0)  # in the 2,048 entries of the example's tokenizer, which saw English and code

# How the classes of models end that do not continue a text, and so can be trained for labels only.
_NOT_CAUSAL = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForPreTraining",
    "ForConditionalGeneration",
)


@dataclass(frozen=True)
class Base:
    """A base model: how a config names it, its size, and how texts become its tokens."""

    path: str
    made_by: Path | None  # the run config that makes it
    copied_from: Path | None  # where `made_by` must be copied from first, if it must
    is_there: bool
    num_parameters: int | None
    context_length: int | None
    counter: TokenCounter
    what: str  # a phrase for the user


def choose(wanted: str | None, folder: Path) -> Base:
    """Return the base model of a config in `folder`: what is asked for, else a fetched SmolLM2, else the example's.

    Raises BadInput for a folder without a model or a hub name that cannot be reached.
    """
    if wanted is not None:
        return _pretrained(wanted, wanted)
    cached = pretrained.cached_model()
    return _pretrained(str(cached), cached.name) if cached else _example(folder)


def check_kind(base: Base, objective: str) -> None:
    """Raise BadInput if the base model is here and does not continue texts, which all but classification needs."""
    file = _file(base.path, "config.json")
    if objective == "classification" or file is None:
        return
    config = _read_json(file)
    kinds = [name for name in config.get("architectures") or [] if name.endswith(_NOT_CAUSAL)]
    kind = kinds[0] if kinds else "an encoder-decoder model" if config.get("is_encoder_decoder") else None
    if kind:
        raise BadInput(
            f"--base: {base.path} is {kind}, and {objective} needs a model that continues texts (a ...ForCausalLM, "
            f"such as a chat model); name another, or learn labels: --label COLUMN"
        )


def check_chat_template(base: Base) -> None:
    """Raise BadInput if the base model's tokenizer is here and has no chat template, which sft needs."""
    files = [_file(base.path, name) for name in ("chat_template.jinja", "tokenizer_config.json")]
    if base.made_by is not None or files[0] is not None or files[1] is None:
        return
    if not _read_json(files[1]).get("chat_template"):
        raise BadInput(
            f"--base: {base.path} has no chat template, which sft needs; use a chat model, or --objective causal_lm"
        )


def shown_path(path: Path) -> str:
    """Return the path as a config names it: relative to where the user stands if it lies below, else absolute."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def _pretrained(path: str, what: str) -> Base:
    if Path(path).is_dir():
        path = shown_path(Path(path))
        if not (Path(path) / "config.json").is_file():
            raise BadInput(f"--base: {path} holds no config.json; name a model folder or a hub name")
    else:
        from trainer import hub

        hub.check_reachable(path, "--base")
    config = _file(path, "config.json")
    settings = _read_json(config) if config else {}
    return Base(
        path,
        made_by=None,
        copied_from=None,
        is_there=config is not None,
        num_parameters=_count_parameters(Path(path)),
        context_length=settings.get("max_position_embeddings"),
        counter=_counter(path, *_LARGE),
        what=what,
    )


def _example(folder: Path) -> Base:
    """The small model that an example config makes from scratch in a minute."""
    beside = next((path for path in (folder / EXAMPLE, Path("configs") / EXAMPLE) if path.is_file()), None)
    source = shipped.example_configs() / EXAMPLE
    config = config_file.load(beside or source, [], RunConfig)
    path = config.run.folder / "model"
    model, tokenizer = config.model, config.tokenizer
    assert isinstance(model, NewModel), f"{EXAMPLE} trains from scratch"
    assert isinstance(tokenizer, TrainedTokenizer), f"{EXAMPLE} trains its tokenizer"
    return Base(
        str(path),
        made_by=beside or folder / EXAMPLE,
        copied_from=None if beside else source,
        is_there=path.is_dir(),
        num_parameters=_size_of(model, tokenizer),
        context_length=model.context_length,
        counter=_counter(str(path), *_TINY),
        what=f"the small model of {beside or folder / EXAMPLE}" + ("" if path.is_dir() else ", trained first"),
    )


def _size_of(model: NewModel, tokenizer: TrainedTokenizer) -> int:
    attention = 2 * model.hidden_size**2 * (1 + model.num_kv_heads / model.num_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    return int(tokenizer.vocab_size * model.hidden_size + model.num_layers * layer)


def _count_parameters(folder: Path) -> int | None:
    """The weights in the safetensors files of a folder, by their headers; None where there are none here."""
    total = 0
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(map(math.prod, shapes))
    return total or None


def _counter(path: str, ascii_per_token: float, tokens_per_other_byte: float) -> TokenCounter:
    file = _file(path, "tokenizer.json")
    if file is None:
        return estimate(ascii_per_token, tokens_per_other_byte)
    return tokenizer_counter(path, file, _file(path, "chat_template.jinja"), _file(path, "tokenizer_config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a model folder. Raises BadInput."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--base: {path} cannot be read ({error}); get the whole model again") from None
    if not isinstance(found, dict):
        raise BadInput(f"--base: {path} holds no object; get the whole model again")
    return found


def _file(path: str, name: str) -> Path | None:
    """A file of a model folder, or of a hub name in the cache."""
    if Path(path).is_dir():
        return file if (file := Path(path) / name).is_file() else None
    if not path or Path(path).is_absolute():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name)
    except HFValidationError:  # a folder that is not there yet, such as runs/x/model
        return None
    return Path(found) if isinstance(found, str) else None
