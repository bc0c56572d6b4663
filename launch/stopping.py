"""How a command that leaves nothing half-written is stopped: by Ctrl-C, or by SIGTERM as if that were one."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from launch.endings import INTERRUPTED


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block, as Ctrl-C does."""
    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def stopped(message: str) -> int:
    """Say that the command was stopped and what it left; return the exit code for that."""
    print(message, file=sys.stderr)
    return INTERRUPTED


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Answer a signal as Python answers Ctrl-C."""
    raise KeyboardInterrupt
