"""A rank that only moves through phases under the watchdog's eye, without a model: what two of these do is quick.

Arguments: the folder of the run, what rank 1 does at last (kill, hang, hang_in_c, fail or refuse), the time limit.
"""

import sys
import time
from pathlib import Path

import faulty  # beside this file

from serving.directory import BadInput
from trainer import board, guards, status
from trainer.guards import RunFailed
from trainer.watchdog import Watchdog


def refuse() -> None:
    raise BadInput("data.train: no such file; check the path")


def move_and(last: str, watchdog: Watchdog) -> None:
    watchdog.status.at("forward", 7)
    if faulty.RANK == 1:
        time.sleep(1)  # signs of life come each tenth of the limit
        {**faulty.FAULTS, "refuse": refuse}[last]()
    watchdog.status.at("backward")
    if "hang" in last:
        time.sleep(3600)  # as in a collective
    time.sleep(2)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


def main() -> int:
    folder, last, timeout_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    status.report_start()
    try:
        with Watchdog(board.connect(60), timeout_s=timeout_s, folder=folder).watching() as watchdog:
            move_and(last, watchdog)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        about = status.LOST if isinstance(error, RunFailed) else ""
        status.report_exit(guards.exit_code(error), f"error: {error}", about)
        return guards.exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
