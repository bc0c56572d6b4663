"""Models over whole texts as one graph: rows of tokens in, logits or vectors out. heads.py has what differs by task.

Inputs: input_ids and attention_mask [B, T]; token_type_ids [B, T], where the tokenizer tells two texts apart by them
and the model reads them; keep [K], which of the B x T places get logits, of a masked model. Outputs: logits [B, L] of
texts, [B, T, L] of tokens, [K, vocabulary] of places, or embeddings [B, D].

The graph is transformers' own forward, traced, its pooling too. A decoder that classifies pools, as in training, the
last token that is not `pad_token_id`: that very token must pad a batch, on the right.
"""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.experts import interleave, use_operator
from serving.export.fuse import fuse
from serving.export.heads import HEADS, Inputs
from serving.export.pooling import Pooling
from serving.export.questions import questions
from serving.export.reference import TEXTS, check_finite, save_reference, text_cases
from serving.export.source import Source
from serving.export.trace import Example, graph_of, quiet
from serving.export.whole_attention import fused_attention, num_fused
from serving.export_options import Options
from serving.export_paths import ExportError
from serving.reference_file import FACTS


class Rows(torch.nn.Module):
    """The model's forward with nothing but its answer coming out."""

    def __init__(self, model: PreTrainedModel, task: str, pooling: Pooling | None) -> None:
        super().__init__()
        self.model, self.task, self.pooling = model, task, pooling

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what the task's head says; see the top of the file."""
        asked = {"input_ids": input_ids, "attention_mask": attention_mask}
        asked |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        asked |= {} if keep is None else {"keep": keep}
        return HEADS[self.task].graph(self.model, asked, self.pooling).float()


def write_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, facts: dict[str, Any], folder: Path
) -> None:
    """Run `model` on whole texts, each alone and unpadded, and write `folder`/reference.safetensors.

    It holds `outputs` [R, L], what the model says of all rows, one after the other, and as metadata `questions` (texts
    with their rows and with what is to be answered), `texts` (more texts with their ids), `labels`, and `facts`, what
    trivet.json says of the model.
    """
    settings = facts | {"token_types": "token_type_ids" in input_names(model, tokenizer, source)}
    answers, outputs = [], []
    try:
        for question in questions(tokenizer, source, settings):
            found = [_ask(model, source, row) for row in question.rows]
            outputs += found
            answers.append(question.answered(found, tokenizer, source))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ExportError(
            f"{source.folder}: cannot read rows of up to {settings['max_length']} tokens ({_first_line(error)}); "
            "check max_position_embeddings in its config.json"
        ) from error
    whole = torch.cat(outputs)
    check_finite(whole, source)
    metadata = {FACTS: facts, "labels": facts["labels"], "questions": answers, "texts": text_cases(tokenizer)}
    save_reference(folder, {"outputs": whole.float().numpy()}, metadata)


def write_graph(model: PreTrainedModel, source: Source, options: Options, path: Path) -> tuple[list[str], list[str]]:
    """Write the model as `path` (weights in `path` + ".data"); return the names of the graph's inputs and outputs.

    Raises ExportError when the model's own code cannot be traced.
    """
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # a text is read once
    use_operator(model)
    graph = _traced(Rows(model, source.task, source.pooling), source, options)
    interleave(graph)
    fuse(graph, source.config.max_position_embeddings, target=options.optimize_for)
    ir.save(graph, path, external_data=f"{path.name}.data")
    return [each.name or "" for each in graph.graph.inputs], [each.name or "" for each in graph.graph.outputs]


