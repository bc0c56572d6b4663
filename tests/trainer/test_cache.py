"""The cache: built once, by one process, and never believed when it is not as it was written."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.directory import BadInput
from trainer import cache

ROOT = Path(__file__).resolve().parents[2]
KEY = "0" * 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def build():
    """Return a function that gives the entry, and the list of the folders that it built."""
    built = []

    def fill(folder: Path) -> dict[str, int]:
        built.append(folder)
        (folder / "numbers.values").write_bytes(bytes(range(100)))
        return {"numbers": 100}

    def entry() -> tuple[Path, dict[str, int]]:
        return cache.entry("examples", KEY, fill)

    return entry, built


def test_an_entry_is_built_once_and_found_by_its_key(build, own_cache):
    entry, built = build
    first, second = entry(), entry()
    assert first == second == (own_cache / "examples" / KEY, {"numbers": 100})
    assert (first[0] / "numbers.values").read_bytes() == bytes(range(100))
    assert len(built) == 1
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700  # examples are what data are made of


def test_keys_differ_where_anything_differs():
    keys = [cache.key_of(a=1), cache.key_of(a=2), cache.key_of(b=1), cache.key_of(a=1, b=None), cache.key_of(a="1")]
    assert len(set(keys)) == len(keys)
    assert cache.key_of(a=1, b=[2, {"c": 3}]) == cache.key_of(b=[2, {"c": 3}], a=1)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "numbers.values", 50)


def alter(folder: Path) -> None:
    path = folder / "numbers.values"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def remove(folder: Path) -> None:
    (folder / "numbers.values").unlink()


def alter_what_was_said(folder: Path) -> None:
    (folder / "about.json").write_text('{"numbers": 7}')


def break_manifest(folder: Path) -> None:
    (folder / "trivet.json").write_text("{")


def lose_manifest(folder: Path) -> None:
    (folder / "trivet.json").unlink()


@pytest.mark.parametrize(
    "damage", [cut_short, alter, remove, alter_what_was_said, break_manifest, lose_manifest], ids=lambda f: f.__name__
)
def test_an_entry_that_is_not_as_it_was_written_is_built_again(build, damage):
    entry, built = build
    folder, about = entry()
    damage(folder)
    assert entry() == (folder, about)
    assert (folder / "numbers.values").read_bytes() == bytes(range(100))
    assert len(built) == 2


def test_an_entry_that_was_only_copied_is_hashed_and_not_built_again(build, monkeypatch):
    entry, built = build
    folder, _ = entry()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    hashed = []
    check = cache.directory.check_files
    monkeypatch.setattr(cache.directory, "check_files", lambda *args: (hashed.append(args[0]), check(*args)))
    entry(), entry()
    assert (len(built), hashed) == (1, [folder])  # and only once


def test_a_build_that_fails_leaves_nothing_and_the_next_one_succeeds(build, own_cache):
    def fail(folder: Path) -> None:
        (folder / "numbers.values").write_bytes(b"half")
        raise BadInput("data: row 7: mend it")

    with pytest.raises(BadInput, match="row 7"):
        cache.entry("examples", KEY, fail)
    assert [path.name for path in (own_cache / "examples").iterdir()] == [f".{KEY}.lock"]
    entry, built = build
    entry()
    assert len(built) == 1


CHILD = """
import os, signal, sys, time
from trainer import cache

def build(folder):
    print("building", flush=True)
    (folder / "numbers.values").write_bytes(b"half")
    if "wait" in sys.argv:
        sys.stdin.readline()
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    (folder / "numbers.values").write_bytes(bytes(range(100)))
    return {"numbers": 100}

folder, about = cache.entry("examples", "0" * 32, build)
print("got", len((folder / "numbers.values").read_bytes()), about["numbers"], flush=True)
"""


def start(*arguments: str) -> subprocess.Popen:
    """A process that asks for the entry: once it builds, it says so, and may `wait` for a word, or `die`."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def test_one_of_several_processes_builds_and_the_others_wait_for_it():
    outputs = [process.communicate(timeout=600)[0] for process in [start() for _ in range(4)]]
    assert sum("building" in output for output in outputs) == 1
    assert all(output.endswith("got 100 100\n") for output in outputs)


