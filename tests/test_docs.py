"""What the documentation names is there: commands, options, config keys, links, paths, messages and make targets."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch import config_docs

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KEYS = {kind: {key.name.partition("=")[0] for key in config_docs.all_keys(kind)} for kind in ("run", "sweep")}
FILE_ENDINGS = {"py", "md", "yaml", "json", "jsonl", "csv", "txt", "gz", "toml", "lock", "sh", "onnx", "safetensors"}
REPOSITORY = ("configs", "trainer", "serving", "launch", "tests", "benchmarks", "docs", "containers")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").replace("\\\n", " ")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return (language, text) of every fenced block."""
    return FENCE.findall(text_of(page))


def spans(page: Path) -> list[str]:
    """Return what stands in backticks outside the fenced blocks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text_of(page)))]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every `trivet ...` line of the fenced blocks: without comments and what the shell takes."""
    for _, block in blocks(page):
        for line in block.splitlines():
            found = re.match(r"(?:\w+=\S* )*(trivet .*)", line)
            if found:
                words = shlex.split(found[1], comments=True)
                shell = [i for i, word in enumerate(words) if word in ("&", "|", ">", ";", "&&")]
                yield words[: shell[0]] if shell else words


COMMANDS = sorted({tuple(words) for page in PAGES for words in command_lines(page)})
MENTIONS = sorted({(page.name, span) for page in PAGES for span in spans(page) if span.startswith("trivet ")})


def commands():
    import typer

    from launch.cli import app

    return typer.main.get_command(app).commands


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_docs_takes_these_arguments(words):
    context = commands()[words[1]].make_context(words[1], list(words[2:]))
    assert context.params


@pytest.mark.parametrize(("page", "span"), MENTIONS)
def test_a_command_mentioned_in_a_sentence_has_these_options(page, span):
    name, *others = span.split()[1:]
    known = {option for parameter in commands()[name].params for option in parameter.opts}
    assert [word for word in others if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_an_option_mentioned_alone_exists_in_some_command(page):
    known = {option for command in commands().values() for parameter in command.params for option in parameter.opts}
    planned_or_foreign = {"--dtype", "--signal=B:USR1@300"}  # said not to be built; Slurm's
    alone = {span.split()[0] for span in spans(page) if span.startswith("--") and "…" not in span}
    assert alone - known - planned_or_foreign == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_key_is_one(page):
    code = "\n".join([*spans(page), *(text for _, text in blocks(page))])
    sections = {name.partition(".")[0] for keys in KEYS.values() for name in keys}
    pattern = rf"(?<![\w./-])({'|'.join(sorted(sections))})\.([a-z_]+)(?![\w/(])"
    named = {f"{section}.{key}" for section, key in re.findall(pattern, code) if key not in FILE_ENDINGS}
    assert named - KEYS["run"] - KEYS["sweep"] == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_block_uses_keys_that_exist(page):
    for language, text in blocks(page):
        if language == "yaml":
            values = yaml.safe_load(text)
            named = {f"{section}.{key}" for section, part in values.items() for key in part}
            assert named - KEYS["run"] - KEYS["sweep"] == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_exists(page):
    code = "\n".join([*spans(page), *(text for _, text in blocks(page))])
    named = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(REPOSITORY)})/[\w./-]*", code))
    named |= {span for span in spans(page) if re.fullmatch(r"[\w.-]+\.(lock|toml)|[A-Z]+\.md", span)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_page_is_in_the_index(page):
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert page.name == "README.md" or f"]({page.name})" in index


# --- troubleshooting -------------------------------------------------------------------------------------------------

SYMPTOMS = [line.removeprefix("### ") for line in text_of(TROUBLESHOOTING).splitlines() if line.startswith("### ")]
MESSAGES = sorted({span for span in spans(TROUBLESHOOTING) if "…" in span} | {
    match[1] for symptom in SYMPTOMS if (match := re.search(r"(?:^|: )`([^`]{20,})`", symptom))
})  # fmt: skip


def test_troubleshooting_knows_many_symptoms_each_once():
    assert len(SYMPTOMS) >= 25
    assert len(set(SYMPTOMS)) == len(SYMPTOMS)


@pytest.fixture(scope="module")
def source_text() -> str:
    """Every text in the source, `…` for what is put in when it runs; those of doc strings left out."""
    files = [
        ROOT / "trivet.py",
        *(path for package in REPOSITORY[1:4] for path in sorted((ROOT / package).rglob("*.py"))),
    ]
    return "\n".join(text for file in files for text in texts_of(ast.parse(file.read_text(encoding="utf-8"))))


def texts_of(tree: ast.AST) -> Iterator[str]:
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (said | pieces):
            yield node.value


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_that_the_source_says(message, source_text):
    fixed = [part.strip() for part in message.split("…")]
    telling = [part for part in fixed if len(part) >= 8]
    assert telling, "too little to find the message by"
    assert [part for part in telling if part not in source_text] == []
