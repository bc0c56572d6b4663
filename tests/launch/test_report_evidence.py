"""The report's page shows samples and leaks of a run, and no loss beside one that means something else."""

import html
import json
import re

import pytest

from launch.report import write_report


def rewrite(folder, objective: str) -> None:
    """Make the run one of another objective, given as in its config.yaml."""
    path = folder / "config.yaml"
    path.write_text(re.sub(r"objective: \{.*\}", f"objective: {objective}", path.read_text()))
    result = json.loads((folder / "result.json").read_text())
    kind = re.search(r"type: (\w+)", objective)[1]
    (folder / "result.json").write_text(json.dumps({**result, "objective": kind}))


def axes_of_losses(page: str) -> dict[str, str]:
    """The title of each chart of a loss, and what stands at its y axis."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        title = html.unescape(re.search(r'aria-label="([^"]*)"', svg)[1])
        units = re.findall(r">(loss per [a-z ]+|mean squared error)</text>", svg)
        if units:
            found[title] = units[0]
    return found


@pytest.mark.parametrize(
    ("objective", "unit"),
    [
        ("{type: causal_lm}", "loss per token"),
        ("{type: masked_lm}", "loss per hidden token"),
        ("{type: token_classification}", "loss per tagged token"),
        ("{type: classification}", "loss per text"),
        ("{type: classification, problem: multi_label}", "loss per label"),
        ("{type: classification, problem: regression}", "mean squared error"),
    ],
)
def test_the_axis_of_the_loss_says_what_it_is_a_mean_of(make_run, objective, unit):
    folder = make_run("run")
    rewrite(folder, objective)
    assert axes_of_losses(write_report([folder]).read_text()) == {"Loss": unit}


def test_losses_of_different_objectives_have_a_chart_each(make_run):
    folders = [make_run("one"), make_run("two"), make_run("stars")]
    rewrite(folders[2], "{type: classification, problem: regression}")
    page = write_report(folders).read_text()
    assert axes_of_losses(page) == {
        "Loss: causal_lm": "loss per token",
        "Loss: classification, regression": "mean squared error",
    }


def test_the_last_samples_of_a_run_are_shown_as_text(make_run):
    folder = make_run("run")
    said = [(2, "early", "nothing"), (4, "a <b>", "an & answer"), (4, "more", "words")]
    rows = [{"kind": "sample", "step": step, "prompt": prompt, "text": text} for step, prompt, text in said]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken")
    page = write_report([folder]).read_text()
    assert "run: what the model says after 4 steps" in page
    assert "<td>a &lt;b&gt;</td><td>an &amp; answer</td>" in page
    assert "<td>more</td><td>words</td>" in page
    assert "early" not in page


def test_rows_that_are_trained_on_too_are_told_where_there_are_any(make_run):
    folder = make_run("run")
    pair = {"of": "validation", "in": "train", "rows": 1200, "exact": 3, "near": 2, "examples": []}
    none = {**pair, "of": "test", "exact": 0, "near": 0}
    (folder / "leaks.json").write_text(json.dumps({"pairs": [pair, none]}))
    page = write_report([folder]).read_text()
    assert "run: leaks: 5 of 1,200 validation rows are in train too, 3 word for word, 2 nearly" in page
    assert page.count("leaks: ") == 1
    for nothing in ({"pairs": [none]}, {"pairs": 3}, {}, []):
        (folder / "leaks.json").write_text(json.dumps(nothing))
        assert "leaks: " not in write_report([folder]).read_text()


def test_a_word_of_a_table_is_only_broken_where_it_does_not_fit_a_line(make_run):
    """overflow-wrap: anywhere would let a column shrink to a letter: the narrowest that its words allow."""
    page = write_report([make_run("run")]).read_text()
    assert "overflow-wrap: break-word" in page
    assert "overflow-wrap: anywhere" not in page
