"""The systems that training is measured beside: transformers' Trainer and TRL's SFTTrainer, as they are set up well."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

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
    return _hf_trainer(work, plan, options, start)


def trainer_best(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _hf_trainer(work, plan, options, start, train_sampling_strategy="group_by_length")


def trainer_best_compiled(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _hf_trainer(work, plan, options, start, train_sampling_strategy="group_by_length", torch_compile=True)


def _hf_trainer(work: Path, plan: dict, options: argparse.Namespace, start: Start, **settings) -> dict:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer, model = load(work)
    examples = [{"input_ids": ids} for ids in read_documents(work / "train.jsonl", tokenizer, plan["max_length"])]
    collate, tokens = DataCollatorForLanguageModeling(tokenizer, mlm=False), []

    def counted(features: list[dict]) -> dict:
        start()
        tokens.append(sum(len(feature["input_ids"]) - 1 for feature in features))
        return collate(features)

    arguments = TrainingArguments(
        **_arguments(work, plan, options), per_device_train_batch_size=plan["documents"], **settings
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=counted)
    trainer.train()
    return {"tokens": tokens, "model": model}


def sft_packed(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, packing=True, gradient_checkpointing=True)


def sft_packed_best(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, packing=True, gradient_checkpointing=False)


def sft_padded(work: Path, plan: dict, options: argparse.Namespace, start: Start) -> dict:
    return _sft_trainer(work, plan, options, start, packing=False, gradient_checkpointing=False)


def _sft_trainer(
    work: Path, plan: dict, options: argparse.Namespace, start: Start, *, packing: bool, **settings
) -> dict:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load(work)
    documents = read_documents(work / "train.jsonl", tokenizer, plan["max_length"])
    arguments = SFTConfig(
        **_arguments(work, plan, options),
        packing=packing,
        packing_strategy="bfd",
        # A packed row is cut at the length; a document alone may be one token longer, its end.
        max_length=plan["max_length"] + (not packing),
        per_device_train_batch_size=plan["rows" if packing else "documents"],
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
    return {"tokens": tokens, "model": trainer.model}


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
