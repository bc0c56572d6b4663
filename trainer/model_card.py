"""README.md of a model directory: where the model is from, and a few lines of Python that ask it something."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.config import Classification, RunConfig
from trainer.tokenizers import keeps_pairs_apart

_UNMERGED = [
    "A bottleneck adapter is not linear, so it cannot be merged: `base/` is what the run started from (anything loads",
    "it, without what was learned), `adapter/` is what it learned. Trivet puts them together.",
    "",
]


def text(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: str | None, step: int, metrics: dict[str, float]
) -> str:
    """Return the card, in Markdown. Its Python runs as it is where the working directory is the model directory."""
    shown: dict[str, Any] = {
        "objective": config.objective.type,
        "strategy": config.strategy.type,
        "base model": base or "none (from scratch)",
        "steps": step,
        **{name: f"{value:.4f}" for name, value in metrics.items()},
    }
    facts = [f"- {name}: {value}" for name, value in shown.items()]
    unmerged = _UNMERGED if config.strategy.type == "adapter" else []
    how = ["## How to use it", "", *unmerged, "```python", *_snippet(config, tokenizer), "```"]
    return "\n".join(["---", "library_name: transformers", "---", "", f"# {config.run.name}", "", *facts, "", *how, ""])


def _snippet(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    head, ask = _asked(config, tokenizer)
    folder = 'folder = "."  # the one that this README lies in'
    read = "tokenizer = AutoTokenizer.from_pretrained(folder)"
    if config.strategy.type == "adapter":
        names, own = "AutoTokenizer", ["", "from trainer import model_dir"]
        load = "model = model_dir.load(folder)"
        read = 'tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")'
    else:
        names, own = ", ".join(sorted([head, "AutoTokenizer"])), []
        load = f"model = {head}.from_pretrained(folder).eval()"
    imports = ["import torch", f"from transformers import {names}", *own]
    return [*imports, "", folder, read, load, *ask.format(max_length=config.batch.max_length).strip("\n").split("\n")]


def _asked(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the class of transformers that loads such a model, and the lines that ask it."""
    match config.objective.type:
        case "causal_lm":
            return "AutoModelForCausalLM", _CAUSAL_LM
        case "sft":
            return "AutoModelForCausalLM", _SFT
        case "masked_lm":
            return "AutoModelForMaskedLM", _MASKED_LM
        case "token_classification":
            return "AutoModelForTokenClassification", _TAGS
    assert isinstance(config.objective, Classification)
    asked = _TEXT
    if config.data.columns.text_pair is not None:
        asked = _PAIR if keeps_pairs_apart(tokenizer) else _JOINED_PAIR
    return "AutoModelForSequenceClassification", asked + _ANSWERS[config.objective.problem]


_CAUSAL_LM = """
asked = tokenizer("A text that the model goes on with", return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**asked, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""
_SFT = """
messages = [{{"role": "user", "content": "What is asked?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
asked = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**asked, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_MASKED_LM = """
asked = tokenizer(f"A text with one {{tokenizer.mask_token}} word.", return_tensors="pt")
with torch.no_grad():
    logits = model(**asked).logits[asked["input_ids"] == tokenizer.mask_token_id]
best = logits.softmax(-1)[0].topk(5)
for probability, token in zip(best.values.tolist(), best.indices.tolist()):
    print(f"{{tokenizer.decode([token])}}: {{probability:.3f}}")
"""
# Not is_split_into_words: some tokenizers would run the words together then, or refuse; training joined them too.
_TAGS = """
words = ["The", "words", "of", "a", "sentence", "."]
asked = tokenizer(
    " ".join(words), truncation=True, max_length={max_length}, return_offsets_mapping=True, return_tensors="pt"
)
offsets = asked.pop("offset_mapping")[0].tolist()
with torch.no_grad():
    best = model(**asked).logits[0].argmax(-1).tolist()
start = 0
for word in words:  # the first token that ends within a word answers for it
    tags = [best[i] for i, (begin, end) in enumerate(offsets) if begin < end and start < end <= start + len(word)]
    print(word, model.config.id2label[tags[0]] if tags else None)
    start += len(word) + 1
"""
_TEXT = """
asked = tokenizer("A text to judge.", truncation=True, max_length={max_length}, return_tensors="pt")
"""
_PAIR = """
asked = tokenizer("A text.", "The text beside it.", truncation=True, max_length={max_length}, return_tensors="pt")
"""
_JOINED_PAIR = """
texts = ["A text.", "The text beside it."]  # both together at most {max_length} tokens
first, second = tokenizer(texts, add_special_tokens=False)["input_ids"]
asked = {{"input_ids": torch.tensor([[*first, tokenizer.eos_token_id, *second]])}}
"""
_LOGITS = """with torch.no_grad():
    logits = model(**asked).logits[0]
"""
_ANSWERS = {
    "single_label": _LOGITS
    + """for number, probability in enumerate(logits.softmax(-1).tolist()):
    print(f"{{model.config.id2label[number]}}: {{probability:.3f}}")
""",
    "multi_label": _LOGITS
    + """for number, probability in enumerate(logits.sigmoid().tolist()):  # each label for itself: above 0.5 it is said
    print(f"{{model.config.id2label[number]}}: {{probability:.3f}}")
""",
    "regression": _LOGITS + "print(logits.item())\n",
}
