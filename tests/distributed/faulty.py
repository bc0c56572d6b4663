"""What every rank of a faulty launch runs: `launch.train`, with the faults that FAULTS (JSON) lists, each caused once.

A fault {"rank", "phase", "step", "do"} happens where that rank enters that phase of that step.
"""

import atexit
import ctypes
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from launch import train
from trainer import status

RANK = int(os.environ.get("RANK", "0"))
enter_for_real = status.Status.at


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def hang_in_c() -> None:
    """As a library that never lets go of the interpreter: no Python thread of the rank runs any more."""
    ctypes.PyDLL(None).sleep(3600)


def fail() -> None:
    raise ValueError("this rank's own fault")


def dawdle() -> None:
    time.sleep(30)


def be_told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def find_no_room() -> None:
    """As on a full disk: no file of this rank may grow beyond a KiB from here on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


def end_slowly() -> None:
    """Be told to stop, and once more when the run is over and the interpreter ends."""
    atexit.register(be_told)
    be_told()


FAULTS = {each.__name__: each for each in (kill, hang, hang_in_c, fail, dawdle, be_told, find_no_room, end_slowly)}


def at(self, phase, step=None):
    """Enter the phase, and what is to happen there."""
    enter_for_real(self, phase, step)
    for number, fault in enumerate(json.loads(os.environ["FAULTS"])):
        mark = Path(os.environ["FAULT_FOLDER"], f"fault-{number}")
        place = {"rank": RANK, "phase": phase, "step": self.place.step}
        if all(place[key] == value for key, value in fault.items() if key in place) and not mark.exists():
            mark.touch()
            FAULTS[fault["do"]]()


if __name__ == "__main__":
    status.Status.at = at
    sys.exit(train.main())
