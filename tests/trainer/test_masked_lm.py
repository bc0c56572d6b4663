"""Masked language modelling: which tokens are masked is said by the row's draw and by nothing else."""

import itertools

import numpy as np
import pytest
import torch

from serving.directory import BadInput
from trainer.config import FileData, MaskedLM
from trainer.objectives import OBJECTIVES
from trainer.packing import IGNORED, pack
from trainer.sources import DataError

COLUMNS = FileData(type="files", train="data.jsonl")
TEXTS = ["the quick brown fox", "returns a list of lines in every file that it has read before and after lunch", "a"]


@pytest.fixture
def make(wordpiece):
    """Return a function that makes the objective, ready to mask."""

    def build(probability: float = 0.15):
        section = MaskedLM(type="masked_lm", mask_probability=probability)
        objective = OBJECTIVES["masked_lm"](section, COLUMNS, [])
        objective.use(wordpiece)
        return objective

    return build


def rows_of(objective, wordpiece, texts: list[str], max_length: int = 32):
    return pack(objective.encode([{"text": text} for text in texts], wordpiece, max_length), max_length)


def originals(rows) -> np.ndarray:
    return np.concatenate([example.input_ids for row in rows for example in row])


def test_examples_are_whole_texts_between_their_special_tokens_and_a_long_one_goes_on(make, wordpiece):
    examples = make().encode([{"text": text} for text in TEXTS], wordpiece, 8)
    cls, sep = wordpiece.cls_token_id, wordpiece.sep_token_id
    assert all(ids[0] == cls and ids[-1] == sep and len(ids) <= 8 for ids in (e.input_ids for e in examples))
    tokens = [token for example in examples for token in example.input_ids[1:-1].tolist()]
    assert tokens == [token for text in TEXTS for token in wordpiece(text, add_special_tokens=False)["input_ids"]]
    for example in examples:
        assert example.targets[[0, -1]].tolist() == [IGNORED, IGNORED]
        assert np.array_equal(example.targets[1:-1], example.input_ids[1:-1])


def test_a_text_without_a_token_to_mask_is_left_out_and_counted(make, wordpiece):
    examples = make().encode([{"text": ""}, {"text": "a fox"}, {"text": "[SEP]"}, {"text": "?!"}], wordpiece, 16)
    assert len(examples) == 1
    assert examples.left_out == 3  # of the last one all is unknown


def test_special_tokens_are_never_masked_and_every_example_has_a_mask(make, wordpiece):
    objective = make(0.01)
    rows = rows_of(objective, wordpiece, [*TEXTS, "fox [SEP] list ? [UNK]"] * 5)
    special = np.isin(originals(rows), wordpiece.all_special_ids)
    for draw in range(50):
        batch = objective.collate(rows, 0, [draw + i for i in range(len(rows))])
        masked = (batch["targets"] != IGNORED)[0].numpy()
        assert not (masked & special).any()
        ends = batch["attention_mask"].flatten().tolist()
        assert all(masked[start:stop].any() for start, stop in itertools.pairwise(ends))


def test_of_the_masked_tokens_80_percent_are_hidden_10_replaced_and_10_left(make, wordpiece):
    objective = make()
    rows = rows_of(objective, wordpiece, [" ".join(TEXTS) for _ in range(60)])
    batches = [objective.collate(rows, 0, list(range(start, start + len(rows)))) for start in range(0, 12_000, 200)]
    ids, targets = (torch.cat([batch[name] for batch in batches], 1)[0] for name in ("input_ids", "targets"))
    masked, maskable = targets != IGNORED, np.isin(originals(rows), wordpiece.all_special_ids, invert=True)
    many = int(masked.sum())
    assert many > 10_000
    assert many / (maskable.sum() * len(batches)) == pytest.approx(0.15, abs=0.005)
    hidden, left = masked & (ids == wordpiece.mask_token_id), masked & (ids == targets)
    replaced = masked & ~hidden & ~left
    assert hidden.sum() / many == pytest.approx(0.8, abs=0.02)
    assert left.sum() / many == pytest.approx(0.1, abs=0.02)
    assert not set(ids[replaced].tolist()) & set(wordpiece.all_special_ids)
    assert len(set(ids[replaced].tolist())) > 60, "a replacement may be any other entry"
    repeated = torch.from_numpy(np.tile(originals(rows), len(batches)))
    assert torch.equal(ids[~masked], repeated[~masked]), "what is not predicted stays as it is"
    assert torch.equal(targets[masked], repeated[masked])


