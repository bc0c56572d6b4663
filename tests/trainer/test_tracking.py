"""What trackers get: numbers and the config; text only when asked; nothing twice; and a run never fails of them."""

import json
import sys
import time
from typing import ClassVar

import pytest

from serving import directory
from serving.directory import BadInput, NewerFormat
from trainer import tracking
from trainer.config import Log, RunConfig
from trainer.metrics import RunLog

FIELDS = (
    "loss", "lr", "grad_norm", "tokens", "total_tokens", "tokens_per_s", "data_wait_s", "memory_bytes", "elapsed_s"
)  # fmt: skip
WORD = "zebrafish"  # stands in every held-out text, nowhere else


@pytest.fixture
def config(make_config, tmp_path):
    """Return a function that makes the config of a run whose held-out texts hold WORD."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"text": f"the {WORD} number {i} swims"}) + "\n" for i in range(6)))

    def make(*trackers: str, steps: int = 4, sample_text: int = 0) -> RunConfig:
        log = {"trackers": list(trackers), "sample_text": sample_text}
        return make_config(
            run={"steps": steps}, log=log, data={"validation": str(held_out)}, optim={"schedule": "constant"}
        )

    return make


@pytest.fixture
def wandb_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'trivet[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def mlflow_files(monkeypatch, tmp_path):
    """A tracking server in a folder."""
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'trivet[track]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def bytes_below(folder) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def written_by_wandb(folder) -> bytes:
    """What lies in W&B's folder once its own process, which writes after we have ended, has written the metrics."""
    deadline = time.monotonic() + 30
    while b"eval/eval_loss" not in (found := bytes_below(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def metric_history(config: RunConfig, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    run = json.loads((config.run.folder / "trackers.json").read_text())["mlflow"]
    return [(each.step, each.value) for each in MlflowClient().get_metric_history(run, name)]


def test_wandb_gets_numbers_and_config_and_no_text(config, train, wandb_offline):
    run = config("wandb")
    assert train(run) == 0
    sent = written_by_wandb(run.run.folder / "wandb")
    assert b"train/loss" in sent
    assert b"eval/eval_loss" in sent
    assert b"hidden_size" in sent
    assert WORD.encode() not in sent


def test_wandb_gets_text_when_asked(config, train, wandb_offline):
    run = config("wandb", sample_text=2)
    assert train(run) == 0
    sent = bytes_below(run.run.folder / "wandb").decode(errors="replace")
    assert f"the {WORD} number" in sent


def test_wandb_gathers_nothing_about_the_machine(config, train, wandb_offline, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "host-of-the-test")
    monkeypatch.setattr(sys, "argv", ["trivet", "argument-of-the-test"])
    run = config("wandb")
    assert train(run) == 0
    [folder] = (run.run.folder / "wandb").glob("offline-run-*")
    [record] = folder.glob("*.wandb")
    assert [
        path.name for path in (folder / "files").iterdir() if path.name.startswith(("requirements", "wandb-meta"))
    ] == []
    for told in (b"host-of-the-test", b"argument-of-the-test", b"git@"):
        assert told not in record.read_bytes()


def test_mlflow_gets_the_numbers_of_metrics_jsonl_and_the_config_and_no_text(
    config, train, mlflow_files, read_lines, tmp_path
):
    run = config("mlflow")
    assert train(run) == 0
    lines = [line for line in read_lines(run) if line["kind"] == "train"]
    assert metric_history(run, "train/loss") == [(line["step"], line["loss"]) for line in lines]
    from mlflow import MlflowClient

    found = MlflowClient().get_run(json.loads((run.run.folder / "trackers.json").read_text())["mlflow"])
    assert (found.info.run_name, found.info.status, found.data.params["optim.lr"]) == ("run", "FINISHED", "0.01")
    assert {tag for tag in found.data.tags if "source" in tag or "git" in tag} == set()
    assert WORD.encode() not in bytes_below(tmp_path / "mlflow")


def test_mlflow_gets_text_when_asked(config, train, mlflow_files, tmp_path):
    assert train(config("mlflow", sample_text=2)) == 0
    [samples] = (tmp_path / "mlflow").rglob("samples.json")
    texts = json.loads(samples.read_text())
    assert len(texts) == 2
    assert all(WORD in text for text in texts)


def test_a_run_that_goes_on_goes_on_there_without_a_step_twice(config, train, mlflow_files, tmp_path):
    assert train(config("mlflow", steps=2, sample_text=1)) == 0
    longer = config("mlflow", steps=4, sample_text=1)
    # As after a kill: the tracker has steps that the folder does not know of any more.
    with tracking.opened(longer, []) as trackers:
        trackers[0].log("train", 3, dict.fromkeys(FIELDS, 7.0))
        trackers[0].log("skip", 3, {"skipped_steps": 1})
        trackers[0].close(failed=True)
    assert train(longer) == 0
    assert [step for step, _ in metric_history(longer, "train/loss")] == [1, 2, 3, 4]
    assert [step for step, _ in metric_history(longer, "eval/eval_loss")] == [0, 2, 4]
    assert len(list((tmp_path / "mlflow").rglob("samples.json"))) == 1


def test_a_tracker_without_its_package_is_refused_before_any_work(config, train, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # which Python would import, as a package without files
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run = config("wandb")
    with pytest.raises(BadInput, match=r"log\.trackers: wandb is not installed; run: pip install 'trivet\[track\]'"):
        train(run)
    assert not run.run.folder.exists()


def test_text_for_no_tracker_is_refused():
    with pytest.raises(ValueError, match="sample_text 3 found, but trackers is empty"):
        Log(sample_text=3)


class Broken:
    """A tracker whose server went away after one line."""

    name, id = "broken", "1"

    def __init__(self) -> None:
        self.got: list[int] = []

    def log(self, kind, step, fields) -> None:
        self.got.append(step)
        if len(self.got) > 1:
            raise ConnectionError("https://user:password@host")

    def text(self, samples) -> None: ...

    def close(self, *, failed) -> None:
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_midway_is_given_up_and_the_run_is_not(tmp_path, capfd):
    broken = Broken()
    with RunLog(tmp_path, start_step=0, total_steps=3, every=1, tensorboard=False, trackers=[broken]) as log:
        for step in (1, 2, 3):
            log.train(step, loss=1.0, tokens_per_s=1.0)
    assert broken.got == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    said = capfd.readouterr().err
    assert "broken: ConnectionError: it gets no more of this run" in said
    assert "password" not in said


class Refusing(Broken):
    def __init__(self, config, known) -> None:
        raise ConnectionError("no route to https://user:password@host/api\nand more")


def test_a_tracker_that_cannot_start_is_bad_input_without_its_password(config, train, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", Refusing)
    monkeypatch.setattr(tracking, "check", lambda log: None)
    run = config("mlflow")
    with pytest.raises(BadInput) as refused:
        train(run)
    assert str(refused.value) == (
        "log.trackers: mlflow cannot start (ConnectionError: no route to https://***@host/api); "
        "set MLFLOW_TRACKING_URI to a server that answers, or leave it out"
    )
    status = json.loads((run.run.folder / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 2)


class Made(Broken):
    """A tracker that starts, and leaves a folder in the run's as wandb does."""

    made: ClassVar[list["Made"]] = []

    def __init__(self, config, known) -> None:
        super().__init__()
        self.known, self.closed = known, []
        (config.run.folder / "made").mkdir(exist_ok=True)
        self.made.append(self)

    def log(self, kind, step, fields) -> None: ...

    def close(self, *, failed) -> None:
        self.closed.append(failed)


@pytest.fixture
def trackers_made(monkeypatch):
    """The trackers that were started; wandb starts, mlflow does not."""
    monkeypatch.setattr(Made, "made", [])
    monkeypatch.setattr(tracking, "TRACKERS", {"wandb": Made, "mlflow": Refusing})
    monkeypatch.setattr(tracking, "check", lambda log: None)
    return Made.made


def test_a_tracker_that_could_not_start_does_not_lock_the_run_out(config, train, monkeypatch, trackers_made):
    with pytest.raises(BadInput, match="mlflow cannot start"):
        train(config("wandb", "mlflow"))
    assert [tracker.closed for tracker in trackers_made] == [[True]]
    assert train(config("wandb")) == 0
    assert [tracker.known for tracker in trackers_made] == [None, "1"]
    assert trackers_made[1].closed == [False]


@pytest.mark.parametrize("place", ["config.yaml", "trackers.json", "metrics.jsonl"])
def test_a_full_disk_at_the_start_leaves_no_tracker_running_and_no_lock(
    config, train, monkeypatch, trackers_made, place
):
    write = directory.write_text

    def full(path, text):
        if path.name == place:
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_text", full)
        with pytest.raises(BadInput, match=r"run\.dir: .* cannot be written \(No space left on device\)"):
            train(config("wandb"))
    assert [tracker.closed for tracker in trackers_made] == ([] if place == "config.yaml" else [[True]])
    assert train(config("wandb")) == 0


@pytest.mark.parametrize("text", ['{"wandb": ', "[1]", "\udcff"])
def test_a_broken_trackers_json_is_one_line(config, train, trackers_made, text):
    run = config("wandb", steps=2)
    assert train(run) == 0
    path = run.run.folder / "trackers.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput, match=r"trackers\.json: cannot be read \(.*\); remove it") as refused:
        train(config("wandb", steps=4))
    assert "\n" not in str(refused.value)
    assert len(trackers_made) == 1


def test_a_trackers_json_of_a_newer_trivet_is_refused(config, train, trackers_made):
    run = config("wandb", steps=2)
    assert train(run) == 0
    path = run.run.folder / "trackers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 999}))
    with pytest.raises(NewerFormat, match=r"trackers\.json: "):
        train(config("wandb", steps=4))
    assert len(trackers_made) == 1
