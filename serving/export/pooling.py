"""How an encoder's hidden states become one vector, as sentence-transformers writes it beside the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from serving.export.attention import ExportError

_ACCEPTED = "accepted: sentence-transformers' modules.json of a Transformer, a Pooling (mean or cls), maybe a Normalize"


@dataclass(frozen=True)
class Pooling:
    """`mode` cls takes the first token, mean the mean of a text's tokens; `normalize` makes the length 1.

    `max_length`: the most tokens of a text that are read, None where the folder does not say.
    """

    mode: Literal["cls", "mean"]
    normalize: bool
    max_length: int | None

    def __call__(self, hidden_BTD: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        """Return the vectors [B, D] of a batch that is padded on the right."""
        if self.mode == "cls":
            vectors_BD = hidden_BTD[:, 0]
        else:
            mask_BT1 = attention_mask_BT[..., None].to(hidden_BTD.dtype)
            vectors_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
        return torch.nn.functional.normalize(vectors_BD, dim=-1) if self.normalize else vectors_BD


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
    settings = _read_object(folder / "sentence_bert_config.json")
    if settings.get("do_lower_case"):
        raise ExportError(f"{folder}/sentence_bert_config.json: do_lower_case; put it into the tokenizer instead")
    if name := _read_object(folder / "config_sentence_transformers.json").get("default_prompt_name"):
        raise ExportError(f"{folder}/config_sentence_transformers.json: default_prompt_name {name!r}; accepted: none")
    mode = _mode(folders["Pooling"] / "config.json")
    return Pooling(mode, "Normalize" in kinds, settings.get("max_seq_length"))


def _mode(path: Path) -> Literal["cls", "mean"]:
    content = _read_object(path)
    named = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    modes = [named.get(key, key) for key, value in content.items() if key.startswith("pooling_mode_") and value is True]
    modes = modes or [str(content.get("pooling_mode"))]
    if modes == ["cls"]:
        return "cls"
    if modes == ["mean"]:
        return "mean"
    raise ExportError(f"{path}: pools by {' and '.join(modes)}; accepted: cls or mean")


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
