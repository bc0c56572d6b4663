"""How a run ends early: on a signal, agreed on by all ranks at a step boundary, or because it cannot go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serving.directory import BadInput

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class RunFailed(Exception):
    """A run that cannot go on, after `step` finished steps, for a reason that its message gives in full."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


@contextmanager
def writing(what: str, *, step: int) -> Iterator[None]:
    """Raise RunFailed, saying `what` could not be written, where the block finds the disk full, gone or read-only."""
    try:
        yield
    except Exception as error:
        if not _is_about_a_disk(error):
            raise
        message = f"{what} cannot be written ({error}); mend that and start the run again: it goes on where it can"
        raise RunFailed(message, step=step) from None


@contextmanager
def starting(folder: Path) -> Iterator[None]:
    """Raise BadInput where the first files of a run cannot be written into its folder."""
    try:
        yield
    except OSError as error:
        message = f"run.dir: {folder} cannot be written ({error.strerror}); free some space or choose another run.dir"
        raise BadInput(message) from None


def _is_about_a_disk(error: Exception) -> bool:
    # By its name: this file is loaded by every command, and safetensors is not to be.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


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
        if not self.signal_name and os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping: saving at the end of this step; Ctrl-C again ends without saving\n")
        self.signal_name = signal.Signals(number).name
