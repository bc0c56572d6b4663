"""A sequence classifier as one graph: input_ids and attention_mask [B, T] -> logits [B, L].

The graph is transformers' own forward, traced, its pooling too. An encoder pools its first token; a decoder pools, as
in training, the last token that is not `pad_token_id`: that very token must pad a batch, on the right.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.attention import ExportError
from serving.export.options import Options
from serving.export.reference import TEXTS, check_finite, save_reference, text_cases
from serving.export.source import Source
from serving.export.trace import OPSET, forget_source_lines, quiet

INPUTS = ["input_ids", "attention_mask"]
LONGEST_TEXT = 512  # of the reference, in tokens; less where a row may not be so long
WORD_COUNTS = (1, 2, 5, 12, 40)


class Logits(torch.nn.Module):
    """The model's forward with nothing but logits coming out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, L]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


def write_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path) -> None:
    """Run `model` on whole texts, each alone and unpadded, and write `folder`/reference.safetensors.

    It holds `logits` [N, L], and as metadata the texts with their ids (`cut`), more texts with their ids (`texts`) and
    the names of the `labels`.
    """
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise ExportError(
            f"{source.folder}: its tokenizer has {len(tokenizer)} entries, but the model embeds {entries}; "
            "save the tokenizer that it was trained with"
        )
    length = min(_row_length(model, tokenizer, source), LONGEST_TEXT)
    cases = [case for text in _texts(tokenizer, length) if (case := _case(tokenizer, text, length))["row"]]
    try:
        with torch.no_grad():
            logits = torch.cat([model(**_inputs([case["row"]])).logits for case in cases])
    except (RuntimeError, ValueError, IndexError) as error:
        raise ExportError(
            f"{source.folder}: cannot read rows of up to {length} tokens ({_first_line(error)}); "
            "check max_position_embeddings in its config.json"
        ) from error
    check_finite(logits, source)
    metadata = {"labels": source.labels, "cut": cases, "texts": text_cases(tokenizer)}
    save_reference(
        folder, {"logits": logits.float().numpy()}, {name: json.dumps(value) for name, value in metadata.items()}
    )


def write_graph(model: PreTrainedModel, source: Source, options: Options, path: Path) -> tuple[list[str], list[str]]:
    """Write the model as `path` (weights in `path` + ".data"); return the names of the graph's inputs and outputs.

    Raises ExportError when the model's own code cannot be traced.
    """
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # a text is read once
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                Logits(model),
                kwargs=_inputs([[1, 2, 3], [3, 2, 1]]),
                dynamo=True,
                dynamic_shapes={name: {0: batch, 1: tokens} for name in INPUTS},
                opset_version=OPSET,
                input_names=INPUTS,
                output_names=["logits"],
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"{source.folder}: {source.architecture} cannot be traced into a graph ({_first_line(error)}); "
            "choose another architecture"
        ) from error
    forget_source_lines(program.model)
    program.save(path, external_data=True)
    graph = program.model.graph
    return [each.name for each in graph.inputs], [each.name for each in graph.outputs]


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path
) -> dict[str, Any]:
    """Return what a classifier's server needs to know, for the manifest; nothing is written.

    `max_length` is where texts are cut, `empty_text_ids` what stands for a text without any token.
    """
    return {
        "vocab_size": source.config.vocab_size,
        "context_length": _context_length(model, source),
        "max_length": _row_length(model, tokenizer, source),
        "pad_token_id": source.config.pad_token_id,
        "empty_text_ids": _empty_text_ids(tokenizer),
        "labels": source.labels,
    }


def _context_length(model: PreTrainedModel, source: Source) -> int:
    """Return the most tokens that the model can read."""
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from past the padding's, so their table is longer than their context.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return source.config.max_position_embeddings


def _row_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> int:
    """Return where texts are cut: as in training, where that is known; else where the tokenizer says, if it does."""
    return min(source.trained_length or tokenizer.model_max_length, _context_length(model, source))


def _texts(tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Return texts of ragged lengths: none, a word, sentences, special tokens at both ends, one that is cut."""
    words = " ".join(TEXTS).split()
    specials = tokenizer.all_special_tokens
    ends = [f"{token} The list {token}" for token in specials[:4]]
    starts = [" ".join(words[:count]) for count in WORD_COUNTS]
    return ["", *starts, *TEXTS, *ends, "".join(specials), " ".join(words * (1 + length // len(words)))]


def _case(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> dict[str, Any]:
    """Return a text with its ids, cut as in training, and the row that the model is given for it."""
    ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
    is_cut = len(tokenizer(text, verbose=False)["input_ids"]) > length
    return {"text": text, "max_length": length, "ids": ids, "is_cut": is_cut, "row": ids or _empty_text_ids(tokenizer)}


def _empty_text_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what stands for a text without a token, as in training: the end token, where there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _inputs(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.array(rows, np.int64))
    return dict(zip(INPUTS, (ids, torch.ones_like(ids)), strict=True))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