def test_the_masks_of_a_row_are_the_same_alone_in_any_batch_and_padded(make, wordpiece):
    """What breaks exact resume elsewhere: masks drawn from a generator that other rows, ranks or epochs moved on."""
    objective = make()
    rows = rows_of(objective, wordpiece, TEXTS * 8)
    draws = [2**62 + 7 * row for row in range(len(rows))]
    assert len(rows) > 2
    together = objective.collate(rows, 0, draws)
    np.random.seed(1)
    torch.manual_seed(1)
    alone = [objective.collate([row], 0, [draw]) for row, draw in zip(rows, draws, strict=True)]
    turned = objective.collate(rows[::-1], 0, draws[::-1])
    for name in ("input_ids", "targets"):
        assert torch.equal(together[name], torch.cat([batch[name] for batch in alone], 1))
        assert torch.equal(turned[name], torch.cat([batch[name] for batch in alone[::-1]], 1))
    objective.token_model = type(objective.token_model)(first_position=None)
    padded = objective.collate(rows, 0, draws)
    real = padded["attention_mask"].bool()
    assert torch.equal(padded["input_ids"][real], together["input_ids"][0])
    assert torch.equal(padded["targets"][real], together["targets"][0])


def test_another_draw_gives_other_masks(make, wordpiece):
    objective = make()
    [row] = rows_of(objective, wordpiece, TEXTS[:2])
    masks = {tuple(objective.collate([row], 0, [draw])["targets"][0].tolist()) for draw in range(20)}
    assert len(masks) > 15


