"""Reports are one self-contained page, whatever state the runs are in."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from launch import report_data, report_plots
from launch.report import Section, terminal_table, write_report
from serving.directory import BadInput


@pytest.fixture
def sweep_folder(tmp_path, make_run):
    """A sweep of two finished trials and one that failed before it wrote anything."""
    folder = tmp_path / "compare"
    finished = {"state": "done", "score_name": "eval_loss", "seconds": 75.4}
    entries = [
        {
            **finished,
            "strategy": name,
            "score": score,
            "run": f"elsewhere/trials/{name}",
            "trainable_parameters": weights,
            "overrides": [f"strategy.type={name}"],
        }
        for name, score, weights in (("full", 1.25, 120_000), ("lora", 1.5, 4_096))
    ]
    for entry in entries:
        make_run(f"compare/trials/{entry['strategy']}", strategy=entry["strategy"])
    lost = {"strategy": "lora", "score": None, "run": "elsewhere/trials/lost", "state": "failed", "reason": "no memory"}
    (folder / "result.json").write_text(json.dumps({"format_version": 1, "ranking": [*entries, lost]}))
    return folder


def test_a_report_shows_the_result_and_the_curves_of_a_run(make_run):
    page = write_report([make_run("first")]).read_text()
    text = visible_text(page)
    for expected in ("first", "done", "lora", "3.5 before training", "1.5", "1,000", "0.8% of 123,456", "1 min 15 s"):
        assert expected in text, expected
    for expected in ("700 MiB", "0f1e2d", "torch 2.13.0", "held-out perplexity: 33.1 -> 4.5", "strategy:"):
        assert expected in text, expected
    assert titles(page) == ["Loss", "Learning rate", "Speed", "Gradient norm before clipping"]


def test_a_classifier_s_report_has_f1_and_the_confusion_matrix_by_label(make_run):
    folder = make_run("first")
    path = folder / "result.json"
    result = json.loads(path.read_text())
    details = {"labels": ["noun", "<verb>"], "f1": [0.75, 0.5], "confusion": [[6, 31], [47, 8]]}
    path.write_text(json.dumps({**result, "details": details}))
    text = visible_text(write_report([folder]).read_text())
    assert "first: held-out labels" in text
    for expected in ("noun", "said <verb>", "0.750", "0.500", "31", "47"):
        assert expected in text, expected
    for broken in ({**details, "f1": [0.75]}, {**details, "f1": [0.5, "x"]}, {"labels": 3}, 5, {}):
        path.write_text(json.dumps({**result, "details": broken}))
        assert "held-out labels" not in visible_text(write_report([folder]).read_text())


def test_a_report_loads_nothing_from_elsewhere(make_run):
    page = write_report([make_run("first"), make_run("second")]).read_text()
    outside = re.findall(r'(?:src|href|url|@import)[=(\s"\']+(?!#)[^"\')>\s]+', page)
    assert [address for address in outside if "www.w3.org" not in address] == []
    assert "<script" not in page


def test_whatever_a_run_says_is_text_and_not_markup(make_run):
    folder = make_run("first", state="failed")
    status = json.loads((folder / "status.json").read_text()) | {"reason": "<script>alert(1)</script> & $x$"}
    (folder / "status.json").write_text(json.dumps(status))
    section = Section("<b>bold</b>", ["<i>"], [["<img src=x>"]], note="a < b", figures=[])
    page = write_report([folder], sections=[section]).read_text()
    for forbidden in ("<script>", "<b>bold", "<i>", "<img"):
        assert forbidden not in page
    assert "<script>alert(1)</script> & $x$" in visible_text(page)


def test_sections_stand_above_the_runs_with_their_note_and_figures(make_run):
    figure = report_plots.bar_plot("Decoding speed", [("trivet", 512.0), ("generate", 128.0)], x="tokens/s")
    section = Section("Evidence", ["check", "passed"], [["logits", "yes"]], note="fp32", figures=[figure])
    page = write_report([make_run("first")], sections=[section]).read_text()
    text = visible_text(page)
    assert text.index("Evidence") < text.index("logits") < text.index("fp32") < text.index("Runs")
    assert titles(page)[0] == "Decoding speed"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "los'), "1 unreadable lines left out"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
        (lambda run: (run / "status.json").write_text("{"), "status.json cannot be read"),
        (lambda run: (run / "status.json").unlink(), "has no status.json"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "broken YAML"),
        (lambda run: (run / "result.json").write_text("[1]"), "result.json cannot be read (no object)"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n[]\n3\n"), "3 unreadable lines left out"),
        (lambda run: (run / "result.json").write_text('{"score": null, "seconds": "?", "versions": 3}'), ""),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN, "lr": "x"}\n'), ""),
    ],
)
def test_a_broken_run_is_shown_as_what_it_is(make_run, capsys, break_it, expected):
    folder = make_run("broken")
    break_it(folder)
    assert expected in visible_text(write_report([folder]).read_text())
    terminal_table([folder])
    assert "broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "expected"),
    [("failed", "failed at step 3"), ("stopped", "goes on from there"), ("running", "still running at step 3")],
)
def test_an_unfinished_run_says_how_far_it_came(make_run, state, expected):
    assert expected in visible_text(write_report([make_run("partial", state=state)]).read_text())


def test_a_sweep_shows_its_ranking_the_failed_trial_and_score_against_weights(sweep_folder):
    page = write_report([sweep_folder]).read_text()
    text = visible_text(page)
    assert text.index("1.25") < text.index("no memory")
    assert "strategy.type=full" in text
    assert titles(page)[0] == "Score against trainable weights"
    assert len(re.findall("<details>", page)) == 4  # two runs that left a folder, two folds each


def test_the_terminal_shows_the_ranking_of_a_sweep(sweep_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    terminal_table([sweep_folder])
    out = capsys.readouterr().out
    assert out.index("full") < out.index("lora") < out.index("lost")


def test_a_moved_sweep_still_finds_its_trials(sweep_folder):
    found = report_data.read(sweep_folder)
    assert [run.name for run in found.runs] == ["full", "lora"]


def test_the_page_goes_where_it_is_told(make_run, tmp_path):
    assert write_report([make_run("first")], tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_that_is_no_run_is_bad_input(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=name):
        write_report([tmp_path / name])


def test_a_page_that_cannot_be_written_is_bad_input(make_run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="--output"):
        write_report([make_run("first")], tmp_path / "file" / "page.html")


def test_a_single_point_and_equal_names_can_be_drawn():
    svg = report_plots.line_plot("One", [("a", [1], [2.0])], x="step", y="loss", marked=[("a", [0], [3.0])])
    ET.fromstring(svg)
    ET.fromstring(
        report_plots.scatter_plot("$dollars$ & <tags>", [("a", 0, 1.0), ("a", 5, 2.0)], x="x", y="y", log_x=True)
    )


def test_the_planned_memory_stands_beside_the_measured_one(make_run):
    """By hand: 400 MiB for the program and 250 MiB planned on top of it, beside 700 MiB measured."""
    folder = make_run("one")
    assert "MiB planned" not in visible_text(write_report([folder]).read_text())
    result = json.loads((folder / "result.json").read_text())
    known = {"program_memory_bytes": 400 * 1024**2, "planned_memory_bytes": 250 * 1024**2, "world_size": 2}
    (folder / "result.json").write_text(json.dumps({**result, **known}))
    text = visible_text(write_report([folder]).read_text())
    assert "Peak memory 700 MiB 650 MiB planned; the main one of 2 processes" in text


def test_importing_the_report_does_not_import_matplotlib():
    script = "import sys, launch.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=600).returncode == 0


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts = []

    def handle_data(self, data):
        self.parts.append(data)


def visible_text(page: str) -> str:
    parser = Text()
    parser.feed(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return " ".join(" ".join(parser.parts).split())


def titles(page: str) -> list[str]:
    """The names of the figures, each of which is well-formed."""
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    return [ET.fromstring(figure).get("aria-label") for figure in figures]
