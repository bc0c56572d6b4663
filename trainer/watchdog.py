"""A thread on every rank that says it lives and where the rank is, and names the rank that is gone or does not move.

A collective that fails says only that some connection closed; one that hangs says nothing until its time is up. What
the ranks pin to their board tells which of them it was, where, and with which Python stack.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from serving.directory import BadInput
from trainer import guards, run_folder, status
from trainer.board import Board
from trainer.guards import PeerLost, RunFailed
from trainer.redact import redacted
from trainer.status import PREPARING, Place, Status

_LONGEST_INTERVAL_S = 1.0
_SILENCE_S = 3.0  # after a connection broke: who pins nothing for so long is gone
_STACK_FRAMES = 16
# Files of the innermost frame of a rank that only waits for the others. In the engine of the backward pass it may.
_WAITING = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/deepspeed/comm/", "/torch/autograd/graph.py")


class Watchdog:
    """Watches over the ranks of a board, None for a world of one. `folder` is that of the run."""

    def __init__(self, board: Board | None = None, *, timeout_s: int = 600, folder: Path | None = None) -> None:
        self.board, self.status = board, Status()
        self._folder, self._timeout_s = folder, timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 10)
        self._signs: dict[int, tuple[int, float]] = {}  # rank -> its last sign of life, and when it was new here
        self._main = threading.get_ident()
        self._is_failing = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=[board.another()], daemon=True) if board else None

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch while the block runs. Raises PeerLost, or BadInput, for the fault of another rank that ended it."""
        if self._thread is not None:
            self._thread.start()
        try:
            yield self
        except BaseException as error:
            self._is_failing = True
            other = self._fault_of_another(error) if isinstance(error, Exception) else None
            with suppress(dist.DistError):
                self._pin_failure(other or error)
            if other is not None:
                raise other from None
            raise
        finally:
            self._end.set()
            if self._thread is not None:
                self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self.status.close()

    def check(self, ranks: Iterable[int]) -> None:
        """Raise PeerLost for one of these ranks that failed or has been silent for `timeout_s`.

        Raises BadInput where the input was at fault there.
        """
        assert self.board is not None
        for rank in ranks:
            sign = self._sign(rank)
            if fault := self._failure(sign):
                raise self._error_of(fault)
            if self._silent_s(rank, sign) > self._timeout_s:
                where = self._place(sign) if sign else f"it never came to {self.board.address}"
                raise self._lost(f"rank {rank} was lost: {where}; it gave no sign for {self._timeout_s} s")

    # --- the thread

    def _watch(self, board: Board) -> None:
        moves, moved, alive = -1, time.monotonic(), 0
        path = status.stack_path()
        with open(path or os.devnull, "w") as file:
            while not self._end.is_set():
                place, alive = self.status.place, alive + 1
                if place.moves != moves or place.phase == PREPARING or self._is_failing:
                    moves, moved = place.moves, time.monotonic()
                self.status.touch()
                with suppress(dist.DistError):  # where the store is gone, this rank is still to end
                    board.pin(f"alive/{board.rank}", {"alive": alive, "place": asdict(place)})
                    if board.read("stacks, please"):
                        board.pin(f"stack/{board.rank}", self._stack())
                if path or place.phase != PREPARING:  # preparing may hold it for long: no word of that on a terminal
                    # Its own thread needs no interpreter: it speaks also where the rank does not let go of that.
                    target = file if path else sys.stderr
                    faulthandler.dump_traceback_later(self._timeout_s + self._interval_s, file=target)
                if time.monotonic() - moved > self._timeout_s:
                    self._end_the_run(self._name_who_hangs(board))
                self._end.wait(self._interval_s)

    def _name_who_hangs(self, board: Board) -> str:
        """Return the block about the ranks that all others wait for; about this one where nobody can be asked.

        One rank asks all others; the block that it makes is that of all.
        """
        faulthandler.cancel_dump_traceback_later()
        places, stacks = {board.rank: self.status.place}, {board.rank: self._stack()}
        with suppress(dist.DistError):
            board.pin(f"stack/{board.rank}", stacks[board.rank])
            deadline = time.monotonic() + 2 * _SILENCE_S
            while not board.is_first("asks") and time.monotonic() < deadline:
                if block := board.read("block"):
                    return block
                time.sleep(self._interval_s / 4)
            board.pin("stacks, please", True)
            deadline = time.monotonic() + _SILENCE_S
            while len(stacks) < board.size and time.monotonic() < deadline:
                found = {rank: board.read(f"stack/{rank}") for rank in range(board.size) if rank not in stacks}
                stacks |= {rank: text for rank, text in found.items() if text}
                time.sleep(self._interval_s / 4)
            signs = {rank: board.read(f"alive/{rank}") for rank in range(board.size)}
            places |= {rank: self._place(sign) for rank, sign in signs.items() if sign}
            board.pin("block", hang_block(places, stacks, self._timeout_s))
        return hang_block(places, stacks, self._timeout_s)

    def _end_the_run(self, block: str) -> None:
        error = self._lost(block)
        status.report_exit(1, f"error: {redacted(str(error))}", status.HUNG)
        if error.speaks:
            if not status.is_in_group():
                print(f"error: {redacted(str(error))}", file=sys.stderr, flush=True)
            with suppress(OSError):
                if self._folder is not None and self._folder.is_dir():
                    run_folder.write_status(self._folder, "failed", code=1, step=error.step, reason=str(error))
        os._exit(1)  # the main thread may be waiting where no exception reaches it

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)[-_STACK_FRAMES:]) if frame else ""

    # --- after a failure

    def _fault_of_another(self, error: Exception) -> Exception | None:
        """Return the error to raise instead where it was not this rank that failed."""
        if self.board is None or not is_of_a_connection(error):
            return None
        with suppress(dist.DistError):
            if fault := self._found_fault(self.board):
                return self._error_of(fault)
            if "timed out" in str(error).lower():
                return self._lost(self._name_who_hangs(self.board))
            return None
        return self._lost(f"the store at {self.board.address} was lost, and rank 0 or its machine with it")

    def _found_fault(self, board: Board) -> dict[str, Any] | None:
        """Return what ended another rank: the first that misses one looks at all, and the others read what it found."""
        looks, deadline = board.is_first("looks"), time.monotonic() + 2 * _SILENCE_S
        others = [rank for rank in range(board.size) if rank != board.rank]
        while time.monotonic() < deadline:
            fault = next(filter(None, map(self._fault_of, others)), None) if looks else board.read("fault")
            if fault and looks:
                board.pin("fault", fault)
            if fault:
                return fault
            time.sleep(self._interval_s / 4)
        return None

    def _fault_of(self, rank: int) -> dict[str, Any] | None:
        sign = self._sign(rank)
        if sign and not sign.get("failure") and self._silent_s(rank, sign) > _SILENCE_S:
            gone = "it gave no sign any more: killed, or its machine or network is gone"
            return {"code": 1, "message": f"rank {rank} was lost: {self._place(sign)}; {gone}"}
        return self._failure(sign)

    def _pin_failure(self, error: BaseException) -> None:
        if self.board is None or isinstance(error, PeerLost):
            return
        code = guards.exit_code(error)
        why = str(error) if isinstance(error, BadInput | RunFailed) else f"{type(error).__name__}: {error}"
        self.board.pin(f"failed/{self.board.rank}", {"code": code, "why": redacted(why)})

    def _failure(self, sign: dict[str, Any]) -> dict[str, Any] | None:
        """Return exit code and message of what a rank pinned about its own failure."""
        failure = sign.get("failure")
        if not failure:
            return None
        place, why = self._place(sign), failure["why"]
        if failure["code"] == 2:
            return {"code": 2, "message": f"{why} (found on rank {place.rank}, host {place.host})"}
        return {"code": 1, "message": f"rank {place.rank} failed: {place}: {why}"}

    def _error_of(self, fault: dict[str, Any]) -> Exception:
        return BadInput(fault["message"]) if fault["code"] == 2 else self._lost(fault["message"])

    def _lost(self, message: str) -> PeerLost:
        speaks = False
        with suppress(dist.DistError):
            speaks = self.board is not None and self.board.is_first("speaks")
        first, newline, rest = message.partition("\n")
        error = guards.failed(self._folder, first) if self._folder else RunFailed(first, step=0)
        return PeerLost(f"{error}{newline}{rest}", step=error.step, speaks=speaks)

    # --- signs of life

    def _sign(self, rank: int) -> dict[str, Any]:
        assert self.board is not None
        sign = self.board.read(f"alive/{rank}") or {}
        failure = self.board.read(f"failed/{rank}")
        if failure:
            sign = {"place": asdict(Place(rank)), **sign, "failure": failure}
        return sign

    def _place(self, sign: dict[str, Any]) -> Place:
        """Return where a rank is by its own file, if it is of this group and machine, else by its last sign."""
        place = Place(**sign["place"])
        return status.places_in_group().get(place.rank, place)

    def _silent_s(self, rank: int, sign: dict[str, Any]) -> float:
        alive = sign.get("alive", 0)
        last, since = self._signs.get(rank, (-1, 0.0))
        if alive != last:
            self._signs[rank] = (alive, time.monotonic())
            return 0.0
        return time.monotonic() - since


