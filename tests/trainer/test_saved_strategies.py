"""What each strategy saves gives, in a process of its own, the logits that the model had when it was saved."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from trainer import model_dir, models
from trainer.config import PretrainedModel, RunConfig
from trainer.strategies import STRATEGIES

IDS = torch.arange(2, 22).view(2, 10)
FEW = [("Llama", "CausalLM"), ("Bert", "MaskedLM"), ("GPT2", "SequenceClassification"), ("Bert", "TokenClassification")]
MORE = [
    ("GPT2", "CausalLM"), ("OPT", "CausalLM"), ("GPTNeoX", "CausalLM"), ("Roberta", "MaskedLM"),
    ("DistilBert", "MaskedLM"), ("Llama", "SequenceClassification"), ("Bert", "SequenceClassification"),
    ("Roberta", "SequenceClassification"), ("DistilBert", "SequenceClassification"), ("Llama", "TokenClassification"),
    ("GPT2", "TokenClassification"), ("Qwen2", "CausalLM"), ("Mistral", "TokenClassification"),
]  # fmt: skip
SECTIONS = {
    "full": {"type": "full"},
    "linear_probe": {"type": "linear_probe"},
    "partial": {"type": "partial", "train": ["*.1.*"]},
    "adapter": {"type": "adapter", "size": 4},
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "lora", "rank": 4, "dora": True, "rslora": True},
}
LOAD = """
import json, sys
import torch, transformers
from peft import PeftModel
from safetensors.torch import save_file

found, ids = {}, torch.arange(2, 22).view(2, 10)
for name, head, folder, base, merged in json.load(open(sys.argv[1])):
    load = getattr(transformers, f"AutoModelFor{head}").from_pretrained
    with torch.no_grad():
        if name.endswith(("lora", "dora")):
            torch.manual_seed(5)  # a head that is not in the files is another one
            model = PeftModel.from_pretrained(load(base, dtype=torch.float32), f"{folder}/adapter")
            found[f"{name} unmerged"] = model.eval()(ids).logits
        if merged:
            found[f"{name} by transformers"] = load(folder, dtype=torch.float32).eval()(ids).logits
assert not {"trainer", "serving", "launch"} & {name.partition(".")[0] for name in sys.modules}

from trainer import model_dir

with torch.no_grad():
    for name, head, folder, base, merged in json.load(open(sys.argv[1])):
        found[f"{name} by Trivet"] = model_dir.load(folder)(ids).logits
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def save(tmp_path_factory, tokenizer):
    """Return a function that trains a model with a strategy for three steps, and saves it as a run does."""

    def save(model: torch.nn.Module, strategy: dict, head: str, base: Path | None = None) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("saved")
        if base is None:
            base = folder / "base"
            (model if model.get_output_embeddings() is not None else model.base_model).save_pretrained(base)
        config = RunConfig.model_validate(
            {
                "run": {"name": "run", "steps": 3},
                "objective": {"type": "sft"},
                "model": {"type": "pretrained", "path": str(base)},
                "data": {"type": "files", "train": "rows.jsonl"},
                "strategy": strategy,
            }
        )
        model = STRATEGIES[strategy["type"]](model, config.strategy).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(IDS).logits.flatten(0, -2)
            torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 3).backward()
            optimizer.step()
        with torch.no_grad():
            logits = model.eval()(IDS).logits
        final = folder / "model"
        model_dir.save_model(final, model, tokenizer, config, labels=None, step=3, metrics={"eval_loss": 1.0})
        return SimpleNamespace(folder=final, base=base, logits=logits, head=head)

    return save


@pytest.fixture(scope="module", params=[FEW, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def saved(request, tiny_model, save) -> dict[str, SimpleNamespace]:
    """Every strategy on the heads of the list: by name, with `head`, `folder`, `base` and `logits`."""
    found = {}
    for family, head in request.param:
        for strategy, section in SECTIONS.items():
            found[f"{family} {head} {strategy}"] = save(tiny_model(family, head), section, head)
    return found


@pytest.fixture(scope="module")
def loaded(saved, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The logits of what `saved` saved, in a process of its own, by each way to load it."""
    items = [(name, it.head, str(it.folder), str(it.base), "adapter" not in name) for name, it in saved.items()]
    folder = tmp_path_factory.mktemp("loaded")
    (folder / "list.json").write_text(json.dumps(items))
    command = [sys.executable, "-c", LOAD, str(folder / "list.json"), str(folder / "logits.safetensors")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "logits.safetensors")


@pytest.mark.parametrize("strategy", SECTIONS)
def test_in_a_process_of_its_own_the_logits_are_the_same(saved, loaded, strategy):
    for name, it in saved.items():
        if not name.endswith(strategy):
            continue
        forms = [form for form in loaded if form.startswith(f"{name} ")]
        assert len(forms) == {"adapter": 1, "lora": 3, "dora": 3}.get(strategy, 2)
        for form in forms:
            assert float((loaded[form] - it.logits).abs().max()) <= 1e-6, form
            if strategy not in ("lora", "dora"):
                assert torch.equal(loaded[form], it.logits), form


def test_a_probed_language_model_is_saved_untied_and_its_embedding_is_the_bases(saved):
    probed = [it for name, it in saved.items() if name.endswith("linear_probe") and it.head.endswith("LM")]
    assert probed
    for it in probed:
        assert json.loads((it.folder / "config.json").read_text())["tie_word_embeddings"] is False
        before, after = (load_file(folder / "model.safetensors") for folder in (it.base, it.folder))
        new = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
        assert {name.rpartition(".")[2] for name in new} in ({"weight"}, {"weight", "bias"})
        assert len({name.rpartition(".")[0] for name in new}) == 1  # the output layer


@pytest.mark.parametrize("strategy", ["linear_probe", "adapter", "lora"])
def test_a_pooler_that_the_base_lacks_learns_with_the_head_and_is_saved(
    tiny_model, save, wordpiece, tmp_path, strategy
):
    """Made up anew, it is another one wherever the base is loaded again."""
    base = tmp_path / "base"
    tiny_model("Bert", "MaskedLM").save_pretrained(base)
    section = PretrainedModel(type="pretrained", path=str(base))
    model = models.build_model(section, wordpiece, "AutoModelForSequenceClassification", ["a", "b", "c"])
    before = {name: value.clone() for name, value in model.bert.pooler.state_dict().items()}
    made = save(model, SECTIONS[strategy], "SequenceClassification", base)
    torch.manual_seed(5)
    loaded = model_dir.load(made.folder)
    assert not any(torch.equal(value, before[name]) for name, value in loaded.bert.pooler.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, made.logits, rtol=0, atol=1e-6)
        if strategy == "lora":
            again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
            unmerged = PeftModel.from_pretrained(again, made.folder / "adapter").eval()
            torch.testing.assert_close(unmerged(IDS).logits, made.logits, rtol=0, atol=1e-6)
