"""The systems that training is measured beside: transformers' Trainer and TRL's SFTTrainer, as they are set up well."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# Documents, or packed rows, of one pass: several passes make a step. These are the defaults of the peers, and what was
# fastest of 16, 8, 4, 2 and 1 here: large passes cost them up to half of their speed.
DEFAULT_PASS = 8
BEST_PASS = {"fp32": 2, "bf16": 4}
BEST_PACKED_PASS = 1

Documents = list[list[int]]
Start = Callable[[], None]  # starts the clock
System = Callable[[Path, dict, argparse.Namespace, Start], dict]


def load(work: Path) -> tuple[PreTrainedTokenizerBase, torch.nn.Module]:
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    return tokenizer, AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Documents:
    """Token ids of each text and its end: at most `max_length` of them are read, and as many predicted."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [[*ids[:max_length], tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def trainer_default(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _hf_trainer(work, plan, options, start, DEFAULT_PASS)


def trainer_best(work: Path, plan: dict, options: argparse.Namespace, start: Start, **settings) -> dict:
    best = BEST_PASS[options.precision]
    return _hf_trainer(work, plan, options, start, best, train_sampling_strategy="group_by_length", **settings)


def trainer_best_compiled(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return trainer_best(work, plan, options, start, torch_compile=True)


def _hf_trainer(work: Path, plan: dict, options: argparse.Namespace, start: Start, size: int, **settings) -> dict:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer, model = load(work)
    examples = [{"input_ids": ids} for ids in read_documents(work / "train.jsonl", tokenizer, plan["max_length"])]
    collate, tokens = DataCollatorForLanguageModeling(tokenizer, mlm=False), []

    def counted(features: list[dict]) -> dict:
        start()
        tokens.append(sum(len(feature["input_ids"]) - 1 for feature in features))
        return collate(features)

    passes = _passes(plan["documents"], size)
    arguments = TrainingArguments(**_arguments(work, plan, options), **passes, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=counted)
    trainer.train()
    return {"tokens": _by_step(tokens, passes), "model": model}


def sft_packed(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, DEFAULT_PASS, packing=True)


def sft_packed_best(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, BEST_PACKED_PASS, packing=True, gradient_checkpointing=False)


def sft_padded(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, DEFAULT_PASS, packing=False)


def _sft_trainer(
    work: Path, plan: dict, options: argparse.Namespace, start: Start, size: int, *, packing: bool, **settings
) -> dict:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load(work)
    documents = read_documents(work / "train.jsonl", tokenizer, plan["max_length"])
    passes = _passes(plan["rows" if packing else "documents"], size)
    arguments = SFTConfig(
        **_arguments(work, plan, options),
        packing=packing,
        packing_strategy="bfd",
        # A packed row is cut at the length; a document alone may be one token longer, its end.
        max_length=plan["max_length"] + (not packing),
        **passes,
        **settings,
    )
    data, tokens = Dataset.from_dict({"input_ids": documents}), []
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    collate = trainer.data_collator

    def counted(features: list[dict]) -> dict:
        start()
        tokens.append(sum(len(f["input_ids"]) - len(f.get("seq_lengths", [0])) for f in features))
        return collate(features)

    trainer.data_collator = counted
    trainer.train()
    return {"tokens": _by_step(tokens, passes), "model": trainer.model}


def _passes(whole: int, size: int) -> dict[str, int]:
    """The settings of a step of `whole` documents or rows, in passes of `size`."""
    size = min(whole, size)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": whole // size}


def _by_step(tokens: list[int], passes: dict[str, int]) -> list[int]:
    count = passes["gradient_accumulation_steps"]
    return [sum(tokens[i : i + count]) for i in range(0, len(tokens), count)]


def _arguments(work: Path, plan: dict, options: argparse.Namespace) -> dict:
    return {
        "output_dir": str(work / "peer"), "num_train_epochs": 1, "learning_rate": plan["lr"], "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "use_cpu": True,
        "bf16": options.precision == "bf16", "save_strategy": "no", "report_to": [], "logging_steps": 10**6,
        "disable_tqdm": True, "seed": options.seed,
    }  # fmt: skip


PEERS: dict[str, System] = {
    "trainer-default": trainer_default,
    "trainer-best": trainer_best,
    "trainer-best-compiled": trainer_best_compiled,
    "sft-packed": sft_packed,
    "sft-packed-best": sft_packed_best,
    "sft-padded": sft_padded,
}
