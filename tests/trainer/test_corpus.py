"""The embedded corpus: read without running anything, split by module, the same every time."""

import sys
from pathlib import Path

import pytest

from trainer import corpus

SHARED = "read the whole file at once and return one list of its lines  without their ends."
MODULES = 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A library of 60 modules, some with a docstring that others share, and everything that must be passed over."""
    root = tmp_path_factory.mktemp("library")

    def add(name: str, text: str, encoding: str = "utf-8") -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding=encoding)

    for i in range(MODULES):
        # The same words, but each time with other white space and case.
        shared = SHARED[:i].upper() + SHARED[i:].replace("  ", "   " if i % 2 else "\n    ")
        add(f"module_{i:02}.py", f'"""Module number {i}."""\n\n\ndef read_{i}():\n    """{shared}\n    """\n')
    add("package/__init__.py", '"""A package of things."""\n')
    add("latin.py", '# -*- coding: latin-1 -*-\n"""Written in Zürich."""\n', "latin-1")
    add("feed.py", '"""Has a form feed."""\n\x0c\ndef after():\n    """Comes after the form feed."""\n    return 1\n')
    add("broken.py", '"""Docstring of a file that does not parse."""\ndef (:\n')
    add("binary.py", "")
    (root / "binary.py").write_bytes(b'"""\xff\xfe"""')
    for folder in ("test", "site-packages", "__pycache__"):
        add(f"{folder}/skipped.py", '"""Never read this."""\n')
    return root


def test_nothing_is_imported_or_run(tmp_path):
    trap = (
        f'"""A trap."""\nopen({str(tmp_path / "sprung")!r}, "w").close()\nraise SystemExit("the corpus ran a module")\n'
    )
    (tmp_path / "trap.py").write_text(trap)
    modules = set(sys.modules)
    assert [item.docstring for item in corpus.read_items(tmp_path)] == ["A trap."]
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in set(sys.modules) - modules


def test_items_are_the_documented_definitions_with_their_source(tmp_path):
    (tmp_path / "shapes.py").write_text(
        '"""Shapes."""\nimport os\n\n'
        'class Square:\n    """A square."""\n\n    def area(self):\n        """Its area."""\n        return 1\n\n'
        '    def hidden(self):\n        return 2\n\n'
        'async def draw():\n    """Draw it."""\n\n'
        "def silent():\n    pass\n"
    )  # fmt: skip
    found = [(item.name, item.kind, item.docstring) for item in corpus.read_items(tmp_path)]
    assert found == [
        ("shapes", "module", "Shapes."),
        ("shapes.Square", "class", "A square."),
        ("shapes.Square.area", "method", "Its area."),
        ("shapes.draw", "function", "Draw it."),
    ]
    assert [item.source for item in corpus.read_items(tmp_path)] == [
        "",
        'class Square:\n    """A square."""',  # without its methods, which are items themselves
        'def area(self):\n    """Its area."""\n    return 1',
        'async def draw():\n    """Draw it."""',
    ]


def test_tests_other_peoples_packages_and_files_that_do_not_parse_are_passed_over(tree):
    items = corpus.read_items(tree)
    docstrings = [item.docstring for item in items]
    assert "Never read this." not in docstrings
    assert not {item.module for item in items} & {"broken", "binary"}
    assert "Written in Zürich." in docstrings
    assert "package" in {item.module for item in items}


def test_source_is_cut_at_the_lines_that_the_parser_counts(tree):
    [item] = [item for item in corpus.read_items(tree) if item.name == "feed.after"]
    assert item.source == 'def after():\n    """Comes after the form feed."""\n    return 1'


@pytest.mark.parametrize("view", corpus.VIEWS)
def test_the_split_is_by_module_and_no_text_stands_on_both_sides(tree, view):
    rows = corpus.VIEWS[view](corpus.read_items(tree))
    train, held_out = corpus.split(rows)
    assert train
    assert held_out
    assert not texts(train) & texts(held_out)
    modules = [{item.module for item, row in rows if id(row) in map(id, part)} for part in (train, held_out)]
    assert not modules[0] & modules[1]


def test_a_held_out_row_that_repeats_a_training_text_is_dropped(tree):
    """All functions called read_* have one docstring, so none may be held out, though the modules of some are."""
    rows = corpus.kinds([item for item in corpus.read_items(tree) if item.module.startswith("module_")])
    _, held_out = corpus.split(rows)
    assert {row["label"] for row in held_out} == {"module"}


def test_the_corpus_is_deterministic(tree):
    for view in corpus.VIEWS.values():
        first, second = (corpus.split(view(corpus.read_items(tree))) for _ in range(2))
        assert first == second


def test_the_views_of_an_item_worked_by_hand():
    source = 'def dedent(text):\n    """..."""'
    item = corpus.Item("textwrap", "textwrap.dedent", "function", "Remove any\nleading space.\n\nDetails.", source)
    module = corpus.Item("io", "io", "module", "Streams.", "")
    method = corpus.Item("io", "io.IOBase.close", "method", "Flush and close.", "def close(): ...")
    private = corpus.Item("io", "io._helper", "function", "Help the other functions.", "def _helper(): ...")
    assert [row for _, row in corpus.documents([item, module])] == [{"text": source}, {"text": "Streams."}]
    question, answer = "What does `textwrap.dedent` do?", "Remove any leading space."
    assert [row for _, row in corpus.instructions([item, private])] == [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    ]
    assert [row for _, row in corpus.kinds([item, method])] == [
        {"text": "Remove any\nleading space.", "label": "function"},
        {"text": "Flush and close.", "label": "method"},
    ]


def test_the_views_for_several_labels_numbers_and_tags_worked_by_hand():
    source = 'def half(n):\n    """For lunch."""\n    if n:  # not 0\n        return abs(n) / 2.5\n'
    item = corpus.Item("a", "a.half", "function", "For lunch.", source)
    module = corpus.Item("io", "io", "module", "Streams of\nbytes.", "")
    assert [row for _, row in corpus.statements([item, module])] == [
        {"text": "For lunch.", "label": ["if", "return"]},
        {"text": "Streams of\nbytes.", "label": []},
    ]
    assert [row["label"] for _, row in corpus.sizes([item, module])] == [2.322, 1.0]  # log2 of 5 and of 2
    tags = {
        "def": "B-keyword", "half": "B-definition", "(": "O", "n": "O", ")": "O", ":": "O", '"""For': "B-string",
        'lunch."""': "I-string", "if": "B-keyword", "#": "B-comment", "not": "I-comment", "0": "I-comment",
        "return": "B-keyword", "abs": "B-builtin", "/": "O", "2.5": "B-number",
    }  # fmt: skip
    code, prose = (row for _, row in corpus.tagged_words([item, module]))
    assert list(dict.fromkeys(code["tokens"])) == list(tags)
    assert code["tags"] == [tags[word] for word in code["tokens"]]
    assert list(corpus.code_words("class Box:\n")) == [("class", "B-keyword"), ("Box", "B-definition"), (":", "O")]
    assert prose == {"tokens": ["Streams", "of", "bytes."], "tags": ["B-string", "I-string", "I-string"]}


def test_the_real_standard_library_gives_both_sides_of_every_view():
    items = corpus.read_items()
    assert not {"test", "site-packages"} & {item.module.partition(".")[0] for item in items}
    for view in corpus.VIEWS.values():
        rows = view(items)
        train, held_out = corpus.split(rows)
        assert len(train) > 1000
        assert len(held_out) > 100
        assert not texts(train) & texts(held_out)


def texts(rows: list[corpus.Row]) -> set[str]:
    """Every text in the rows, without white space and case."""
    found = [row["text"] for row in rows if "text" in row]
    found += [turn["content"] for row in rows for turn in row.get("messages", [])]
    found += [" ".join(row["tokens"]) for row in rows if "tokens" in row]
    return {"".join(text.split()).casefold() for text in found}
