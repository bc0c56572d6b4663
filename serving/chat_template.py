"""Chat templates in a sandbox: a template comes with a model from anywhere and must reach nothing but its input.

The environment has the settings and helpers that transformers gives to templates, so that the same template renders
the same text; the template language is Jinja2 (https://jinja.palletsprojects.com).
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.directory import BadInput

MAX_RENDERED_CHARS = 20_000_000


class ChatTemplate:
    """A compiled template: messages in, the prompt text that the model was trained on out."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile `source`; `variables` (bos_token, eos_token ...) are visible to it. Raises BadInput."""
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BadInput(
                f"chat_template: cannot be compiled ({_one_line(error)}); mend it and export again"
            ) from None

    def render(self, messages: list[dict[str, Any]], *, now: datetime | None = None) -> str:
        """Return the prompt for `messages`, up to where the assistant's answer begins.

        Raises BadInput for whatever goes wrong in the template, its own `raise_exception` included.
        """
        plain = json.loads(json.dumps(messages))  # nothing with methods of its own gets into the sandbox
        pieces, num_chars, clock = [], 0, {} if now is None else {"strftime_now": lambda pattern: now.strftime(pattern)}
        try:
            for piece in self._template.generate(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._variables | clock
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise OverflowError(f"more than {MAX_RENDERED_CHARS} characters")
        except Exception as error:  # a template can raise any exception of any function that it calls
            raise BadInput(f"messages: the chat template refuses them ({_one_line(error)})") from None
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for loss masks in training; here it only passes through."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the class itself and what hangs on it."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, refusing names that begin with an underscore: they reach into Python itself."""

    def __init__(*args: Any, **values: Any) -> None:  # no named self: a template may use that name for a value
        self, *rest = args
        attributes = dict(*rest, **values)
        for name in attributes:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which the model never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