def _traced(rows: Rows, source: Source, options: Options) -> ir.Model:
    """Return the graph with its weights; the model's attention implementation is changed.

    Each layer's attention is one operator, but for a model that keeps its attention to itself or asks more of it, and
    in half precision, for which the CPU has no such operator.
    """
    own, num_layers = rows.model.config._attn_implementation, source.config.num_hidden_layers
    example = _example(rows, source)
    with contextlib.suppress(Exception):  # whatever stops the short cut: its own attention does it, or says why not
        with quiet():
            rows.model.set_attn_implementation(fused_attention() if options.dtype == "fp32" else own)
        graph = graph_of(rows, num_layers, lambda layers: example)
        if options.dtype != "fp32" or num_fused(graph) == num_layers:
            return graph
    rows.model.set_attn_implementation(own)
    return graph_of(rows, num_layers, lambda layers: example)


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path
) -> dict[str, Any]:
    """Return what a server of texts needs to know, for the manifest; nothing is written.

    `max_length` is where texts are cut, `empty_text_ids` what stands for a text without any token, `pair_separator_id`
    what stands between two texts where the tokenizer puts nothing there.
    """
    pad, end = source.config.pad_token_id, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    if pad is None:
        raise ExportError(f"{source.folder}: neither its config.json nor its tokenizer names a pad token; name one")
    settings = {
        "vocab_size": source.config.vocab_size,
        "context_length": _context_length(model, source),
        "max_length": _row_length(model, tokenizer, source),
        "pad_token_id": pad,
        "empty_text_ids": [] if end is None else [end],
    }
    if source.task == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise ExportError(
                f"{source.folder}: its tokenizer has no mask token; save the one that it was trained with"
            )
        settings |= {"mask_token": tokenizer.mask_token, "mask_token_id": tokenizer.mask_token_id}
    if source.task in ("classification", "token_classification"):
        settings["labels"] = source.labels
    if source.task == "classification":
        settings |= {"problem_type": source.problem, **_pair_settings(tokenizer, source)}
    if source.pooling is not None:
        settings |= {"pooling": source.pooling.mode, "normalize": source.pooling.normalize}
    return settings


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> list[str]:
    """Return the names of the graph's inputs. Token types are among them only where texts come in pairs.

    Raises ExportError for a tokenizer that gives a text alone others than 0, where the graph would not be given them.
    """
    found = _pair_settings(tokenizer, source)
    pairs = found["text_pair"] != "never" and found["pair_separator_id"] is None
    made, taken = tokenizer.model_input_names, inspect.signature(model.forward).parameters
    read = "token_type_ids" in made and "token_type_ids" in taken
    types = pairs and read
    if read and not types and any(tokenizer(TEXTS[0])["token_type_ids"]):
        raise ExportError(
            f"{source.folder}: its tokenizer gives a text alone other token types than 0, which are served for pairs "
            "only; accepted: 0 for a text alone"
        )
    asked = (types, "token_type_ids"), (source.task == "masked_lm", "keep")
    return ["input_ids", "attention_mask", *(name for is_asked, name in asked if is_asked)]


def _pair_settings(tokenizer: PreTrainedTokenizerBase, source: Source) -> dict[str, Any]:
    apart = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
    text_pair = "never" if source.text_pair == "either" and not apart else source.text_pair
    if text_pair == "always" and not apart and tokenizer.eos_token_id is None:
        raise ExportError(f"{source.folder}: its tokenizer has nothing to put between two texts; give it an end token")
    return {"text_pair": text_pair, "pair_separator_id": None if apart else tokenizer.eos_token_id}


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


def _ask(model: PreTrainedModel, source: Source, row: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return HEADS[source.task].source(model, row, source.pooling)


def _example(rows: Rows, source: Source) -> Example:
    """Return what the model is traced with; no size is 1, which the tracer would take for a constant."""
    names = input_names(rows.model, source.load_tokenizer(), source)
    sizes = {name: torch.export.Dim(name) for name in ("batch", "tokens", "kept")}
    shapes = {name: {0: sizes["kept"]} if name == "keep" else {0: sizes["batch"], 1: sizes["tokens"]} for name in names}
    ids = torch.tensor([[1, 2, 3, 2], [3, 2, 1, 2]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["keep"] = torch.tensor([1, 5, 6])
    outputs = ["embeddings" if source.task == "embedding" else "logits"]
    return Example({name: inputs[name] for name in names}, shapes, names, outputs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
