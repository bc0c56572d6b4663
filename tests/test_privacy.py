"""Nothing goes home unasked, and no secret of the environment goes anywhere: commands run as by a user."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch import politeness
from trainer import loop, run_folder
from trainer.redact import redacted

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "samples" / "format_1" / "sample.tar.xz"
CANARY = "canary7f3a9b"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}",
    "WANDB_API_KEY": (CANARY * 4)[:40],
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "DATABASE_PASSWORD": CANARY,
    "HF_ENDPOINT": f"http://user:{CANARY}@127.0.0.1:9",
    "PIP_INDEX_URL": f"https://user:{CANARY}@127.0.0.1:9/simple",
    "MLFLOW_TRACKING_URI": f"http://user:{CANARY}@127.0.0.1:9",
}
PROXY = {"HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9", "HTTP_PROXY": f"http://user:{CANARY}@127.0.0.1:9"}


@pytest.fixture
def here(tmp_path) -> Path:
    """A working folder with a tiny run (`run`, `onnx`, make.yaml, chats.jsonl), beside a `home` and a `tmp`."""
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(tmp_path / "work", filter="data")
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path / "work"


@pytest.fixture
def environment(here) -> dict[str, str]:
    """What a shell on a fresh machine has."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "PYTHONPATH") if name in os.environ}
    return {**kept, "HOME": str(here.parent / "home"), "TMPDIR": str(here.parent / "tmp")}