def test_after_kill_9_in_a_build_the_next_process_builds_at_once(own_cache):
    killed = start("wait", "die")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "building\n"
    waiting = start()
    killed.communicate("\n", timeout=600)
    assert killed.returncode == -signal.SIGKILL
    assert waiting.communicate(timeout=600)[0] == "building\ngot 100 100\n"
    assert start().communicate(timeout=600)[0] == "got 100 100\n"
    left = {path.name for path in (own_cache / "examples").iterdir()}
    assert left == {KEY, f"{KEY}.seen.json", f".{KEY}.lock"}


def test_whoever_waits_long_says_so():
    first = start("wait")
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = start()
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for another process that prepares the same data\n"
    first.communicate("\n", timeout=600)
    assert second.communicate(timeout=600) == ("got 100 100\n", "")


def test_a_fact_is_found_once_and_found_again_where_it_is_altered(own_cache):
    found = []

    def find() -> dict:
        found.append(1)
        return {"rows": 3, "places": ("a", "b")}

    expected = {"rows": 3, "places": ["a", "b"]}
    assert [cache.fact(KEY, find), cache.fact(KEY, find)] == [expected, expected]
    assert len(found) == 1
    path = own_cache / "facts" / f"{KEY}.json"
    kept = json.loads(path.read_text())
    for content in (json.dumps(kept | {"value": {"rows": 4, "places": []}}), "{", "[]", ""):
        path.write_text(content)
        assert cache.fact(KEY, find) == expected
    assert len(found) == 5


def test_what_no_run_asked_for_in_a_month_is_removed_when_something_new_is_built(build, own_cache):
    entry, _ = build
    old, _ = cache.entry("tokenizers", "1" * 32, lambda folder: None)
    asked_for, _ = cache.entry("tokenizers", "2" * 32, lambda folder: None)
    for key in ("3" * 32, "4" * 32):
        cache.fact(key, lambda: 1)
    month_ago = time.time() - 31 * 24 * 3600
    for path in own_cache.rglob("*.json"):
        os.utime(path, (month_ago, month_ago))
    cache.entry("tokenizers", "2" * 32, lambda folder: None)
    cache.fact("4" * 32, lambda: 1)
    entry()
    assert not old.exists()
    assert asked_for.is_dir()
    assert [path.name for path in (own_cache / "facts").glob("*.json")] == ["4" * 32 + ".json"]


def test_a_large_file_is_hashed_again_only_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SMALL_FILE_BYTES", 10)
    path, hashed = tmp_path / "data.jsonl", []
    sha256 = cache.directory.sha256
    monkeypatch.setattr(cache.directory, "sha256", lambda path: (hashed.append(path), sha256(path))[1])
    path.write_text("a" * 100)
    first = cache.file_hash(path)
    assert cache.file_hash(path) == first
    assert len(hashed) == 1
    time.sleep(0.01)
    path.write_text("b" * 100)  # of the same size
    assert cache.file_hash(path) != first
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(build, tmp_path, monkeypatch):
    entry, _ = build
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match=r"TRIVET_CACHE: .*file/examples cannot be written \(File exists\).*another"):
        entry()


def test_a_full_disk_is_named_with_the_way_out():
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(BadInput, match=r"TRIVET_CACHE: .* cannot be written \(No space left on device\); free some"):
        cache.entry("examples", KEY, fill)


def test_an_error_of_the_data_is_not_taken_for_one_of_the_cache():
    def fail(folder: Path) -> None:
        raise ConnectionError("the hub does not answer")

    with pytest.raises(ConnectionError):
        cache.entry("examples", KEY, fail)


def test_a_home_that_cannot_be_written_is_replaced_by_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TRIVET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache.root() == tmp_path / "home" / "trivet"
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    own = cache.root()
    assert own == tmp_path / f"trivet-{os.getuid()}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.rmdir()
    own.symlink_to(tmp_path)  # another user could have made it
    with pytest.raises(BadInput, match="another user's"):
        cache.root()
