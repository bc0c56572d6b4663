"""YAML and dotted overrides -> a validated config. The only YAML parser of the project."""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from serving import directory, format_version
from serving.directory import BadInput
from trainer.config import flat

Config = TypeVar("Config", bound=BaseModel)


class ConfigError(BadInput):
    """A config file or override that cannot be used."""


class _Loader(yaml.SafeLoader):
    """YAML without silent duplicates: the second of two equal keys is an error, not the winner."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    loader.flatten_mapping(node)
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def load(path: Path, overrides: list[str], model: type[Config]) -> Config:
    """Return the config in the YAML file at `path` with `section.key=value` overrides applied, validated as `model`.

    Raises ConfigError, one line, for a missing file, broken YAML, an unknown key (naming the nearest), a wrong type
    or range.
    """
    path = Path(path)
    values = read_yaml(path)
    # A changed type empties its section first, so that the other type's keys do not linger.
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".type")):
        _apply(values, override)
    try:
        return model.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        where = f"{path} with {' '.join(overrides)}" if overrides else path
        raise ConfigError(f"{where}: {_explain(error, model)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError if it is missing, broken or not a mapping.

    Raises NewerFormat for a saved config of a format that this Trivet does not know.
    """
    try:
        text = path.read_text(encoding="utf-8")
        directory.current(path, format_version.of_comment(text))
        values = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a config file, such as {path / 'config.yaml'} of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep; expected sections such as `run:` and `model:`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: broken YAML: {where}{getattr(error, 'problem', error)}; mend that line") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}; expected sections such as `run:` and `model:`")
    return values


def to_yaml(config: BaseModel) -> str:
    """Return the complete, re-runnable YAML of a config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: BaseModel, new: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ between two configs, with both values (None where it has no such)."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return {key: (before.get(key), after.get(key)) for key in keys}


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value, for example run.steps=20")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    section = values
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {key} is not a section")
    if keys[-1] == "type" and section.get("type", value) != value:
        section.clear()
    section[keys[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    # An unknown key first: it is often why another one is missing.
    first, *others = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    more = f" (and {len(others)} more: {', '.join(_dotted(e['loc'], model) for e in others)})" if others else ""
    return _explain_one(first, model) + more


def _explain_one(error: Any, model: type[BaseModel]) -> str:
    name, found = _dotted(error["loc"], model), error["input"]
    if error["type"] == "extra_forbidden":
        parent, _, key = name.rpartition(".")
        accepted = _keys_at(model, error["loc"][:-1])
        near = f"{parent}.{nearest(key, accepted)}".removeprefix(".")
        return f"{name}: unknown key; did you mean {near}? accepted there: {', '.join(accepted)}"
    if error["type"] == "missing":
        return f"{name}: missing; add it"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if error["type"].startswith("union_tag"):
        accepted = error["ctx"].get("expected_tags", "")
        found = error["ctx"].get("tag", found)
        return f"{name}.type: {found!r} found; accepted: {accepted}" if accepted else f"{name}.type: missing; add it"
    accepted = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").partition(", unable to ")[0]
    return f"{name}: {found!r} found; accepted: {accepted}"


def nearest(key: str, accepted: list[str]) -> str:
    """The key that was most likely meant: the initials (`learning_rate` for lr), else the closest spelling."""
    initials = "".join(word[:1] for word in key.split("_"))
    return initials if initials in accepted else difflib.get_close_matches(key, accepted, n=1, cutoff=0)[0]


def _dotted(location: tuple[Any, ...], model: type[BaseModel]) -> str:
    """The dotted key as the user writes it: pydantic puts a union's tag into it (`strategy.lora.rank`)."""
    parts, candidates, is_tag = [], [model], False
    for part in location:
        if is_tag:
            is_tag = False
            continue
        parts.append(str(part))
        if fields := [each.model_fields[part] for each in candidates if part in each.model_fields]:
            candidates = [kind for field in fields for kind in _models_in(field.annotation)]
            is_tag = any(field.discriminator is not None for field in fields)
    return ".".join(parts)


def _keys_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Every key that may stand where `location` points."""
    candidates = [model]
    for part in location:
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        if fields:
            candidates = [kind for field in fields for kind in _models_in(field.annotation)]
        else:  # a union tag: keep the member with that type; a place in a list keeps all
            candidates = [c for c in candidates if str(part) in str(c.model_fields.get("type"))] or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _models_in(part)]
