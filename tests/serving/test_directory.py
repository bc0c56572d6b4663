"""Directories on disk: what is refused, and that no killed process leaves its half behind for ever."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.directory import DirectoryError, check_files, identity, seal, sha256, staged, write_json
from serving.proofs import append_verification, require_verified

REPOSITORY = Path(__file__).parents[2]
STAGE = """
import sys
from pathlib import Path
from serving.directory import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def sealed(tmp_path) -> Path:
    folder = tmp_path / "sealed"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_text("1")
    seal(folder, "model")
    return folder


def manifest(folder: Path) -> dict:
    return seal(folder, "model")


def test_a_file_that_the_manifest_does_not_list_is_refused(sealed):
    listed = manifest(sealed)
    (sealed / "verification.json").write_text("{}")
    (sealed / ".verification.json.0123abcd.partial").write_text("of a killed process")
    check_files(sealed, listed)
    extra = sealed / "adapter" / "other"
    extra.write_text("2")
    with pytest.raises(DirectoryError, match=r"adapter/other: trivet\.json does not list it; remove it"):
        check_files(sealed, listed)
    extra.unlink()
    extra.symlink_to("/nowhere")
    with pytest.raises(DirectoryError, match="adapter/other"):
        check_files(sealed, listed)


def test_a_file_that_may_not_be_read_is_named(sealed):
    user, weights = os.geteuid(), sealed / "adapter" / "weights"
    if user:
        weights.chmod(0)
    else:
        os.seteuid(65534)  # who may not look into the tests' own folders
    try:
        with pytest.raises(
            DirectoryError, match="weights: cannot be read \\(Permission denied\\); mend its permissions"
        ):
            sha256(weights)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("files", [None, [], "x"])
def test_a_manifest_without_files_is_refused(sealed, files):
    with pytest.raises(DirectoryError, match="lists no files"):
        check_files(sealed, {"files": files})


@pytest.mark.parametrize("content", ["[]", "{", "5", "{}", '{"records": 5}', '{"records": [5]}'])
def test_a_broken_verification_is_an_error_that_verifying_again_mends(sealed, content):
    (sealed / "verification.json").write_text(content)
    with pytest.raises(DirectoryError, match=r"verification\.json: cannot be read .*; run: trivet verify"):
        require_verified(sealed, "cpu", "1")
    record = {"provider": "cpu", "onnxruntime": "1", "identity": identity(sealed), "passed": True}
    append_verification(sealed, record)
    assert require_verified(sealed, "cpu", "1") == record


def stage_in_a_process(final: Path) -> tuple[subprocess.Popen, Path]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(final)], env=environment, text=True, stdin=-1, stdout=-1
    )
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_behind_is_removed_and_what_a_live_one_holds_is_not(tmp_path):
    final = tmp_path / "on[n]x"
    (killed, stale), (live, held) = stage_in_a_process(final), stage_in_a_process(final)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert stale.is_dir()
    with staged(final) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, held])
    live.communicate()
    assert (live.returncode, [path.name for path in tmp_path.iterdir()]) == (0, ["on[n]x"])
    assert (final / "half").exists()


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path):
    write_json(tmp_path / "file", 1)
    with pytest.raises(DirectoryError, match="file/final: cannot be written"), staged(tmp_path / "file" / "final"):
        pass
