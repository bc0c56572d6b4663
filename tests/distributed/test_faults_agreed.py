"""Ranks that are not of one mind refuse to start, and both values and both ranks are named. One launch shows all."""

import json
import re
import socket

import pytest

HOST = socket.gethostname()
TIMEOUT_S = 8  # less than rank 1 takes to tokenise: see disagreeing.py


@pytest.fixture(scope="module")
def seen(modes):
    """What each rank of the launch said to each difference."""
    texts = (modes.folder / "train.jsonl").read_text().splitlines(keepends=True)
    for rank in (0, 1):
        folder = modes.folder / f"rank-{rank}"
        folder.mkdir()
        (folder / "mine.jsonl").write_text("".join(texts[rank:]))
    run = {"dir": "runs", "timeout_s": TIMEOUT_S}
    never = modes.config("never", run=run, data={"train": "mine.jsonl"})
    slow = modes.config("slow", run={"timeout_s": TIMEOUT_S})
    return modes.launch_script("ddp", "disagreeing.py", never, slow)


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("config", "optim.lr: 0.01 found on rank 0 ({0}) and 0.5 on rank 1 ({0}); accepted: the same on every rank"),
        ("world", "WORLD_SIZE: 2 found on rank 0 ({0}) and 3 on rank 1 ({0}); accepted: the same on every rank"),
        ("folder", "run.dir: runs found on rank 0 ({0}) and another runs, without the file that rank 0 made there, on"),
    ],
)
def test_ranks_that_differ_refuse_to_start_and_name_both_values_and_ranks(seen, subject, said):
    for rank in seen["ranks"]:
        assert rank[subject].startswith(said.format(HOST))


def test_ranks_with_other_versions_refuse_to_start(seen):
    for rank in seen["ranks"]:
        assert f" found on rank 0 ({HOST}) and " in rank["code"]
        assert rank["code"].endswith("accepted: the same on every rank; install the same on every machine")


def test_ranks_with_other_data_refuse_to_start(seen):
    for rank in seen["ranks"]:
        assert rank["data"].startswith("train data (mine.jsonl): ")
        assert rank["data"].endswith("accepted: the same on every rank; give every machine the same files")
        assert f" on rank 1 ({HOST})" in rank["data"]


def test_what_is_refused_leaves_nothing_behind(seen):
    assert [rank["left"] for rank in seen["ranks"]] == [["mine.jsonl"]] * 2


def test_tokenising_may_take_longer_than_a_collective(seen, modes):
    assert [rank["slow"] for rank in seen["ranks"]] == [0, 0]
    status = json.loads((modes.run_folder("slow") / "status.json").read_text())
    assert status["state"] == "done"


def test_who_waits_for_a_rank_that_prepares_says_so_and_after_a_while_where_that_rank_is(seen):
    said = [line for line in seen["log"].splitlines() if line.startswith("waiting for rank 1, still preparing")]
    assert said[0] == "waiting for rank 1, still preparing"
    assert re.match(r".*; rank 1 is in slow_feed \(disagreeing.py:\d+\), called by build \(build.py:\d+\),", said[1])
