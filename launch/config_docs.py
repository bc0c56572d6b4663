"""The reference of config keys, and the JSON schema for editors: both read off the pydantic models, nothing retyped."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from launch import config_file
from launch.sweep_config import SweepConfig
from serving.directory import BadInput
from trainer.config import RunConfig

Schema = dict[str, Any]

_MODELS: dict[str, type[BaseModel]] = {"run": RunConfig, "sweep": SweepConfig}
# Bounds as JSON schema words them. A keyword that is neither here nor in `accepts` is an error, never left out.
_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "matching {}",
    "minItems": "(at least {})",
    "maxItems": "(at most {})",
    "minProperties": "(at least {})",
}
_ABOUT = {"title", "description", "default", "format", "additionalProperties"}
CLOSE = 0.5  # least likeness, of 1, of a word and the key that was meant
_SCALARS = {"integer": "int", "number": "float", "string": "text", "boolean": "true | false", "null": "null"}


@dataclass(frozen=True)
class Key:
    """One entry of the reference. `when` is the type of its section that has this key, "" where all have it."""

    name: str
    accepts: str
    default: str
    meaning: str
    when: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} (type: {self.when})" if self.when else self.name

    @property
    def facts(self) -> str:
        return ", ".join(part for part in (self.accepts, self.default) if part)


def config_docs(name: str | None = None, *, sweep: bool = False, schema: bool = False) -> int:
    """Print the keys of a run or sweep config, those under `name` where one is given, or the schema; return 0.

    On a terminal in sections, wrapped; elsewhere one line a key. Raises BadInput for a name that is no key.
    """
    kind = "sweep" if sweep else "run"
    if schema:
        if name is not None:
            raise BadInput(f"config-docs: --schema prints the whole {kind} config; leave {name!r} out")
        print(json.dumps(json_schema(kind), indent=2, ensure_ascii=False))
        return 0
    shown = select(name, kind)
    console = Console(highlight=False)
    if console.is_terminal:
        _print_sections(console, shown)
    else:
        for key in shown:
            print("  ".join(part for part in (key.label, key.facts, key.meaning) if part))
    return 0


def json_schema(kind: str) -> Schema:
    """Return the schema (draft 2020-12) of a "run" or "sweep" config: what one section allows, not how sections fit.

    Like the config itself, it wants every section with several types to name its type.
    """
    schema = _MODELS[kind].model_json_schema()
    for part in schema["$defs"].values():
        if "const" in part["properties"].get("type", {}):
            part["properties"]["type"]["description"] = part["description"]
            may_lack_it = part.pop("is_default", False)
            part["required"] = sorted({*([] if may_lack_it else ["type"]), *part.get("required", [])})
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:trivet:{kind}-config"}
    return {**about, **schema, "title": f"Trivet {kind} config"}


def all_keys(kind: str) -> list[Key]:
    """Return every key of a "run" or "sweep" config, in the order of the model."""
    schema = json_schema(kind)
    return list(_keys(schema, schema["$defs"], prefix="", when=""))


def select(name: str | None, kind: str) -> list[Key]:
    """Return the keys named `name` or below it. Raises BadInput, naming a close key, where there is none."""
    keys = all_keys(kind)
    shown = [key for key in keys if name is None or f"{key.name}.".startswith((f"{name}.", f"{name}="))]
    if shown or name is None:
        return shown
    [other] = _MODELS.keys() - {kind}
    if any(key.name == name for key in all_keys(other)):
        fix = "add --sweep" if other == "sweep" else "leave --sweep out"
        raise BadInput(f"config-docs: {name} is no key of a {kind} config, but of a {other} config: {fix}")
    near = _nearest(name, keys)
    meant = f"did you mean {near}? " if near else ""
    raise BadInput(f"config-docs: {name}: unknown key; {meant}all: trivet config-docs{' --sweep' * (kind == 'sweep')}")


def _nearest(name: str, keys: list[Key]) -> str | None:
    """The key that was probably meant; None where none is close."""
    section, _, last = name.rpartition(".")
    names = [key.name for key in keys]
    same_end = [each for each in names if each.rpartition(".")[2] == last]
    siblings = [each.rpartition(".")[2] for each in names if section and each.startswith(f"{section}.")]
    if same_end:
        return config_file.nearest(name, same_end)
    if siblings:
        near = _close(last, siblings)
        return f"{section}.{near}" if near else None
    return _close(name, names)


def _close(word: str, names: list[str]) -> str | None:
    near = config_file.nearest(word, names)
    are_initials = 1 < len(near) == len(word.split("_"))
    return near if are_initials or SequenceMatcher(None, near, word).ratio() >= CLOSE else None


# --- schema -> keys --------------------------------------------------------------------------------------------------


def _keys(section: Schema, defs: dict[str, Schema], *, prefix: str, when: str) -> Iterator[Key]:
    for name, field in section["properties"].items():
        if when and name == "type":
            continue  # told by the section that has several
        dotted, meaning = f"{prefix}{name}", field.get("description", "")
        default = f"default {_yaml(field['default'])}" if "default" in field else "required"
        if "oneOf" in field:
            yield from _keys_by_type(dotted, field, defs)
        elif "$ref" in field:
            yield Key(dotted, "section", "required" if name in section.get("required", []) else "", meaning)
            yield from _keys(_resolve(field, defs), defs, prefix=f"{dotted}.", when="")
        else:
            yield Key(dotted, accepts(field), default, meaning, when)


def _keys_by_type(dotted: str, field: Schema, defs: dict[str, Schema]) -> Iterator[Key]:
    """A section that has several types, each type's meaning, and what keys each has."""
    members = [_resolve(member, defs) for member in field["oneOf"]]
    types = [member["properties"]["type"]["const"] for member in members]
    default = f"default {field['default']['type']}" if "default" in field else "required"
    yield Key(dotted, "section", "" if "default" in field else "required", field.get("description", ""))
    yield Key(f"{dotted}.type", " | ".join(types), default, "What kind it is; each has keys of its own.")
    for kind, member in zip(types, members, strict=True):
        yield Key(f"{dotted}.type={kind}", "", "", " ".join(member["description"].split()))
    kinds_of: dict[Key, list[str]] = {}  # a key that several types have alike is told once
    for kind, member in zip(types, members, strict=True):
        for key in _keys(member, defs, prefix=f"{dotted}.", when=kind):
            kinds_of.setdefault(replace(key, when=""), []).append(kind)
    for key, kinds in kinds_of.items():
        yield key if len(kinds) == len(types) else replace(key, when=" | ".join(kinds))


