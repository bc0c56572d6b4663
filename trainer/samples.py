"""How the model goes on with held-out prompts, greedily, at each evaluation: samples.jsonl, and the terminal."""

import itertools
import json
from collections.abc import Iterator

import torch

from serving import directory
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.guards import writing
from trainer.packing import IGNORED, Example
from trainer.run_folder import parse_metric

_LONGEST_PROMPT = 32  # tokens, of a text that is learned from its start


def write(config: RunConfig, parts: Parts, step: int) -> Iterator[str]:
    """Write what the model says after `step` steps, and yield it, a line each. Only the main rank writes.

    Where no rank can run the model alone, all of them must go through the lines. What a killed run had written at this
    step or later is written again.
    """
    wanted = config.evaluation
    examples = itertools.islice(itertools.chain.from_iterable(parts.feed.held_out), wanted.samples)
    model, tokenizer = parts.world.accelerator.unwrap_model(parts.model), parts.tokenizer
    new = []
    model.eval()
    with torch.no_grad(), parts.world.autocast():
        for ids in map(prompt, examples):
            text = tokenizer.decode(continued(model, ids, wanted.sample_tokens, tokenizer.eos_token_id))
            new.append({"kind": "sample", "step": step, "prompt": tokenizer.decode(ids), "text": text})
            yield f"step {step}: {_brief(new[-1]['prompt'])} -> {text!r}"
    model.train()
    if not parts.world.is_main:
        return
    path = config.run.folder / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [entry for entry in map(parse_metric, lines) if entry and entry["step"] < step]
    with writing(f"{path}: step {step}", config.run.folder):
        directory.write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept + new))


def prompt(example: Example) -> list[int]:
    """Return the tokens before the first that is learned; of a text that is learned from its start, its beginning."""
    learned = int((example.targets != IGNORED).argmax())
    length = learned + 1 if learned else max(1, min(len(example.input_ids) // 2, _LONGEST_PROMPT))
    return example.input_ids[:length].tolist()


def continued(model: torch.nn.Module, ids: list[int], max_tokens: int, end_id: int | None) -> list[int]:
    """Return at most so many tokens that the model puts after `ids`: each time the likeliest, until the end token.

    Without a cache, so that every model that gives logits will do. Stops where the model's context is full.
    """
    context = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_tokens
    found: list[int] = []
    while len(found) < max_tokens and len(ids) + len(found) < context:
        inputs = torch.tensor([ids + found], device=next(model.parameters()).device)
        with torch.compiler.set_stance("force_eager"):  # or a compiled model is compiled again for each length
            found.append(int(model(input_ids=inputs, use_cache=False).logits[0, -1].argmax()))
        if found[-1] == end_id:
            break
    return found


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-57:]}")
