"""Child processes that train: composed, started in a group of their own, told to stop, and never left behind.

`accelerate launch` is no help once it runs: it dies of SIGUSR1 and leaves its workers, kills a slow save after 30 s,
and returns 1 for every failure. So signals go past it, straight to the ranks; each rank leaves its own exit code in a
file; and whatever carries the group's mark is killed when the group ends.
"""

import contextlib
import ctypes
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from launch import endings, process_marks
from launch.nodes import Nodes
from launch.shipped import example_configs
from serving.directory import BadInput
from trainer.guards import STOP_SIGNALS
from trainer.status import EXIT_FOLDER

PARALLEL = ("ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
GROUP_MARK = "TRIVET_GROUP"  # in the environment of every process of a group, however deep
_POLL_S = 1.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


# --- what to run -----------------------------------------------------------------------------------------------------


def train_command(config_path: Path, overrides: list[str]) -> list[str]:
    """Return the command of one run in one process."""
    return [*python_module("launch.train"), str(config_path), *overrides]


def python_module(name: str) -> list[str]:
    """Return the command that runs one of our modules by the name of its package, whatever lies where one stands."""
    return [sys.executable, *(["-P"] if _safe_path() else []), "-m", name]


def accelerate_command(
    config_path: Path,
    overrides: list[str],
    *,
    nproc: int,
    parallel: str,
    nodes: Nodes | None = None,
    module: str = "launch.train",
) -> tuple[list[str], dict[str, str]]:
    """Return the `accelerate launch` command of one run on `nproc` processes, and what it adds to the environment.

    With `nodes` it is this machine's command, of a run that has `nproc` processes on each of them. Another `module` of
    ours takes the arguments of a run, or others.
    Raises BadInput for a mode that is not in PARALLEL, or more processes than GPUs on a machine that has some.
    """
    check_parallel(parallel)
    num_gpus = _num_gpus()
    if nproc < 1 or (num_gpus and nproc > num_gpus):
        accepted = f"1 to {num_gpus}, the GPUs of this machine" if num_gpus else "1 or more"
        raise BadInput(f"--nproc: {nproc} found; accepted: {accepted}")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(parallel))]
    flags = nodes.launch_flags(parallel) if nodes else []
    world = ["--num_processes", str(nproc * (nodes.count if nodes else 1)), *flags, "-m", module]
    env = _safe_path()
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, num_cores() // nproc))
    if not num_gpus:
        env["DS_ACCELERATOR"] = "cpu"
        if parallel == "ddp":  # DeepSpeed would start one process only, and FSDP would leave the model whole
            env["ACCELERATE_USE_CPU"] = "true"
    return [sys.executable, *launcher, *world, str(config_path), *overrides], env


def check_parallel(parallel: str) -> None:
    """Raise BadInput for a mode that is not in PARALLEL."""
    if parallel not in PARALLEL:
        raise BadInput(f"--parallel: {parallel!r} found; accepted: {', '.join(PARALLEL)}")


def accelerate_config(name: str) -> Path:
    """Return the path of an Accelerate launch config that ships with Trivet."""
    return example_configs() / "accelerate" / f"{name.replace('-', '_')}.yaml"


