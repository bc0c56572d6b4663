"""How a run ends early: on a signal, agreed on by all ranks at a step boundary, or because it cannot go on."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serving.directory import BadInput
from trainer import run_folder
from trainer.status import own_rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class RunFailed(Exception):
    """A run that cannot go on, after `step` finished steps, for a reason that its message gives in full."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class Unreachable(BadInput):
    """A main address that does not answer: no other rank can hear of it from this one."""


class PeerLost(RunFailed):
    """Another rank is gone, failed or hangs. `speaks`: this rank is the one that tells the user."""

    def __init__(self, message: str, *, step: int, speaks: bool) -> None:
        super().__init__(message, step=step)
        self.speaks = speaks


def exit_code(error: BaseException) -> int:
    """Return what a process that ends with this error returns."""
    return 2 if isinstance(error, BadInput) else 130 if isinstance(error, KeyboardInterrupt) else 1


def failed(folder: Path, message: str) -> RunFailed:
    """Return the error of a run that failed between two checkpoints; it says where the run in `folder` goes on."""
    saved = (run_folder.read_status(folder) or {}).get("step", 0)
    return RunFailed(f"{message}; started again, the run goes on from step {saved}", step=saved)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Raise RunFailed, saying `what` could not be written, where the block finds the disk full, gone or read-only.

    `folder` is that of the run.
    """
    try:
        yield
    except Exception as error:
        if not _is_about_a_disk(error):
            raise
        raise failed(folder, f"{what} cannot be written ({error}); mend that") from None


@contextmanager
def starting(folder: Path) -> Iterator[None]:
    """Raise BadInput where the first files of a run cannot be written into its folder."""
    try:
        yield
    except OSError as error:
        if not _is_about_a_disk(error):
            raise
        message = f"run.dir: {folder} cannot be written ({error.strerror}); free some space or choose another run.dir"
        raise BadInput(message) from None


def _is_about_a_disk(error: Exception) -> bool:
    # Safetensors' error by its name: this file is loaded by every command, and that package is not to be.
    is_of_a_file = isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
    is_of_memory = getattr(error, "errno", None) == errno.ENOMEM or os.strerror(errno.ENOMEM) in str(error)
    return is_of_a_file and not is_of_memory


class StopRequest:
    """While entered, remembers the first stop signal and answers it; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.signal_name and own_rank() == 0:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping: saving at the end of this step; Ctrl-C again ends without saving\n")
        self.signal_name = signal.Signals(number).name