def test_the_count_is_that_of_the_masks_without_making_them(make, wordpiece):
    objective = make()
    rows = rows_of(objective, wordpiece, TEXTS * 10)
    for draw in range(30):
        for row in rows:
            assert objective.count(row, draw) == (objective.collate([row], 0, [draw])["targets"] != IGNORED).sum()


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_is_the_mean_that_transformers_computes_on_each_text_alone(
    make, wordpiece, tiny_model, family, packed
):
    model, objective = tiny_model(family, "MaskedLM").eval(), make()
    if packed:
        assert not objective.try_out(model, 32), "the model can be packed, and its head held back"
        assert objective.packs
    else:
        objective.token_model = type(objective.token_model)(first_position=None)
    examples = objective.encode([{"text": text} for text in TEXTS], wordpiece, 32)
    batch = objective.collate([[example] for example in examples], 0, [3, 4, 5])
    expected, count, right = 0.0, 0, 0
    for example, draw in zip(examples, [3, 4, 5], strict=True):
        one = objective.collate([[example]], 0, [draw])
        with torch.no_grad():
            output = model(input_ids=one["input_ids"], labels=one["targets"])
        masked = one["targets"] != IGNORED
        count += int(masked.sum())
        expected += output.loss.item() * int(masked.sum())
        right += int((output.logits.argmax(-1) == one["targets"])[masked].sum())
    with torch.no_grad():
        sums = objective.sums(model, batch)
    assert sums["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert (sums["count"], sums["right"]) == (count, right)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    learning = objective.sums(model, batch)
    assert learning.keys() == {"loss", "count"}
    assert learning["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_metrics_and_the_unigram_baseline_worked_by_hand(make, wordpiece):
    objective = make()
    found = objective.summarize({"loss": 4 * np.log(8), "count": np.float64(4), "right": np.float64(1)})
    assert found == pytest.approx({"eval_loss": np.log(8), "perplexity": 8.0, "accuracy": 0.25})
    train, held_out = (rows_of(objective, wordpiece, texts) for texts in (["fox fox the"], ["fox lunch"]))
    # With one more each over 76 entries: fox 3, the 2, all others 1, of 79.
    expected = -(np.log(3 / 79) + np.log(1 / 79)) / 2
    assert objective.baseline(train, held_out, len(wordpiece)) == pytest.approx({"unigram_loss": expected})


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer):
    objective = OBJECTIVES["masked_lm"](MaskedLM(type="masked_lm"), COLUMNS, [])
    with pytest.raises(BadInput, match="tokenizer: has no mask token, which masked_lm needs; use the tokenizer of a"):
        objective.use(tokenizer)


def test_a_row_without_text_is_refused(make, wordpiece):
    with pytest.raises(DataError, match=r"data\.text: row 12 has no 'text'; it has: body"):
        make().encode([{"body": "a"}], wordpiece, 16, first=11)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of(make_config):
    """Return a function that makes the config of a tiny run of an encoder."""

    def make(name: str = "run", **changes):
        model = {"architecture": "encoder", "num_kv_heads": 4}
        settings = {"checkpoint": {"every": 2}, "evaluation": {"every": 2, "max_rows": 4}, "run": {}, **changes}
        settings["run"] = {"name": name, "steps": 6, **settings["run"]}
        return make_config("causal_lm", "scratch", objective={"type": "masked_lm"}, model=model, **settings)

    return make


def test_a_step_has_the_same_masks_at_any_world_size_and_micro_batch(run_of):
    from trainer import build
    from trainer.feed import Feed

    whole = build.build(run_of(batch={"rows": 12})).feed
    seen = []
    for world_size, micro_rows in ((1, 12), (1, 4), (1, 1), (2, 3), (3, 2), (6, 1)):
        config = run_of(batch={"rows": 12, "micro_rows": micro_rows})
        ranks = [
            Feed(config, whole.objective, whole.train, whole.held_out, pad_id=0, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for step in (0, 3, 7):  # 7 is in another epoch: the rows come again, with other masks
            # Micro-batches are dealt to the ranks in turn.
            batches = [
                batch for turn in zip(*(feed.micro_batches(step) for feed in ranks), strict=True) for batch in turn
            ]
            ids, targets = (torch.cat([batch[name] for batch in batches], 1) for name in ("input_ids", "targets"))
            seen.append((step, ids.tolist(), targets.tolist()))
            assert {feed.count_at(step) for feed in ranks} == {int((targets != IGNORED).sum())}
    assert all(each in seen[:3] for each in seen)
    assert len(whole.train) < 12 * 7


def test_every_evaluation_masks_the_same_tokens(run_of):
    from trainer import build

    feed = build.build(run_of()).feed
    first, second = ([batch for batch, _ in feed.evaluation()] for _ in range(2))
    assert first
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["targets"], other["targets"])


def test_a_run_cut_off_and_resumed_is_the_undisturbed_run_bit_for_bit(run_of, train, read_lines, monkeypatch):
    """transformers' Trainer ends elsewhere: it draws the masks from a generator whose state it restores too late."""
    from trainer.metrics import RunLog

    class Killed(BaseException):
        pass

    def log_and_die(self, step, **fields):
        log(self, step, **fields)
        if step == 5:
            raise Killed

    undisturbed, killed = run_of("undisturbed"), run_of("killed")
    assert train(undisturbed) == 0
    log = RunLog.train
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", log_and_die)
        with pytest.raises(Killed):
            train(killed)
    torch.manual_seed(99)
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(undisturbed)
    models = [(config.run.folder / "model" / "model.safetensors").read_bytes() for config in (killed, undisturbed)]
    assert models[0] == models[1]


def test_a_run_s_model_is_one_that_transformers_loads_with_the_same_losses(run_of, train, read_lines):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from trainer import build

    config = run_of()
    assert train(config) == 0
    folder = config.run.folder / "model"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses, count = 0.0, 0
    for batch, _ in build.build(run_of("again")).feed.evaluation():
        for start, stop in itertools.pairwise(batch["attention_mask"].flatten().tolist()):
            ids, targets = (batch[name][:, start:stop] for name in ("input_ids", "targets"))
            masked = int((targets != IGNORED).sum())
            with torch.no_grad():
                losses += model(input_ids=ids, labels=targets).loss.item() * masked
            count += masked
    assert tokenizer.mask_token_id is not None
    last = [line for line in read_lines(config) if line["kind"] == "eval"][-1]
    assert last["eval_loss"] == pytest.approx(losses / count, rel=1e-4)


def test_a_run_of_any_objective_is_said_to_be_exported_next(run_of, make_config):
    from launch.train import _next_command

    several = {"data": {"text_pair": "other"}}, {"objective": {"problem": "multi_label"}}
    runs = [run_of(), *(make_config("classification", "full", **changes) for changes in several)]
    runs += [make_config(objective, "full") for objective in ("causal_lm", "sft", "classification")]
    assert {_next_command(config).split()[1] for config in runs} == {"export"}
