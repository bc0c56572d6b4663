"""Folders of older formats are read, those of newer ones refused: the samples in tests/samples, used as by a user."""

import importlib.metadata
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SAMPLES = Path(__file__).parent / "samples"
READABLE = 2
TRIVET = importlib.metadata.version("trivet")
LORA_ON_IT = ["run.name=lora", "model.type=pretrained", "model.path=run/model", "tokenizer.type=pretrained",
              "strategy.type=lora", "strategy.rank=2"]  # fmt: skip


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A folder with `run` and `onnx` of format 1, where the test then stands."""
    folder = tmp_path / "old"
    with tarfile.open(SAMPLES / "format_1" / "sample.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def edit():
    """Return a function that changes fields of a JSON file; None takes one away."""

    def change(path: Path, **fields: object) -> None:
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def losses(run: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


def test_an_old_run_goes_on_from_its_checkpoint_and_becomes_the_longer_run(old, trivet):
    code, _, err = trivet("train", "make.yaml", "run.steps=4")
    assert code == 0, err
    assert "going on from run/checkpoints/step-00000002" in err
    assert trivet("train", "make.yaml", "run.steps=4", "run.name=fresh")[0] == 0
    # Bit for bit where the machine computes as the one did that made the sample; rounding only, elsewhere.
    resumed, fresh = losses(Path("run")), losses(Path("fresh"))
    resumed.remove(next(row for row in resumed if row[:2] == ("eval", 2)))  # the end of the shorter run
    assert [row[:2] for row in resumed] == [row[:2] for row in fresh]
    assert [row[2] for row in resumed] == pytest.approx([row[2] for row in fresh], rel=1e-6)
    weights = load_file("fresh/model/model.safetensors")
    for name, tensor in load_file("run/model/model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


def test_what_a_run_writes_into_an_old_folder_says_the_new_format_and_who_wrote_it(old, trivet):
    assert trivet("train", "make.yaml", "run.steps=4")[0] == 0
    assert trivet("export", "run", "new-onnx")[0] == 0
    written = [
        "run/status.json",
        "run/result.json",
        "run/model/trivet.json",
        "run/checkpoints/step-00000004/trivet.json",
    ]
    for path in (*written, "new-onnx/trivet.json", "new-onnx/verification.json"):
        stamp = {key: json.loads(Path(path).read_text()).get(key) for key in ("format_version", "trivet")}
        assert stamp == {"format_version": READABLE, "trivet": TRIVET}, path


def test_an_old_run_that_is_done_stays_done(old, trivet):
    code, _, err = trivet("train", "make.yaml")
    assert (code, "already finished" in err) == (0, True), err


def test_an_old_run_is_reported(old, trivet):
    code, out, err = trivet("report", "run")
    assert code == 0, err
    assert "5.679" in out  # its held-out loss
    assert Path("run/report.html").is_file()


@pytest.mark.parametrize("source", ["run", "run/model"])
def test_an_old_run_and_its_model_directory_export(old, trivet, source):
    code, _, err = trivet("export", source, "new-onnx")
    assert code == 0, err
    assert Path("new-onnx/verification.json").is_file()


def test_an_old_model_directory_is_a_base_model(old, trivet):
    code, _, err = trivet("train", "make.yaml", *LORA_ON_IT)
    assert code == 0, err
    assert json.loads(Path("lora/model/trivet.json").read_text())["base_model"] == "run/model"


def test_an_old_onnx_directory_verifies_and_generates(old, trivet):
    # Its own verification counts until onnxruntime's version changes; then `trivet verify` is what the user is told.
    code, _, err = trivet("verify", "onnx")
    assert code == 0, err
    kept = json.loads(Path("onnx/verification.json").read_text())
    assert (kept["format_version"], len(kept["records"])) == (READABLE, 2)
    code, _, err = trivet("generate", "onnx", "--prompt", "name the colour", "--max-new-tokens", "4")
    assert code == 0, err


def test_an_old_onnx_directory_is_replaced_by_a_new_export(old, trivet):
    assert trivet("export", "run", "onnx")[0] == 0
    assert json.loads(Path("onnx/trivet.json").read_text())["format_version"] == READABLE


def test_the_winner_of_an_old_sweep_is_reported_and_exported(old, trivet):
    ranking = [{"strategy": "scratch", "score": 5.68, "run": "sweep/trials/run", "name": "run", "state": "done"}]
    shutil.copytree("run", "sweep/trials/run")
    Path("sweep/result.json").write_text(json.dumps({"format_version": 1, "name": "sweep", "ranking": ranking}))
    assert trivet("report", "sweep")[0] == 0
    assert trivet("export", "sweep", "new-onnx")[0] == 0


NEWER = [
    ("run/status.json", ["train", "make.yaml"]),
    ("run/status.json", ["train", "make.yaml", "--dry-run"]),
    ("run/status.json", ["report", "run"]),
    ("run/result.json", ["report", "run"]),
    ("run/result.json", ["train", "make.yaml"]),
    ("run/result.json", ["train", "make.yaml", "run.steps=4"]),
    ("run/result.json", ["train", "make.yaml", "--dry-run"]),
    ("run/model/trivet.json", ["train", "make.yaml", "run.steps=4"]),
    ("run/checkpoints/step-00000002/trivet.json", ["train", "make.yaml", "run.steps=4"]),
    ("run/model/trivet.json", ["export", "run", "new-onnx"]),
    ("run/model/trivet.json", ["train", "make.yaml", *LORA_ON_IT]),
    ("onnx/trivet.json", ["verify", "onnx"]),
    ("onnx/trivet.json", ["generate", "onnx", "--prompt", "x"]),
    ("onnx/trivet.json", ["serve", "onnx", "--port", "0"]),
    ("onnx/trivet.json", ["export", "run", "onnx"]),
    ("onnx/verification.json", ["verify", "onnx"]),
    ("onnx/verification.json", ["generate", "onnx", "--prompt", "x"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "command"), NEWER, ids=[f"{file}: {command[0]}" for file, command in NEWER])
def test_what_a_newer_trivet_wrote_is_refused_with_the_version_that_reads_it(old, trivet, edit, file, command):
    edit(Path(file), format_version=READABLE + 1, trivet="0.4.0")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    code, out, err = trivet(*command)
    [line] = err.splitlines()[-1:]
    assert (code, out) == (2, ""), err
    assert err.count("error:") == 1
    assert (
        f"format_version 3, written by Trivet 0.4.0; this is Trivet {TRIVET}, which reads up to 2: "
        "pip install 'trivet>=0.4.0'" in line
    )
    assert {path: path.read_bytes() for path in before} == before


READERS = [
    ("run/status.json", ["train", "make.yaml", "run.steps=4"]),
    ("run/status.json", ["report", "run"]),
    ("run/result.json", ["train", "make.yaml", "run.steps=4"]),
    ("run/result.json", ["report", "run"]),
    ("run/model/trivet.json", ["export", "run", "new-onnx"]),
    ("run/checkpoints/step-00000002/trivet.json", ["train", "make.yaml", "run.steps=4"]),
    ("onnx/trivet.json", ["verify", "onnx"]),
    ("onnx/verification.json", ["verify", "onnx"]),
]


@pytest.mark.parametrize("version", ["3", "2", 3.0, 2.5, 2.0, [3], {}, -1, 0, True, False])
def test_a_format_version_that_is_no_whole_number_from_1_on_is_refused(old, trivet, edit, version):
    shown = json.dumps(version)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    for file, command in READERS:
        path = Path(file)
        edit(path, format_version=version)
        changed = path.read_bytes()
        code, out, err = trivet(*command)
        assert (code, out, err.count("error:")) == (2, "", 1), (file, command, err)
        line = err.splitlines()[-1]
        assert f"{file}: format_version {shown} found; accepted: a whole number, 1 to 2; " in line
        assert path.read_bytes() == changed
        path.write_bytes(before[old / path])
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file() and path in before} == before


@pytest.mark.parametrize(
    ("file", "command", "expected"),
    [
        ("run/model/trivet.json", ["export", "run", "new-onnx"], "run/model/trivet.json: cannot be read (no format_v"),
        ("onnx/trivet.json", ["verify", "onnx"], "onnx/trivet.json: cannot be read (no format_version)"),
        ("onnx/verification.json", ["generate", "onnx", "--prompt", "x"], "cannot be read (no format_version); run: "),
    ],
)
def test_a_file_without_a_format_is_broken_as_even_format_1_said_its_own(old, trivet, edit, file, command, expected):
    edit(Path(file), format_version=None)
    code, _, err = trivet(*command)
    assert (code, expected in err) == (2, True), err


def test_a_result_without_a_format_is_not_reported_as_one(old, trivet, edit):
    edit(Path("run/result.json"), format_version=None)
    assert trivet("report", "run")[0] == 0
    assert "result.json cannot be read (no format_version)" in Path("run/report.html").read_text()


def test_a_newer_run_without_a_status_is_refused_by_the_first_line_of_its_config(old, trivet):
    """As after a kill between the two; its config may have keys that only the newer Trivet knows."""
    Path("run/status.json").unlink()
    saved = Path("run/config.yaml")
    saved.write_text(f"# format_version 3, Trivet 0.4.0\n{saved.read_text()}brandnew: {{x: 1}}\n")
    code, _, err = trivet("train", "make.yaml")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: run/config.yaml: format_version 3, written by Trivet 0.4.0; this is Trivet ")
    assert "pip install 'trivet>=0.4.0'" in err


def test_the_saved_config_says_its_format_and_who_wrote_it(old, trivet):
    assert trivet("train", "make.yaml", "run.steps=4")[0] == 0
    text = Path("run/config.yaml").read_text()
    assert text.splitlines()[0] == f"# format_version {READABLE}, Trivet {TRIVET}"
    assert trivet("train", "run/config.yaml")[0] == 0  # the line is no key


def test_a_newer_sweep_is_refused(old, trivet, edit):
    Path("sweep").mkdir()
    Path("sweep/result.json").write_text(json.dumps({"format_version": 3, "ranking": [{"run": "run"}]}))
    for command in (["report", "sweep"], ["export", "sweep", "new-onnx"]):
        code, _, err = trivet(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "sweep/result.json: format_version 3, written by a newer Trivet" in err
        assert err.endswith("reads up to 2: pip install --upgrade trivet\n")


@pytest.mark.parametrize("writer", ["0.4; rm -rf /", 4, ["0.4"], None])
def test_a_writer_that_is_no_version_is_not_put_into_a_command(old, trivet, edit, writer):
    edit(Path("run/status.json"), format_version=3, trivet=writer)
    assert "written by a newer Trivet" in trivet("report", "run")[2]


def test_a_newer_checkpoint_is_not_skipped_for_an_older_one(old, trivet, edit):
    """To go on from the older one would train again, and remove, what the newer Trivet had trained."""
    shutil.copytree("run/checkpoints/step-00000002", "run/checkpoints/step-00000003")
    edit(Path("run/checkpoints/step-00000003/trivet.json"), format_version=3)
    code, _, err = trivet("train", "make.yaml", "run.steps=4")
    assert (code, "format_version 3" in err) == (2, True), err
