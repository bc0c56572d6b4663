"""Which weights learn, and that nothing else moves: every strategy on every head, and on a plain torch module."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from serving.directory import BadInput
from trainer import build
from trainer.config import Adapter, Full, LinearProbe, Lora, Partial
from trainer.strategies import STRATEGIES, check_world, count_parameters, unfreeze

HEADS = [
    ("Llama", "CausalLM"), ("Llama", "SequenceClassification"), ("Llama", "TokenClassification"),
    ("GPT2", "CausalLM"), ("GPT2", "SequenceClassification"), ("GPT2", "TokenClassification"),
    ("Bert", "MaskedLM"), ("Bert", "SequenceClassification"), ("Bert", "TokenClassification"),
]  # fmt: skip
HEAD_OF = {
    ("Llama", "CausalLM"): {"lm_head.weight"},
    ("Llama", "SequenceClassification"): {"score.weight"},
    ("Llama", "TokenClassification"): {"score.weight", "score.bias"},
    ("GPT2", "CausalLM"): {"lm_head.weight"},
    ("GPT2", "SequenceClassification"): {"score.weight"},
    ("GPT2", "TokenClassification"): {"classifier.weight", "classifier.bias"},
    ("Bert", "MaskedLM"): {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
    ("Bert", "SequenceClassification"): {"classifier.weight", "classifier.bias"},
    ("Bert", "TokenClassification"): {"classifier.weight", "classifier.bias"},
}
EMBEDDINGS = {"Llama": "model.embed_tokens", "GPT2": "transformer.w?e", "Bert": "bert.embeddings"}
BLOCK = {"Llama": "model.layers.1", "GPT2": "transformer.h.1", "Bert": "bert.encoder.layer.1"}


def sections(family: str) -> dict:
    return {
        "full": Full(type="full"),
        "linear_probe": LinearProbe(type="linear_probe"),
        "partial": Partial(type="partial", train=[f"{BLOCK[family]}.*"]),
        "staged": Partial(type="partial", train=[BLOCK[family]], stages=[{"step": 2, "train": [EMBEDDINGS[family]]}]),
        "adapter": Adapter(type="adapter", size=4),
        "lora": Lora(type="lora", rank=2),
        "dora": Lora(type="lora", rank=2, dora=True, rslora=True, dropout=0.1),
    }


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, weights and buffers, under each of its names."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def plain_loop(model: torch.nn.Module, steps: int, loss_of, lr: float = 1e-2) -> list[float]:
    """Train as anybody would, telling the model before each step which one it is; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        unfreeze(model, step)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of_head(head: str):
    ids = torch.randint(2, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = {"SequenceClassification": ids[:, 0] % 3, "TokenClassification": ids % 3}.get(head, ids)
    return lambda model: model(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("strategy", ["full", "linear_probe", "partial", "staged", "adapter", "lora", "dora"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_just_the_weights_that_are_said_to_learn_change(tiny_model, family, head, strategy):
    section = sections(family)[strategy]
    base = tiny_model(family, head)
    untouched = copied(base)
    model = STRATEGIES[section.type](base, section)
    learning = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    before = copied(model)
    plain_loop(model, 4, loss_of_head(head))
    after = copied(model)
    assert changed(before, after) == learning
    unique = {p.data_ptr(): p.numel() for name, p in model.named_parameters() if name in learning}
    assert count_parameters(model)[0] == sum(unique.values()) > 0
    # What is frozen is the base's, bit for bit, whatever it is called inside a LoRA.
    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): after[name] for name in after}
    plain = {name.replace(".original_module", ""): tensor for name, tensor in plain.items()}
    moved = {name for name in untouched.keys() & plain.keys() if not torch.equal(untouched[name], plain[name])}
    assert untouched.keys() <= plain.keys()
    if strategy in ("lora", "dora"):
        assert moved == set()
        assert all(".lora_" in name or ".modules_to_save." in name for name in learning)
    elif strategy == "linear_probe":
        assert moved == learning == HEAD_OF[family, head]
    elif strategy == "adapter":
        assert moved == (set() if head.endswith("LM") else HEAD_OF[family, head])
        assert learning - moved == {name for name in after if ".adapter." in name}
        assert len(learning - moved) == 2 * 2 * 4  # blocks, places, tensors of a bottleneck
    elif strategy == "full":
        assert moved == dict(tiny_model(family, head).named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize("strategy", ["linear_probe", "partial", "adapter", "lora", "dora"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_at_step_0_the_logits_are_the_bases_bit_for_bit(tiny_model, family, head, strategy):
    base, ids = tiny_model(family, head).eval(), torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = base(ids).logits
        model = STRATEGIES[sections(family)[strategy].type](copy.deepcopy(base), sections(family)[strategy]).eval()
        assert torch.equal(model(ids).logits, expected)


def test_full_trains_every_weight_of_a_run(make_config, parts_of, base_model):
    before = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).state_dict()
    trained = parts_of(make_config("sft", "full")).model.state_dict()
    assert [name for name, value in before.items() if torch.equal(value, trained[name])] == []


def test_shared_weights_are_counted_once(tiny_model):
    model = tiny_model("Llama", "CausalLM")
    learning, total = count_parameters(STRATEGIES["full"](model, Full(type="full")))
    assert learning == total == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert total < sum(value.numel() for value in model.state_dict().values())  # which lists the shared one twice


def test_a_frozen_model_is_thawed_by_full(base_model):
    model = AutoModelForSequenceClassification.from_pretrained(base_model).requires_grad_(False)
    assert all(p.requires_grad for p in STRATEGIES["full"](model, Full(type="full")).parameters())


@pytest.mark.parametrize(
    ("strategy", "learning"),
    [
        ({"type": "full"}, 9952),  # 300 * 32 of the shared embedding, two blocks, the last norm
        ({"type": "adapter", "size": 4}, 2 * 2 * (2 * 32 * 4 + 4 + 32)),
        ({"type": "lora", "rank": 2}, 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))),
        ({"type": "linear_probe"}, 300 * 32),
        ({"type": "partial", "train": ["model.norm"]}, 32),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_a_run_says_how_many_weights_learn(make_config, capfd, strategy, learning):
    config = make_config("sft", strategy["type"], strategy=strategy)
    parts = build.build(config)
    if strategy["type"] == "full":
        learning = sum(p.numel() for p in parts.model.parameters())
    total = sum(p.numel() for p in parts.model.parameters())
    assert f"{strategy['type']}: {learning:,} of {total:,} weights learn; " in capfd.readouterr().err


def test_stages_in_more_than_one_process_are_refused():
    staged = Partial(type="partial", stages=[{"step": 2, "train": ["a"]}])
    with pytest.raises(BadInput, match=r"strategy\.stages: 1 found in mode ddp; stages need a single process"):
        check_world(staged, "ddp")
    check_world(staged, "single")
    check_world(Partial(type="partial", train=["a"]), "ddp")


# --- a plain torch module --------------------------------------------------------------------------------------------


class SmallCNN(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.conv2, self.norm2 = torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.BatchNorm2d(12)
        self.fc, self.out = torch.nn.Linear(12 * 16, 24), torch.nn.Linear(24, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm1(self.conv1(images)))
        hidden = torch.nn.functional.max_pool2d(torch.relu(self.norm2(self.conv2(hidden))), 2)
        return self.out(torch.relu(self.fc(hidden.flatten(1))))


CNN = {
    "full": (Full(type="full"), None),
    "linear_probe": (LinearProbe(type="linear_probe"), {"out"}),
    "partial": (Partial(type="partial", train=["conv2", "norm2"]), {"conv2", "norm2", "out"}),
    "staged": (
        Partial(type="partial", train=["fc.*"], stages=[{"step": 5, "train": ["conv2", "norm2"]}]),
        {"conv2", "norm2", "fc", "out"},
    ),
    "adapter": (
        Adapter(type="adapter", size=4, after=["conv*", "fc"]),
        {"conv1.adapter", "conv2.adapter", "fc.adapter", "out"},
    ),
    "lora": (Lora(type="lora", rank=4, targets=["conv1", "conv2", "fc"]), {"lora_A", "lora_B", "out"}),
    "dora": (
        Lora(type="lora", rank=4, targets="conv2|fc", dora=True),
        {"lora_A", "lora_B", "lora_magnitude_vector", "out"},
    ),
}


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:200] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:200])


@pytest.mark.parametrize("strategy", CNN)
def test_a_plain_cnn_learns_digits_and_only_what_should_changes(digits, strategy):
    section, parts = CNN[strategy]
    images, labels = digits
    torch.manual_seed(0)
    base = SmallCNN()
    with torch.no_grad():  # running statistics that are no longer the first ones
        base.train()(images)
        expected = base.eval()(images)
    model = STRATEGIES[section.type](copy.deepcopy(base), section)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), expected)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    before = copied(model)
    losses = plain_loop(model, 50, lambda model: torch.nn.functional.cross_entropy(model(images), labels), lr=3e-2)
    assert losses[-1] < losses[0] - 0.1
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    of_learning_norms = {
        f"{norm}.{buffer}"
        for norm in norms
        if f"{norm}.weight" in learning
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert changed(before, copied(model)) == learning | of_learning_norms
    assert len(of_learning_norms) == {"full": 6, "partial": 3, "staged": 3}.get(strategy, 0)
    if parts is not None:
        assert all(any(f".{part}." in f".{name}" for part in parts) for name in learning)
        assert all(any(f".{part}." in f".{name}" for name in learning) for part in parts)


def test_a_norm_that_joins_later_keeps_its_statistics_until_then(digits):
    section = Partial(type="partial", train=["fc"], stages=[{"step": 3, "train": ["norm2"]}])
    images, labels = digits
    model = STRATEGIES["partial"](SmallCNN(), section)
    seen = []

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        seen.append(int(model.norm2.num_batches_tracked))
        return torch.nn.functional.cross_entropy(model(images), labels)

    plain_loop(model, 5, loss_of)
    assert seen == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("section", [Lora(type="lora"), Adapter(type="adapter", after=["*linear1", "*linear2"])])
def test_torchs_own_transformer_is_changed_in_evaluation_too(section):
    """Its fast path for evaluation reads weights past whatever wraps or follows a layer."""
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = STRATEGIES[section.type](torch.nn.Sequential(block, torch.nn.Linear(8, 3)), section)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "out_proj" in name]  # never called
    inputs = torch.randn(2, 5, 8)
    plain_loop(model, 3, lambda model: model(inputs).square().mean(), lr=0.1)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs), model.train()(inputs))
