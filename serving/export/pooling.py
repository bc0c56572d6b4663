"""How a model's hidden states become one vector, as sentence-transformers writes it beside the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from serving.export_paths import ExportError

Mode = Literal["cls", "mean", "lasttoken"]

_ACCEPTED = "accepted: sentence-transformers' modules.json of a Transformer, a Pooling, maybe a Normalize"
_MODES: dict[str, Mode] = {"cls": "cls", "mean": "mean", "lasttoken": "lasttoken"}
# Before `pooling_mode` named it, each was a switch.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}
# The first of these is read, whatever the model: sentence_NAME_config.json.
_SETTINGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_CHANGING = ("model_args", "tokenizer_args", "config_args", "model_kwargs", "processor_kwargs", "config_kwargs")


@dataclass(frozen=True)
class Pooling:
    """`mode` cls takes a text's first token, lasttoken its last, mean the mean of all; `normalize` makes the length 1.

    `max_length`: the most tokens of a text that are read, None where the folder does not say.
    """

    mode: Mode
    normalize: bool
    max_length: int | None

    def __call__(self, hidden_BTD: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        """Return the vectors [B, D] of a batch that is padded on the right."""
        if self.mode == "cls":
            vectors_BD = hidden_BTD[:, 0]
        elif self.mode == "lasttoken":
            last_B11 = attention_mask_BT.sum(1)[:, None, None] - 1
            vectors_BD = hidden_BTD.gather(1, last_B11.expand(-1, -1, hidden_BTD.shape[-1]))[:, 0]
        else:
            mask_BT1 = attention_mask_BT[..., None].to(hidden_BTD.dtype)
            vectors_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return torch.nn.functional.normalize(vectors_BD, dim=-1) if self.normalize else vectors_BD


def is_pooled(folder: Path) -> bool:
    """Whether sentence-transformers would pool what the model in `folder` computes, whatever head lies beside it."""
    modules = _read(folder / "modules.json") if (folder / "modules.json").is_file() else []
    kinds = [str(each.get("type")) for each in modules if isinstance(each, dict)] if isinstance(modules, list) else []
    return any(kind.rpartition(".")[2] == "Pooling" for kind in kinds)


def read_pooling(folder: Path) -> Pooling:
    """Return what the files of sentence-transformers in `folder` say. Raises ExportError for any other model."""
    if not (folder / "modules.json").is_file():
        raise ExportError(f"{folder}: a model without a head, and no modules.json says how to pool it; {_ACCEPTED}")
    modules = _read(folder / "modules.json")
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        folders = {kind: folder / module["path"] for kind, module in zip(kinds, modules, strict=True)}
    except (TypeError, KeyError, AttributeError):
        raise ExportError(f"{folder}/modules.json: is no list of modules; {_ACCEPTED}") from None
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ExportError(f"{folder}/modules.json: {', '.join(kinds)} found; {_ACCEPTED}")
    if folders["Transformer"] != folder:
        raise ExportError(f"{folder}/modules.json: its Transformer is in {folders['Transformer']}; {_ACCEPTED}")
    settings = _settings(folder)
    if name := _read_object(folder / "config_sentence_transformers.json").get("default_prompt_name"):
        raise ExportError(f"{folder}/config_sentence_transformers.json: default_prompt_name {name!r}; accepted: none")
    if not (folders["Pooling"] / "config.json").is_file():
        raise ExportError(
            f"{folders['Pooling']}/config.json: missing, though modules.json names it; get the model again"
        )
    mode = _mode(folders["Pooling"] / "config.json")
    return Pooling(mode, "Normalize" in kinds, settings.get("max_seq_length"))


def _settings(folder: Path) -> dict[str, Any]:
    """Return what sentence-transformers reads texts with. Raises ExportError for what is not read here."""
    path = next((path for name in _SETTINGS if (path := folder / f"sentence_{name}_config.json").is_file()), None)
    settings = _read_object(path) if path else {}
    if settings.get("do_lower_case"):
        raise ExportError(f"{path}: do_lower_case; put it into the tokenizer instead")
    if changed := next((name for name in _CHANGING if settings.get(name)), None):
        raise ExportError(f"{path}: {changed} {settings[changed]!r}; save the model and its tokenizer as they are then")
    longest = settings.get("max_seq_length")
    if longest is not None and not (isinstance(longest, int) and longest > 0):
        raise ExportError(f"{path}: max_seq_length {longest!r}; accepted: a number of tokens")
    return settings


def _mode(path: Path) -> Mode:
    content = _read_object(path)
    modes = [
        _SWITCHES.get(name, name) for name, on in content.items() if name.startswith("pooling_mode_") and on is True
    ]
    modes = modes or [str(content.get("pooling_mode"))]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    raise ExportError(f"{path}: pools by {' and '.join(modes)}; accepted: {', '.join(_MODES)}")


def _read_object(path: Path) -> dict[str, Any]:
    content = _read(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ExportError(f"{path}: is no JSON object; get the model again")
    return content


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}); get the model again") from None
