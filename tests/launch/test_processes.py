"""Groups of processes end as a whole, with the right exit code, whoever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import process_marks, processes
from launch.processes import Group
from serving.directory import BadInput
from trainer import status

# A rank that stops as the trainer does: a signal sets a flag, then it "saves", reports 75 and exits 0.
RANK = """
import os, pathlib, signal, subprocess, sys, time
from trainer.status import report_exit
folder = pathlib.Path(sys.argv[1])
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: stop.append(signal.Signals(number).name))
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as a data loader's worker
rank = os.environ.get("RANK", "0")
(folder / f"ready-{rank}").write_text(str(os.getpid()))
deadline = time.time() + 60
while not stop and time.time() < deadline:
    time.sleep(0.01)
(folder / f"saved-{rank}").write_text(stop[0])
helper_lives = helper.poll() is None
helper.kill()
helper.wait()
report_exit(75 if helper_lives else 1)
"""

# A launcher with two ranks in sessions of their own that, like accelerate's, dies of SIGUSR1 and SIGTERM.
LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen(
        [sys.executable, sys.argv[1], sys.argv[2]],
        start_new_session=True,
        env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r)},
    )
    for r in range(2)
]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""

RUN_GROUP = "import sys; from launch.processes import run_group; sys.exit(run_group(sys.argv[1:], {}))"


@pytest.fixture
def launcher(script, tmp_path, on_path):
    """The command of a launcher with two ranks."""
    rank = script(RANK, "rank.py")
    return [*script(LAUNCHER, "launcher.py"), rank[1], str(tmp_path)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_reaches_every_rank_past_the_launcher_and_nothing_below_them(launcher, tmp_path, number):
    with running(launcher, tmp_path, ranks=2) as trivet:
        trivet.send_signal(number)
        assert trivet.wait(timeout=600) == 75
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == [number.name] * 2


def test_a_second_interrupt_kills_the_whole_group(script, tmp_path, on_path):
    stubborn = script(RANK.replace("while not stop and", "while"), "rank.py")
    command = [*script(LAUNCHER, "launcher.py"), stubborn[1], str(tmp_path)]
    with running(command, tmp_path, ranks=2) as trivet:
        trivet.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert trivet.poll() is None
        trivet.send_signal(signal.SIGINT)
        assert trivet.wait(timeout=600) == 130


def test_ranks_whose_launcher_was_killed_do_not_live_on(launcher, tmp_path):
    with running(launcher, tmp_path, ranks=2) as trivet:
        [leader] = children(trivet.pid)
        os.kill(leader, signal.SIGKILL)
        assert trivet.wait(timeout=600) == 1


def test_a_run_whose_trivet_was_killed_is_told_to_stop(script, tmp_path, on_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # who is killed cleans nothing up
    with running([*script(RANK), str(tmp_path)], tmp_path, ranks=1) as trivet:
        trivet.kill()
        trivet.wait(timeout=600)
        wait_for(lambda: (tmp_path / "saved-0").exists())
    assert (tmp_path / "saved-0").read_text() == "SIGTERM"


@pytest.mark.parametrize(
    ("reported", "exit_status", "expected"),
    [
        (0, 0, 0),
        (2, 1, 2),
        (2, 2, 2),
        (75, 0, 75),
        (75, 75, 75),
        (130, 1, 130),
        (None, 1, 1),
        (None, 0, 0),
        (75, 1, 1),
        (None, -9, 1),
    ],
)
def test_the_exit_code_is_the_ranks_own_whatever_the_launcher_made_of_it(
    script, on_path, reported, exit_status, expected
):
    report = "" if reported is None else f"report_exit({reported}, 'why')"
    end = f"os.kill(os.getpid(), {-exit_status})" if exit_status < 0 else f"sys.exit({exit_status})"
    command = script(f"import os, sys\nfrom trainer.status import report_exit\n{report}\n{end}\n")
    with Group(command, {}) as group:
        assert group.wait() == expected
        assert group.error() == ("why" if reported is not None else "")


def test_a_group_is_empty_once_it_is_closed(launcher, tmp_path):
    group = Group(launcher, {})
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    assert len(group.members()) == 5  # a launcher, two ranks, a helper each
    assert len(group.ranks()) == 2
    group.close()
    assert group.members() == []


def test_reporting_outside_a_group_does_nothing(monkeypatch):
    monkeypatch.delenv(status.EXIT_FOLDER, raising=False)
    status.report_exit(75)


def test_the_accelerate_command_names_config_world_and_overrides(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 0)
    monkeypatch.setattr(processes, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    argv, env = processes.accelerate_command(Path("x.yaml"), ["run.steps=3"], nproc=2, parallel="ddp")
    assert argv[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert argv[4].endswith("configs/accelerate/ddp.yaml")
    assert argv[5:] == ["--num_processes", "2", "-m", "launch.train", "x.yaml", "run.steps=3"]
    assert env == {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true"}
    assert processes.show_command(argv, env).startswith("OMP_NUM_THREADS=4 DS_ACCELERATOR=cpu ACCELERATE_USE_CPU=true ")


def test_zero2_without_a_gpu_asks_for_deepspeeds_cpu_and_not_for_accelerates(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 0)
    _, env = processes.accelerate_command(Path("x.yaml"), [], nproc=2, parallel="zero2")
    assert env["DS_ACCELERATOR"] == "cpu"
    assert "ACCELERATE_USE_CPU" not in env


def test_a_machine_with_gpus_gets_no_cpu_switch(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 4)
    _, env = processes.accelerate_command(Path("x.yaml"), [], nproc=4, parallel="ddp")
    assert set(env) <= {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("nproc", "parallel", "message"),
    [
        (0, "ddp", "--nproc: 0"),
        (3, "ddp", "--nproc: 3 found; accepted: 1 to 2"),
        (2, "zero9", "accepted: ddp, zero1, zero2"),
    ],
)
def test_bad_values_name_what_is_accepted(monkeypatch, nproc, parallel, message):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 2)
    with pytest.raises(BadInput, match=message):
        processes.accelerate_command(Path("x.yaml"), [], nproc=nproc, parallel=parallel)


WORLD = """
import os, pathlib, sys
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
handlers = [InitProcessGroupKwargs(backend="gloo")] if "ACCELERATE_USE_DEEPSPEED" in os.environ else []
accelerator = Accelerator(cpu=not handlers, kwargs_handlers=handlers)
total = accelerator.reduce(torch.tensor([1.0 + accelerator.process_index]), "sum").item()
world = f"{accelerator.distributed_type.name} {accelerator.num_processes} {total}"
pathlib.Path(sys.argv[1], f"world-{accelerator.process_index}").write_text(world)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("cpu", "NO 1 1.0"), ("ddp", "MULTI_CPU 2 3.0"), ("zero1", "DEEPSPEED 2 3.0"), ("zero2", "DEEPSPEED 2 3.0")],
)
def test_every_accelerate_config_makes_its_whole_world_on_a_cpu_with_no_variable_set_by_hand(
    script, tmp_path, name, expected
):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(processes.accelerate_config(name)),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "DS_", "CUDA_"))}
    command = [*launch, script(WORLD)[1], str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.read_text() for path in tmp_path.glob("world-*")] == [expected] * int(expected.split()[1])


class running:
    """A separate process that calls run_group(command); on leaving, none of its group may be alive."""

    def __init__(self, command, folder, ranks):
        self.command, self.folder, self.ranks = command, folder, ranks

    def __enter__(self):
        self.trivet = subprocess.Popen([sys.executable, "-c", RUN_GROUP, *self.command])
        wait_for(lambda: len(list(self.folder.glob("ready-*"))) == self.ranks)
        time.sleep(0.1)
        [self.mark] = [group_mark(pid) for pid in children(self.trivet.pid)]
        return self.trivet

    def __exit__(self, *_):
        try:
            wait_for(lambda: not self.living(), seconds=5)
        finally:
            for pid in [self.trivet.pid, *self.living()]:
                process_marks.send(pid, signal.SIGKILL)
            self.trivet.wait()

    def living(self):
        return sorted(process_marks.marked(self.mark))


def group_mark(pid):
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(entry for entry in environment if entry.startswith(processes.GROUP_MARK))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
