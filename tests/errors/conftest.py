"""A folder to stand in, with a tiny run and its export; the real command as a process; and how an error must look."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
run: {name: tiny, steps: 4}
objective: {type: causal_lm}
model: {type: new, hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2,
        context_length: 128}
tokenizer: {type: train, vocab_size: 320}
data: {type: files, train: text.txt, validation_fraction: 0.3}
strategy: {type: scratch}
batch: {rows: 2, max_length: 64}
checkpoint: {every: 2}
log: {tensorboard: false}
"""
LINES = [f"The {noun} reads line {i} of the file and returns it." for i, noun in enumerate(["cat", "dog", "bird"] * 15)]


@pytest.fixture(scope="session")
def _made(tmp_path_factory) -> Path:
    """A folder with tiny.yaml, text.txt, the finished runs/tiny and its ONNX directory, made once."""
    import torch

    from launch import train
    from serving.export import export_model

    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("\n".join(LINES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["tiny.yaml"]) == 0
        export_model(folder / "runs" / "tiny", folder / "onnx")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def work(_made, tmp_path, monkeypatch) -> Path:
    """A new folder, where the test stands, with the config, the data and links to the run's model and its export."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("tiny.yaml", "text.txt"):
        (folder / name).write_bytes((_made / name).read_bytes())
    (folder / "onnx").symlink_to(_made / "onnx")
    (folder / "model").symlink_to(_made / "runs" / "tiny" / "model")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def made_run(_made) -> Path:
    """The finished run folder, to be read only."""
    return _made / "runs" / "tiny"


@pytest.fixture
def contents():
    """Return a function that lists every file below a folder with its size and time, to see that nothing changed."""

    def look(folder: Path) -> dict[str, tuple[int, int]]:
        stats = {str(path.relative_to(folder)): path.lstat() for path in sorted(folder.rglob("*"))}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    return look


@pytest.fixture
def refused(trivet, work, contents):
    """Return a function that runs `trivet ARGUMENTS`, which must end in one line, exit code 2 and nothing written."""

    def run(*arguments: object) -> str:
        before = contents(work)
        code, out, err = trivet(*arguments)
        assert (code, out) == (2, ""), err
        assert contents(work) == before, "something was written"
        return the_error(err, alone=True)

    return run


@pytest.fixture
def command():
    """Return a function that runs the real command in a process; `limits` are its rlimits, `module` goes after -m."""

    def run(*arguments: object, module: str = "trivet", limits=(), env=None, timeout_s=600, **options):
        def lower():
            for name, value in limits:
                resource.setrlimit(name, (value, value))

        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            preexec_fn=lower,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def error_of():
    """The function that returns the error in what a command printed, and checks how it looks."""
    return the_error


def the_error(err: str, *, alone: bool = False) -> str:
    """Return the one line `error: ...`, the last one; `alone`: nothing else may be printed."""
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    assert not alone or len(lines) == 1, err
    return lines[-1].removeprefix("error: ")


@pytest.fixture
def write_rows():
    """Return a function that writes rows as a .jsonl file."""

    def write(path: Path, rows: list[dict]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