def show_command(argv: list[str], env: dict[str, str]) -> str:
    """Return the command as one would type it in a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(argv)])


# --- the group -------------------------------------------------------------------------------------------------------


def run_group(
    argv: list[str],
    env: Mapping[str, str | None],
    *,
    save_timeout_s: float | None = None,
    start_again: Callable[[int], Mapping[str, str] | None] | None = None,
) -> int:
    """Run the command in a group of its own until it ends; return the exit code of `trivet` for it.

    `env` is added to this process's environment; a None takes a variable away.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to every rank, which saves and stops (75); a group that has not done so
    `save_timeout_s` later is killed (1). A second Ctrl-C kills the group (130). Why a rank failed is printed once more,
    below the launcher's own traceback; that one was killed, and by the kernel where it was, only here. After a failure
    that nobody asked for, `start_again`, given how many there were, returns what another attempt has in its
    environment, or None for none. Only the main thread may call this, since it handles signals meanwhile.
    """
    group: Group | None = None
    heard: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number))
        if group is None:
            return
        if heard.count(signal.SIGINT) > 1:
            group.kill()
        else:
            group.stop(heard[-1], save_timeout_s)

    previous = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        for failures in itertools.count(1):
            with Group(argv, env) as group:
                if heard:  # while it was being started
                    group.stop(heard[-1], save_timeout_s)
                code = group.wait()
                if code in (1, endings.BAD_INPUT) and group.error():
                    print(group.error(), file=sys.stderr)
            group = None
            more = start_again(failures) if start_again and code == 1 and not heard else None
            if more is None or heard:
                return code if more is None else endings.STOPPED
            env = {**env, **more}
        raise AssertionError("there is always a next attempt")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Group:
    """A command and everything it starts. Close it (or use `with`): nothing of it is alive afterwards.

    Should this process be killed itself, the kernel sends SIGTERM to the command. `output` takes what it prints,
    `folder` is where it runs, `scratch` where the ranks leave their exit codes.
    """

    def __init__(
        self,
        argv: list[str],
        env: Mapping[str, str | None],
        *,
        output: IO[bytes] | None = None,
        folder: Path | None = None,
        scratch: str | None = None,
    ) -> None:
        self._mark = f"{GROUP_MARK}={uuid.uuid4().hex}"
        self._exits = tempfile.TemporaryDirectory(prefix="trivet-exit-", dir=scratch)
        self._left = Path(self._exits.name)
        self._interrupted, self._overdue = False, ""
        self._stop_signal, self._save_timeout_s, self._deadline = "", 0.0, math.inf
        self._oom_kills = process_marks.oom_kills()
        marks = {GROUP_MARK: self._mark.partition("=")[2], EXIT_FOLDER: self._exits.name}
        changed = {**os.environ, **env, **marks}
        self._leader = subprocess.Popen(
            argv,
            env={name: value for name, value in changed.items() if value is not None},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,  # Ctrl-C on the terminal reaches only us
            preexec_fn=_die_with_parent,
        )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def members(self) -> list[int]:
        """Return the ids of the group's live processes, however deep and whoever their parent is now."""
        return sorted(process_marks.marked(self._mark))

    def ranks(self) -> list[int]:
        """Return the training processes: not the launcher above them, nor the helpers below (loaders, compilers)."""
        return process_marks.ranks(process_marks.marked(self._mark))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank, or to the command itself while it has none."""
        for pid in self.ranks():
            process_marks.send(pid, number)

    def stop(self, number: signal.Signals, save_timeout_s: float | None = None) -> None:
        """Ask every rank to save and stop. Who waits for the group kills it `save_timeout_s` after the first time."""
        if not self._stop_signal and save_timeout_s is not None:
            self._save_timeout_s, self._deadline = save_timeout_s, time.monotonic() + save_timeout_s
        self._stop_signal = number.name
        self.send(number)

    def kill(self) -> None:
        """End every process of the group at once."""
        self._interrupted = True
        process_marks.kill_marked(self._mark)

    def poll(self) -> int | None:
        """Return the exit code of `trivet` for this group, None while it runs."""
        return None if self._leader.poll() is None else self._code()

    def wait(self) -> int:
        """Wait for the command to end; return the exit code of `trivet` for it."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._leader.wait(timeout=_POLL_S)
                return self._code()
            if time.monotonic() > self._deadline and not self._overdue:
                self._overdue = endings.overdue(self._left, self._stop_signal, self._save_timeout_s)
                process_marks.kill_marked(self._mark)

    def close(self) -> None:
        """Kill what is left."""
        if self.members():
            process_marks.kill_marked(self._mark)
        self._leader.wait()
        self._exits.cleanup()

    def error(self) -> str:
        """Return one line, or a block: which rank was killed or hangs, or else the first error that one reported."""
        by_kernel = process_marks.oom_kills() > self._oom_kills
        return self._overdue or ("" if self._interrupted else endings.error(self._left, by_kernel=by_kernel))

    def _code(self) -> int:
        if self._interrupted:
            return endings.INTERRUPTED
        return endings.exit_code(self._left, self._leader.returncode, asked_to_stop=bool(self._stop_signal))


# --- the machine -----------------------------------------------------------------------------------------------------


def _safe_path() -> dict[str, str]:
    """The variable that keeps the folder where one stands off Python's path: a `trainer/` of the user's comes first.

    In a clone that is not installed that folder is how Python finds us, and it holds nothing but ours.
    """
    return {} if Path.cwd() == Path(__file__).resolve().parents[1] else {"PYTHONSAFEPATH": "1"}


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