def accepts(node: Schema) -> str:
    """Return what a value may be, in words: `int >= 1 or null`, `cosine | linear`, `list of text`."""
    if "anyOf" in node:
        return " or ".join(accepts(part) for part in node["anyOf"])
    if "const" in node or "enum" in node:
        return " | ".join(_yaml(value) for value in node.get("enum", [node.get("const")]))
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: {', '.join(accepts(part) for part in node['prefixItems'])}"
    if "$ref" in node:
        return "mapping"
    kind = node["type"]
    if kind == "array":
        words = f"list of {accepts(node['items'])}"
    elif kind == "object":
        values = node.get("additionalProperties")
        words = f"mapping to {accepts(values)}" if isinstance(values, dict) else "mapping"
    else:
        words = "path" if node.get("format") == "path" else _SCALARS[kind]
    unknown = node.keys() - _BOUNDS.keys() - _ABOUT - {"type", "items"}
    assert not unknown, f"config-docs cannot word {sorted(unknown)} of {node}"
    bounds = " and ".join(text.format(_yaml(node[word])) for word, text in _BOUNDS.items() if word in node)
    return f"{words} {bounds}".strip()


def _resolve(node: Schema, defs: dict[str, Schema]) -> Schema:
    return defs[node["$ref"].rpartition("/")[2]]


def _yaml(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


# --- on a terminal ---------------------------------------------------------------------------------------------------


def _print_sections(console: Console, keys: list[Key]) -> None:
    section = ""
    for key in keys:
        if section and key.name.partition(".")[0] != section:
            console.print()
        section = key.name.partition(".")[0]
        if key.accepts == "section":
            console.print(Text.assemble((key.name, "bold"), f": {key.meaning}"))
            continue
        indent = 6 if key.when else 4 if not key.accepts else 2
        console.print(Padding.indent(Text.assemble((key.label, "cyan"), "  ", (key.facts, "dim")), indent))
        console.print(Padding.indent(Text(key.meaning), indent + 4))