@pytest.fixture
def run(here, environment):
    """Return a function that runs `trivet ARGUMENTS` in a process of its own -> (exit code, all that it printed)."""

    def start(*arguments: str, env: dict[str, str] | None = None, before: tuple[str, ...] = ()) -> tuple[int, str]:
        command = [*before, sys.executable, "-m", "trivet", *arguments]
        done = subprocess.run(
            command, cwd=here, env={**environment, "PYTHONPATH": str(ROOT), **(env or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
        )  # fmt: skip
        return done.returncode, done.stdout

    return start


def files_with(needle: str, folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file() and needle.encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in found]


# --- nothing goes home -----------------------------------------------------------------------------------------------


def python(code: str, environment: dict[str, str]) -> str:
    env = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


APPLY = "from launch import politeness; politeness.apply(); "


def test_the_hub_client_reports_nothing(environment):
    code = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert python(APPLY + code, environment) == "True"
    assert python(code, environment) == "False"  # so it is us who turn it off


def test_transformers_asks_no_service_to_convert_a_model(environment):
    code = "from transformers.utils import import_utils as u; print(u.is_env_variable_true('%s'))"
    code %= "DISABLE_SAFETENSORS_CONVERSION"
    assert python(APPLY + code, environment) == "True"


def test_ray_reports_no_usage(environment):
    pytest.importorskip("ray")
    code = "from ray._common.usage import usage_lib; print(usage_lib.usage_stats_enabled())"
    assert python(APPLY + code, environment) == "False"
    assert python(code, environment) == "True"


def test_mlflow_reports_no_usage(environment):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    code = "from mlflow.telemetry import utils; print(utils.is_telemetry_disabled())"
    assert python(APPLY + code, environment) == "True"


def test_wandb_reports_no_crashes(environment):
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = "from wandb import env; print(env.error_reporting_enabled())"
    assert python(APPLY + code, environment) == "False"
    assert python(code, environment) == "True"


@pytest.mark.parametrize("module", ["launch.cli", "launch.train"])
def test_both_entries_turn_it_off_before_anything_heavy_is_imported(environment, module):
    code = f"""
import os, sys
import {module}
heavy = [name for name in ("torch", "transformers", "ray", "onnxruntime", "huggingface_hub") if name in sys.modules]
sys.argv = ["trivet"]
try:
    {module}.main()
except SystemExit:
    pass
print(heavy, [name for name in {sorted(politeness.MANNERS)} if name not in os.environ])
"""
    assert python(code, environment).splitlines()[-1] == "[] []"


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    politeness.apply()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_an_engine_without_the_command_line_sends_nothing_either(environment):
    assert python("import serving.session, os; print(os.environ['ORT_DISABLE_TELEMETRY'])", environment) == "1"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("strace") and shutil.which("unshare")) or os.geteuid() != 0,
    reason="needs root, unshare and strace, to take the network away and to see who asks for it",
)
def test_no_command_needs_the_network_or_tries_it(here, run):
    watched = ("unshare", "-n", "strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(here / "calls.txt"))
    for command in (
        ["train", "make.yaml", "run.name=new", "log.tensorboard=true"],
        ["report", "new"],
        ["export", "new", "new-onnx"],
        ["generate", "new-onnx", "--prompt", "x", "--max-new-tokens", "2"],
    ):
        code, said = run(*command, before=watched)
        assert code == 0, said
        calls = [line for line in (here / "calls.txt").read_text().splitlines() if "AF_INET" in line]
        assert not calls, (command, calls)


# --- nothing is left behind ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_day_of_work_leaves_nothing_outside_its_folder_but_caches_and_what_torch_leaves(here, run):
    run("train", "make.yaml", "run.name=new", "log.tensorboard=true")
    run("export", "new", "new-onnx")
    run("generate", "new-onnx", "--prompt", "x", "--max-new-tokens", "2")
    run("report", "new")
    run("doctor")
    left = [path for name in ("home", "tmp") for path in (here.parent / name).rglob("*") if path.is_file()]
    outside = {str(path.relative_to(here.parent)) for path in left}
    caches = ("home/.cache/matplotlib/", "home/.cache/trivet/")
    assert {name for name in outside if not name.startswith(caches)} == set()
    assert {path.name for path in (here.parent / "tmp").iterdir()} <= {
        "torchinductor_" + os.environ.get("USER", "root")
    }


def test_an_export_names_no_folder_of_the_machine_that_made_it(here, run):
    code, said = run("export", "run", "new-onnx")
    assert code == 0, said
    for folder in (str(ROOT), str(here), sys.prefix, "site-packages"):
        assert files_with(folder, here / "new-onnx") == []


# --- no secret gets out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at http://user:secret@host:9/api, y", "at http://***@host:9/api, y"),
        ("at http://user:p@secret@host:9.", "at http://***@host:9."),
        ("'http://user:a/secret@host/x' and a@b", "'http://***@host/x' and a@b"),
        ("git+https://secret@host/x?y", "git+https://***@host/x?***"),
        ("needs http://host/x?token=secret, which", "needs http://host/x?***, which"),
        ("url: /x?a=1&token=secret/api/models (Caused by", "url: /x?*** (Caused by"),
        ("http://host/#access_token=secret", "http://host/#***"),
        ("Really? See https://docs.x.org/a.html#b, a@b.org", "Really? See https://docs.x.org/a.html#b, a@b.org"),
    ],
)
def test_an_address_is_shown_without_its_user_and_its_query(text, expected):
    assert redacted(text) == expected


@pytest.mark.parametrize(
    ("name", "value", "leaks"),
    [
        ("HF_TOKEN", CANARY, CANARY),
        ("my_credentials", f"  {CANARY}\n", CANARY),
        ("DB_PASSWORD", f"a'{CANARY}\\", repr(f"a'{CANARY}\\")[1:-1]),
        ("SIGNING_KEY", f"-----\n{CANARY}\n-----", json.dumps(f"-----\n{CANARY}\n-----")),
        ("ALL_PROXY", f"user:p%40{CANARY}@proxy:3128", f"p@{CANARY} p%40{CANARY}"),
        ("PIP_INDEX_URL", f"https://user:a/{CANARY}@host/", f"port '{CANARY}'"),
        ("HF_ENDPOINT", f"http://user:p@{CANARY}@host", f"no such host: {CANARY}"),
        ("DATABASE_URL", f"https://host/x?mode=1&sslkey={CANARY}", f"sslkey is {CANARY}"),
    ],
    ids=map(str, range(8)),  # pytest puts them into the environment
)
def test_a_secret_of_the_environment_is_hidden_wherever_it_stands(monkeypatch, name, value, leaks):
    assert CANARY in redacted(leaks)
    monkeypatch.setenv(name, value)
    assert CANARY not in redacted(f"told: {leaks}, so")


