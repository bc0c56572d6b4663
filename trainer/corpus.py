"""The embedded corpus: text that every machine with Python has, made from the standard library's own source.

Files are read and parsed with `ast`; nothing is imported or executed. The rows depend only on the standard library's
files, so they are the same for a given Python version. Whole modules are held out, and a held-out row whose text also
occurs in the training part (shared docstrings are common) is dropped.
"""

import ast
import builtins
import functools
import hashlib
import io
import itertools
import keyword
import math
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Other people's packages, files that differ from machine to machine, and tests and data that are no library code.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "lib2to3",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_LONGEST_ANSWER_CHARS = 400
_MOST_WORDS = 100
_STATEMENTS = {
    ast.For: "for", ast.If: "if", ast.Raise: "raise", ast.Return: "return", ast.Try: "try", ast.While: "while",
    ast.With: "with",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One documented module, class, function or method."""

    module: str
    name: str
    kind: str
    docstring: str
    source: str  # functions and methods whole, classes up to the end of their docstring; empty for modules


def read_items(root: Path | None = None) -> list[Item]:
    """Return every documented item of the standard library (or of the tree at `root`), in a fixed order."""
    return _read_tree(root) if root else _read_once(Path(sysconfig.get_path("stdlib")))


@functools.cache
def _read_once(root: Path) -> list[Item]:
    """The standard library does not change under a running interpreter, and parsing it takes seconds."""
    return _read_tree(root)


def _read_tree(root: Path) -> list[Item]:
    return [item for path in _source_files(root) for item in _items_of(path, path.relative_to(root))]


def documents(items: list[Item]) -> list[tuple[Item, Row]]:
    """Text rows for language modelling: module docstrings, and documented definitions, none inside another."""
    return [(item, {"text": item.source or item.docstring}) for item in items]


def instructions(items: list[Item]) -> list[tuple[Item, Row]]:
    """Chat rows: a question about a public name, answered with the first paragraph of its docstring."""
    rows = []
    for item in items:
        answer = " ".join(item.docstring.split("\n\n")[0].split())
        if _is_public(item.name) and 10 <= len(answer) <= _LONGEST_ANSWER_CHARS:
            question = (
                f"What does `{item.name}` do?" if item.kind in ("function", "method") else f"What is `{item.name}`?"
            )
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append((item, {"messages": turns}))
    return rows


def kinds(items: list[Item]) -> list[tuple[Item, Row]]:
    """Labelled rows: a docstring's first paragraph, and whether it describes a module, class, function or method."""
    return [(item, {"text": item.docstring.split("\n\n")[0], "label": item.kind}) for item in items]


def statements(items: list[Item]) -> list[tuple[Item, Row]]:
    """Rows with several labels: a docstring's first paragraph, and the kinds of statements in what it describes."""
    rows = []
    for item in items:
        try:
            found = {_STATEMENTS.get(type(node), "") for node in ast.walk(ast.parse(item.source))} - {""}
        except SyntaxError:  # the head of a class may be no whole statement
            continue
        rows.append((item, {"text": item.docstring.split("\n\n")[0], "label": sorted(found)}))
    return rows


def sizes(items: list[Item]) -> list[tuple[Item, Row]]:
    """Rows with a number: a docstring's first paragraph, and the logarithm (base 2) of the lines it stands for."""
    return [
        (item, {"text": item.docstring.split("\n\n")[0], "label": round(math.log2(1 + text.count("\n")), 3)})
        for item, text in ((item, item.source or item.docstring) for item in items)
    ]


def tagged_words(items: list[Item]) -> list[tuple[Item, Row]]:
    """Rows of words with a tag each (IOB2): the first words of a source, and which are strings, comments, names ..."""
    rows = []
    for item in items:
        pairs = code_words(item.source) if item.source else _tagged("string", item.docstring)
        if found := list(itertools.islice(pairs, _MOST_WORDS)):
            rows.append((item, {"tokens": [word for word, _ in found], "tags": [tag for _, tag in found]}))
    return rows


def code_words(source: str) -> Iterator[tuple[str, str]]:
    """Yield the words of Python source, each with its kind as a tag, up to the first that does not parse."""
    before = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            yield from _tagged(_kind(token, before), token.string)
            before = token.string
    except (tokenize.TokenError, SyntaxError):
        return  # the head of a class may be no whole statement


VIEWS: dict[str, Callable[[list[Item]], list[tuple[Item, Row]]]] = {
    "causal_lm": documents,
    "masked_lm": documents,
    "sft": instructions,
    "classification": kinds,
    "multi_label": statements,
    "regression": sizes,
    "token_classification": tagged_words,
}


def split(rows: list[tuple[Item, Row]]) -> tuple[list[Row], list[Row]]:
    """Return (train, held out): about a tenth of the modules is held out, and no text stands in both."""
    train = [(item, row) for item, row in rows if not _is_held_out(item.module)]
    seen = {key for item, row in train for key in _text_keys(item, row)}
    held_out = [row for item, row in rows if _is_held_out(item.module) and not seen & _text_keys(item, row)]
    return [row for _, row in train], held_out


def _is_held_out(module: str) -> bool:
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0


def _text_keys(item: Item, row: Row) -> set[str]:
    """Everything in a row that must not stand on the other side of the split, up to white space and case."""
    texts = [item.docstring, item.docstring.split("\n\n")[0], row.get("text", "")]
    texts += [turn["content"] for turn in row.get("messages", [])] + [" ".join(row.get("tokens", []))]
    return {" ".join(text.lower().split()) for text in texts if text}


def _tagged(kind: str | None, text: str) -> Iterator[tuple[str, str]]:
    for number, word in enumerate(text.split()):
        yield word, f"{'I' if number else 'B'}-{kind}" if kind else "O"


def _kind(token: tokenize.TokenInfo, before: str) -> str | None:
    """The kind of a token of Python source; None for operators, and for names that are none of these."""
    if token.type != tokenize.NAME:
        return {tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.NUMBER: "number"}.get(token.type)
    if before in ("def", "class"):
        return "definition"
    return "keyword" if keyword.iskeyword(token.string) else "builtin" if hasattr(builtins, token.string) else None


def _is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _source_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _SKIPPED_FOLDERS & set(parts) and not any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            yield path


def _items_of(path: Path, relative: Path) -> Iterator[Item]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return  # a file that this Python itself could not import says nothing about its library
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    lines = source.split("\n")  # as the parser counts them: splitlines() also breaks at form feeds
    if docstring := ast.get_docstring(tree):
        yield Item(module, module, "module", docstring, "")
    for node in tree.body:
        yield from _definitions(node, module, module, lines)


def _definitions(node: ast.AST, module: str, prefix: str, lines: list[str]) -> Iterator[Item]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    name = f"{prefix}.{node.name}"
    in_class = prefix != module
    is_class = isinstance(node, ast.ClassDef)
    if docstring := ast.get_docstring(node):
        end = node.body[0].end_lineno if is_class else node.end_lineno
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))
        yield Item(module, name, "class" if is_class else "method" if in_class else "function", docstring, source)
    if is_class and not in_class:
        for child in node.body:
            yield from _definitions(child, module, name, lines)