def is_of_a_connection(error: BaseException) -> bool:
    """Whether a collective or the store failed because another rank could not be reached."""
    is_torchs = isinstance(error, RuntimeError) and status.tells_of_a_connection(str(error))
    return isinstance(error, dist.DistError) or is_torchs


def hang_block(places: dict[int, Place], stacks: dict[int, str], timeout_s: int) -> str:
    """Return a line that names the ranks all others wait for, and below it the Python stack of each.

    Those are the ranks that moved least; among several those whose stack is not in a collective, if any is not.
    """
    least = min(place.moves for place in places.values())
    behind = [rank for rank, place in places.items() if place.moves == least]
    # Who has no stack holds the interpreter, and so does not wait either.
    innermost = {rank: stacks.get(rank, "").rpartition('  File "')[2] for rank in behind}
    busy = [rank for rank in behind if not any(part in innermost[rank] for part in _WAITING)]
    hanging = busy or behind
    named = "; ".join(f"rank {rank} hangs: {places[rank]}" for rank in hanging)
    waiting = [rank for rank in places if rank not in hanging]
    wait = f", and {len(waiting)} other{'s wait' if len(waiting) > 1 else ' waits'} for it" if waiting else ""
    first = f"{named}; it has not moved for {timeout_s} s{wait}; raise run.timeout_s if that may take longer"
    none = "  none: it holds the interpreter, in a call that is not Python's\n"
    told = [f"Python stack of rank {rank}:\n{stacks.get(rank) or status.read_stack(rank) or none}" for rank in hanging]
    return "\n".join([first, *(each.rstrip() for each in told)])
