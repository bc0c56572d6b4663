"""Bad configs: one line that names the setting, the value found, what is accepted; good ones come back re-runnable."""

from pathlib import Path

import pytest

from launch import config_file
from launch.config_file import ConfigError
from trainer.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
run: {name: a, steps: 5}
objective: {type: causal_lm}
model: {type: new, hidden_size: 32, num_heads: 4}
tokenizer: {type: train}
data: {type: embedded}
strategy: {type: scratch}
"""
LORA = ["model.type=pretrained", "model.path=x", "tokenizer.type=pretrained", "strategy.type=lora"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], r"optim\.lrr: unknown key; did you mean optim\.lr\?"),
        (["modell.path=1"], r"modell: unknown key; did you mean model\?"),
        ([*LORA, "strategy.rnk=4"], r"strategy\.rnk: unknown key; did you mean strategy\.rank\?"),
        (["run.steps=many"], r"run\.steps: 'many' found; accepted: integer"),
        (["run.steps=0"], r"run\.steps: 0 found; accepted: greater than or equal to 1"),
        (["optim.lr=.nan"], r"optim\.lr: nan found; accepted: .*finite"),
        (["optim.betas=[0.9, x]"], r"optim\.betas\.1: 'x' found; accepted: number"),
        (["optim.lr=abc"], r"optim\.lr: 'abc' found; accepted: number$"),
        (["run.name=../up"], r"run\.name: '\.\./up' found"),
        (["strategy.type=magic"], r"strategy\.type: 'magic' found; accepted: 'scratch', 'full', 'linear_probe'"),
        (["strategy.type=full"], r"strategy\.type full does not fit model\.type new: use scratch"),
        ([*LORA, "strategy.rank=0"], r"strategy\.rank: 0 found"),
        (["data.type=files"], r"data\.train: missing; add it"),
        (["batch.max_length=4096"], r"batch\.max_length 4096 is longer than model\.context_length 512"),
        (["model.num_heads=3"], r"model: hidden_size 32 / num_heads 3"),
        (["run.steps"], r"override 'run\.steps': expected section\.key=value"),
        (["run.steps=[1"], r"override 'run\.steps=\[1': '\[1' is not a YAML value"),
        (["run=5", "run.steps.x=1"], "override 'run=5'"),
    ],
)
def test_a_bad_value_is_one_line_that_says_what_is_accepted(config, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_file.load(config, overrides, RunConfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a\nmodel: 5", r"broken YAML: line 2, column \d+"),
        ("run: {name: a, steps: 1}\nrun: {name: b, steps: 1}", "the key 'run' stands there twice"),
        ("- a\n- b", "holds list; expected sections"),
        ("", "holds NoneType; expected sections"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config_file.load(path, [], RunConfig)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        config_file.load(tmp_path / "nowhere.yaml", [], RunConfig)


def test_an_override_that_changes_a_type_drops_the_other_types_keys(config):
    loaded = config_file.load(config, LORA, RunConfig)
    assert loaded.model.model_dump() == {"type": "pretrained", "path": "x", "made_by": None, "trust_remote_code": False}


def test_the_saved_form_loads_to_the_same_config_from_elsewhere(tmp_path):
    original = config_file.load(ROOT / "configs" / "sft_lora.yaml", ["run.seed=3"], RunConfig)
    saved = tmp_path / "config.yaml"
    saved.write_text(config_file.to_yaml(original))
    again = config_file.load(saved, [], RunConfig)
    assert again == original
    assert again.model.made_by == ROOT / "configs" / "pretrain_tiny.yaml"


def test_yaml_merge_keys_work(tmp_path, config):
    path = tmp_path / "merged.yaml"
    path.write_text(GOOD.replace("run: {", "x: &x {steps: 9}\nrun: {<<: *x, ").replace("steps: 5", "seed: 1"))
    assert config_file.read_yaml(path)["run"] == {"name": "a", "seed": 1, "steps": 9}


def test_differences_name_the_dotted_keys_with_both_values(config):
    one = config_file.load(config, [], RunConfig)
    other = config_file.load(config, ["optim.lr=1", "run.seed=2"], RunConfig)
    assert config_file.differences(one, other) == {"optim.lr": (3e-4, 1.0), "run.seed": (0, 2)}


@pytest.mark.parametrize("name", ["pretrain_tiny", "sft_lora", "classify"])
def test_every_example_config_is_valid(name):
    assert config_file.load(ROOT / "configs" / f"{name}.yaml", [], RunConfig).run.name == name
