"""The reference says of every key what the models say, in a pipe and on a terminal; the schema takes what they take."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import jsonschema
import pytest
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from launch import config_docs, config_file
from launch.sweep_config import SweepConfig
from serving.directory import BadInput
from trainer.config import RunConfig, Section

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"run": RunConfig, "sweep": SweepConfig}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "pattern": "matching {}"}
TYPES = {
    int: "int",
    float: "float",
    str: "text",
    bool: "true | false",
    Path: "path",
    type(None): "null",
    dict: "mapping",
}


def fields_of(model: type[BaseModel], prefix: str = "", when: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (label, field) of every key, straight from the models; `type` of a section with several is left out."""
    for name, field in model.model_fields.items():
        sections = [kind for kind in parts(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        sections = [] if get_origin(field.annotation) is tuple else sections  # a list of sections is one key
        if field.discriminator:
            for section in sections:
                [kind] = get_args(section.model_fields["type"].annotation)
                yield from fields_of(section, f"{prefix}{name}.", kind)
        elif sections:
            yield from fields_of(sections[0], f"{prefix}{name}.")
        elif not (when and name == "type"):
            yield f"{prefix}{name}" + (f" (type: {when})" if when else ""), field


def parts(annotation: Any) -> list[Any]:
    """Every plain type in an annotation."""
    if get_origin(annotation) is Annotated:
        return parts(get_args(annotation)[0])
    whole = not get_args(annotation) or get_origin(annotation) in (Literal, dict)
    inner = [each for each in get_args(annotation) if each is not Ellipsis]  # tuple[X, ...]
    return [annotation] if whole else [part for each in inner for part in parts(each)]


def inner_metadata(annotation: Any) -> list[Any]:
    """What the inner types of an annotation are annotated with, `betas: tuple[Beta, Beta]` for one."""
    inner = get_args(annotation)
    own = [each for item in inner[1:] for each in getattr(item, "metadata", [item])]
    return own if get_origin(annotation) is Annotated else [each for part in inner for each in inner_metadata(part)]


def bounds(metadata: list[Any]) -> list[str]:
    """The bounds that a field's metadata holds, as the reference words them."""
    return [
        text.format(getattr(item, name))
        for item in metadata
        for name, text in BOUNDS.items()
        if getattr(item, name, None) is not None
    ]


FIELDS = {f"{kind}: {label}": field for kind, model in MODELS.items() for label, field in fields_of(model)}


@pytest.fixture(scope="module")
def lines() -> dict[str, str]:
    """`kind: label` -> the line of that key; one for each type of its section that it stands for."""
    found = {}
    for kind in MODELS:
        keys = config_docs.all_keys(kind)
        types = {key.name.removesuffix(".type"): key.accepts for key in keys if key.name.endswith(".type")}
        for key in keys:
            names_a_type = "=" in key.name or key.name.endswith(".type")
            of_section = "" if names_a_type else types.get(key.name.rpartition(".")[0], "")
            for when in (key.when or of_section).split(" | "):
                found[f"{kind}: {replace(key, when=when).label}"] = f"{key.facts}  {key.meaning}"
    return found


def test_a_key_that_every_type_of_a_section_has_alike_is_told_once():
    keys = {key.label for key in config_docs.all_keys("run")}
    assert "optim.lr" in keys
    assert {"optim.momentum (type: sgd)", "data.text (type: files | hub)"} <= keys


@pytest.mark.parametrize("label", FIELDS)
def test_the_line_of_a_key_says_what_its_model_says(label, lines):
    field, line = FIELDS[label], lines[label]
    facts, _, meaning = line.partition("  ")
    assert len(field.description or "") > 10, "has no description"
    assert meaning == field.description
    if field.is_required():
        assert facts.endswith("required")
    else:
        default = field.get_default(call_default_factory=True)
        shown = default if isinstance(default, str) else str(default) if isinstance(default, Path) else None
        assert facts.endswith(f"default {shown or json.dumps(default)}")
    for bound in bounds([*field.metadata, *inner_metadata(field.annotation)]):
        assert bound in facts
    for kind in parts(field.annotation):
        found = dict if isinstance(kind, type) and issubclass(kind, BaseModel) else get_origin(kind) or kind
        words = get_args(kind) if found is Literal else [TYPES[found]]
        assert all(word in facts for word in words)


def test_every_key_of_the_models_has_a_line_and_no_other_key_has(lines):
    ours = {label for label in lines if lines[label] and "=" not in label}
    sections = {label for label in ours if lines[label].startswith("section")}
    types = {label for label in ours - sections - FIELDS.keys() if label.endswith(".type")}
    assert ours - sections - types == FIELDS.keys()
    assert {label.removesuffix(".type") for label in types} <= sections


def test_a_section_that_a_config_must_have_is_marked(lines):
    for kind, model in MODELS.items():
        marked = {label for label, line in lines.items() if line.startswith("section, required")}
        needed = {name for name, field in model.model_fields.items() if field.is_required()}
        sections = {label.removeprefix(f"{kind}: ") for label in marked if label.startswith(f"{kind}: ")}
        assert sections == needed - {"base", "strategies"}  # of a sweep: needed, and no sections


def test_every_section_and_every_type_says_what_it_is(lines):
    silent = [label for label, line in lines.items() if len(line.rpartition("  ")[2]) <= 10]
    assert silent == []


def test_a_changed_default_bound_or_meaning_changes_the_line(monkeypatch):
    class Part(Section):
        size: int = Field(3, ge=2, le=9, description="How large it is.")
        rates: list[Annotated[float, Field(gt=0)]] | None = Field(None, description="One a layer.")
        kind: Literal["a", "b"] = Field("a", description="Which one.")

    class Other(Section):
        part: Part = Field(Part(), description="A part.")

    monkeypatch.setitem(config_docs._MODELS, "run", Other)
    assert [f"{key.label}  {key.facts}  {key.meaning}" for key in config_docs.all_keys("run")] == [
        "part  section  A part.",
        "part.size  int >= 2 and <= 9, default 3  How large it is.",
        "part.rates  list of float > 0 or null, default null  One a layer.",
        "part.kind  a | b, default a  Which one.",
    ]


def test_a_bound_that_the_reference_cannot_word_is_an_error(monkeypatch):
    class Other(Section):
        size: int = Field(4, multiple_of=2, description="An even number.")

    monkeypatch.setitem(config_docs._MODELS, "run", type("Run", (Section,), {"__annotations__": {"part": Other}}))
    with pytest.raises(AssertionError, match="multipleOf"):
        config_docs.all_keys("run")


# --- the command -----------------------------------------------------------------------------------------------------


def test_in_a_pipe_every_key_is_one_line_with_its_full_name(trivet):
    code, out, _ = trivet("config-docs")
    assert code == 0
    assert len(out.splitlines()) == len(config_docs.all_keys("run"))
    [rank] = [line for line in out.splitlines() if line.startswith("strategy.rank")]
    assert rank.startswith("strategy.rank (type: lora)  int >= 1, default 8  Width of the low-rank update")


def test_a_name_narrows_to_a_section_or_a_key(trivet):
    _, out, _ = trivet("config-docs", "optim")
    assert {line.split()[0].partition(".")[0] for line in out.splitlines()} == {"optim"}
    assert "optim.lr  float > 0" in out
    _, out, _ = trivet("config-docs", "strategy.rank")
    assert len(out.splitlines()) == 1
    _, out, _ = trivet("config-docs", "--sweep", "sweep")
    assert [line.split()[0] for line in out.splitlines()] == ["sweep", "sweep.name", "sweep.dir", "sweep.concurrent"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("strategy.rnak", "did you mean strategy.rank?"),
        ("rank", "did you mean strategy.rank?"),
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("stratgy", "did you mean strategy?"),
        ("sweep.concurrent", "add --sweep"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(trivet, name, expected):
    code, out, err = trivet("config-docs", name)
    assert (code, out) == (2, "")
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["nope", "optim.wombat"])
def test_a_name_that_is_near_to_no_key_is_given_none(trivet, name):
    code, _, err = trivet("config-docs", name)
    assert (code, err) == (2, f"error: config-docs: {name}: unknown key; all: trivet config-docs\n")


def test_a_run_config_name_in_the_sweep_reference_says_to_leave_the_option_out():
    with pytest.raises(BadInput, match="leave --sweep out"):
        config_docs.select("optim.lr", "sweep")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_on_a_terminal_every_key_is_there_and_nothing_is_wider(columns):
    shown = on_a_terminal(["config-docs"], columns)
    assert max(map(len, shown.splitlines())) <= columns
    words = "".join(shown.split())
    for key in config_docs.all_keys("run"):
        assert "".join(key.label.split()) in words
        assert "".join(key.facts.split()) in words or key.accepts == "section"
        assert "".join(key.meaning.split()) in words


def on_a_terminal(arguments: list[str], columns: int) -> str:
    """Return what `trivet ARGUMENTS` writes to a terminal of so many columns, without colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments], stdout=theirs, env=environment, close_fds=True
    )
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 65536):
            written += block
    except OSError:  # how Linux says that the other end has closed
        pass
    assert child.wait(timeout=600) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).replace("\r\n", "\n")


# --- the schema ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft202012Validator]:
    return {kind: jsonschema.Draft202012Validator(config_docs.json_schema(kind)) for kind in MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_the_schema_is_valid_closed_and_described(kind, trivet):
    code, out, _ = trivet("config-docs", "--schema", *(["--sweep"] if kind == "sweep" else []))
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert code == 0
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:trivet:{kind}-config"
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        for name, field in part["properties"].items():
            assert len(field.get("description", "")) > 10, f"{part['title']}.{name}"
            assert field.get("title") or "$ref" in field, f"{part['title']}.{name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_fits_the_schema(path, validators):
    values = config_file.read_yaml(path)
    validators["sweep" if "sweep" in values else "run"].validate(values)


def test_a_saved_complete_config_fits_the_schema(tmp_path, validators):
    saved = tmp_path / "config.yaml"
    saved.write_text(config_file.to_yaml(config_file.load(ROOT / "configs/sft_lora.yaml", [], RunConfig)))
    validators["run"].validate(config_file.read_yaml(saved))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"optim": {"lr": 0}}, "not valid under any"),
        ({"optim": {"type": "sgd", "betas": [0.9, 0.95]}}, "not valid under any"),
        ({"batch": {"rows": 0}}, "less than the minimum"),
        ({"optim": {"betas": [0.9, 1.0]}}, "1.0"),
        ({"run": {"name": "../up", "steps": 3}}, "does not match"),
        ({"run": {"name": "up"}}, "'steps' is a required property"),
        ({"batch": {"row": 4}}, "'row' was unexpected"),
        ({"tokenizer": {"path": "here"}}, "not valid under any"),
        ({"strategy": {"type": "lora", "depth": 3}}, "not valid under any"),
        ({"optimizer": {}}, "'optimizer' was unexpected"),
    ],
)
def test_the_schema_refuses_what_the_config_refuses(change, why, validators, tmp_path):
    values = {**config_file.read_yaml(ROOT / "configs/sft_lora.yaml"), **change}
    with pytest.raises(ValueError):
        RunConfig.model_validate(values)
    [error] = validators["run"].iter_errors(values)
    assert why in error.message or "exclusive" in str(error.validator)