def test_words_and_paths_are_no_secrets(monkeypatch):
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false", "PATH": "/usr/bin:/opt/node@18/bin", "EMAIL": "some.body@host.org",
        "REPOSITORY": "https://host.org/some/path", "BRANCH": "git@host.org:some/path",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    text = "false: /opt/node, some.body, some/path, git: host.org"
    assert redacted(text) == text


def test_a_status_tells_no_password(tmp_path):
    run_folder.write_status(tmp_path, "failed", code=1, step=0, reason=f"no http://user:{CANARY}@host/")
    assert read_reason(tmp_path) == "no http://***@host/"


def read_reason(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["reason"]


def test_a_run_that_fails_with_a_secret_in_its_error_tells_it_nowhere(here, trivet, monkeypatch):
    """The error is as a client of the hub or of a tracker words it: the address, and what it took for the host."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    text = f"no answer from http://user:p@{CANARY}@host/x?key={CANARY}, key {CANARY}"

    def fail(*args: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(loop, "run_steps", fail)
    code, out, err = trivet("train", "make.yaml", "run.name=new")
    assert (code, read_reason(here / "new")) == (1, "RuntimeError('no answer from http://***@host/x?***, key ***')")
    assert "Traceback" in err
    assert err.splitlines()[-1] == "error: no answer from http://***@host/x?***, key ***"
    assert CANARY not in out + err
    assert files_with(CANARY, here) == []


@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=["train", "dry run"])
@pytest.mark.parametrize("userinfo", [f"user:{CANARY}/ABC", f"{CANARY}:p?w"], ids=["slash", "question mark"])
def test_a_mirror_whose_address_is_broken_is_one_line_without_its_password(here, run, userinfo, extra):
    """In a process of its own: with such an address the hub client cannot even be imported."""
    code, said = run("train", "make.yaml", "run.name=new", *extra, env={"HF_ENDPOINT": f"http://{userinfo}@host"})
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: HF_ENDPOINT: http://***@host found; accepted: http(s)://host or http(s)://host:port")
    assert CANARY not in said
    assert not (here / "new").exists()


@pytest.mark.slow
def test_no_secret_of_the_environment_is_printed_or_written(here, run):
    said = []
    for code, *command in (
        (0, "train", "make.yaml", "run.name=new", "log.tensorboard=true"),
        (0, "train", "make.yaml", "run.name=two", "--nproc", "2"),
        (0, "report", "new", "two"),
        (0, "export", "new", "new-onnx"),
        (0, "generate", "new-onnx", "--prompt", "x", "--max-new-tokens", "2"),
        (None, "doctor", "--json"),
        (None, "doctor"),
    ):
        found, output = run(*command, env=SECRETS | PROXY)
        assert code is None or found == code, output
        said.append(output)
    assert [output for output in said if CANARY in output] == []
    assert files_with(CANARY, here.parent) == []


LORA = ["model.type=pretrained", "tokenizer.type=pretrained", "strategy.type=lora"]


AT_HUB = {
    "mirror": {},
    "proxy": PROXY,
    "at": {"HF_ENDPOINT": f"http://user:p@{CANARY}@127.0.0.1:9"},
    "slash": {"HF_ENDPOINT": f"http://user:{CANARY}/ABC@127.0.0.1:9"},
    "query": {"HF_ENDPOINT": f"http://127.0.0.1:9/x?token={CANARY}"},
}


@pytest.mark.parametrize("extra", AT_HUB.values(), ids=AT_HUB.keys())
@pytest.mark.slow
def test_a_run_that_fails_at_the_hub_tells_no_password(here, run, extra):
    code, said = run("train", "make.yaml", "run.name=new", *LORA, "model.path=no/such", env=SECRETS | extra)
    assert code == 2, said
    assert said.count("\n") == 1
    assert "no/such" in said or "HF_ENDPOINT: " in said
    assert CANARY not in said
    assert files_with(CANARY, here.parent) == []


@pytest.mark.slow
def test_a_sweep_keeps_the_secrets_too(here, run):
    pytest.importorskip("ray")
    (here / "sweep.yaml").write_text(
        "sweep: {name: compare}\nbase: make.yaml\nstrategies:\n  scratch: {optim: {lr: [1.0e-3, 1.0e-2]}}\n"
    )
    code, said = run("sweep", "sweep.yaml", env=SECRETS)
    assert (code, said.count("\n")) == (2, 1), said
    assert "TMPDIR" in said  # this test's is too long a path for a socket
    with tempfile.TemporaryDirectory(prefix="t") as short:
        code, said = run("sweep", "sweep.yaml", env={**SECRETS, "TMPDIR": short})
        assert code == 0, said
        assert files_with(CANARY, Path(short)) == []
    assert CANARY not in said
    assert files_with(CANARY, here.parent) == []
    assert not list((here.parent / "home").rglob("auth_token"))


@pytest.mark.slow
def test_a_server_logs_neither_its_keys_nor_the_secrets_around_it(here, environment, tmp_path):
    subprocess.run([sys.executable, "-m", "trivet", "verify", "onnx"], cwd=here, env=environment, check=True)
    keys = tmp_path / "keys.txt"
    keys.write_text(f"key-{CANARY}\n")
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "trivet", "serve", "onnx", "--port", "0", "--api-key-file", str(keys)]
    with log.open("w") as output:
        server = subprocess.Popen(command, cwd=here, env=environment | SECRETS, stdout=output, stderr=output)
    try:
        url = wait_for(lambda: re.search(r"http://\S+", log.read_text()), server)[0]
        answers = [ask(url, "/v1/completions", key=f"key-{CANARY}"), ask(url, "/v1/completions", key="wrong")]
        answers += [ask(url, path, key=f"key-{CANARY}") for path in ("/metrics", "/health", "/v1/models", "/")]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert [status for status, _ in answers[:2]] == [200, 401]
    assert [text for _, text in answers if CANARY in text] == []
    keys.unlink()
    assert files_with(CANARY, tmp_path) == []


def wait_for(found, server):
    deadline = time.monotonic() + 60
    while not (result := found()):
        assert server.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def ask(url: str, path: str, *, key: str) -> tuple[int, str]:
    body = json.dumps({"model": "onnx", "prompt": "x", "max_tokens": 2}).encode() if "completions" in path else None
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body, headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- offline ---------------------------------------------------------------------------------------------------------


def test_offline_a_model_that_is_not_cached_is_one_clear_line_at_once(here, run):
    code, said = run("train", "make.yaml", "run.name=new", *LORA, "model.path=no/such", env={"HF_HUB_OFFLINE": "1"})
    assert (code, said.count("\n")) == (2, 1), said
    assert "model.path: no/such" in said
    assert "HF_HUB_OFFLINE" in said
    assert not (here / "new").exists()


@pytest.mark.slow
def test_offline_a_cached_model_is_trained_and_exported(here, run):
    """The cache entry is laid out by hand, as the hub client lays it out."""
    entry = here.parent / "home" / ".cache" / "huggingface" / "hub" / "models--some--tiny"
    shutil.copytree(here / "run" / "model", entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    offline = {"HF_HUB_OFFLINE": "1"}
    code, said = run("train", "make.yaml", "run.name=new", *LORA, "model.path=some/tiny", env=offline)
    assert code == 0, said
    for command in (["export", "new", "new-onnx"], ["report", "new"], ["verify", "new-onnx"]):
        code, said = run(*command, env=offline)
        assert code == 0, said
