"""Threads on every rank that say it lives and where it is, and name the rank that is gone or does not move.

A collective that fails says only that some connection closed; one that hangs says nothing until its time is up. What
the ranks pin to their board tells which of them it was, where, and with which Python stack. One thread tells, and may
wait for the board for ever, where the network goes; the other keeps the time limit, and never does.
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
from trainer.status import HUNG, LOST, PREPARING, Place, Status
from trainer.verdict import hang_block, lost_line

_LONGEST_INTERVAL_S = 1.0
_SILENCE_S = 3.0  # after a connection broke: who pins nothing for so long is gone
_ANSWER_S = 10.0  # when the run is to end: a store that does not answer for so long is gone
_STACK_FRAMES = 16


class Watchdog:
    """Watches over the ranks of a board, None for a world of one. `folder` is that of the run."""

    def __init__(self, board: Board | None = None, *, timeout_s: int = 600, folder: Path | None = None) -> None:
        self.board, self.status = board, Status()
        self._folder, self._timeout_s = folder, timeout_s
        self._interval_s = min(_LONGEST_INTERVAL_S, timeout_s / 10)
        self._hearing_s = 2 * self._interval_s  # until all have read a verdict: the store may go with who gave it
        self._signs: dict[int, tuple[int, float]] = {}  # rank -> its last sign of life, and when it was new here
        self._main = threading.get_ident()
        self._is_failing = False
        self._speaks: bool | None = None  # of who hangs: decided before any rank ends, since the store may go with it
        self._end = threading.Event()
        self._moved_at, self._told = time.monotonic(), 0
        self._teller = threading.Thread(target=self._tell, args=[board.another()], daemon=True) if board else None
        another = board.another(_ANSWER_S) if board else None
        self._watcher = threading.Thread(target=self._watch, args=[another], daemon=True) if board else None

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch while the block runs. Raises PeerLost, or BadInput, for the fault of another rank that ended it."""
        for thread in filter(None, (self._teller, self._watcher)):
            thread.start()
        try:
            yield self
        except BaseException as error:
            self._is_failing = True
            if self.board is not None:
                self.board.patience_s = _ANSWER_S
            other = self._fault_of_another(error) if isinstance(error, Exception) else None
            with suppress(dist.DistError):
                self._pin_failure(other or error)
            if other is not None:
                raise other from None
            raise
        finally:
            self._end.set()
            if self._watcher is not None and self._teller is not None:
                self._watcher.join()
                self._teller.join(_SILENCE_S)  # it may wait for a store that is gone
            faulthandler.cancel_dump_traceback_later()
            self.status.close()

    def fault_among(self, ranks: Iterable[int]) -> Exception | None:
        """Return the PeerLost for one of these ranks that failed or has been silent for `timeout_s`, if any.

        BadInput where the input was at fault there.
        """
        assert self.board is not None
        for rank in ranks:
            sign = self._sign(self.board, rank)
            if fault := self._failure(sign):
                return self._error_of(fault, self.board)
            silent_s = self._silent_s(rank, sign)
            if silent_s > self._timeout_s and sign:
                return self._lost(lost_line({rank: self._place(sign)}, silent_s, self.status.place), self.board)
            if silent_s > self._timeout_s:
                never = f"it never came to {self.board.address}"
                return self._lost(f"rank {rank} was lost: {never}; no sign for {silent_s:.0f} s", self.board)
        return None

    # --- the threads

    def _tell(self, board: Board) -> None:
        """Pin signs of life, and this rank's stack where one asks for it; in long waits look for those of the others.

        Ends the run where another rank found out who hangs. The only one whose calls of the store have no time limit.
        """
        alive = 0
        while not self._end.wait(self._interval_s if alive else 0):
            alive += 1
            with suppress(dist.DistError):  # where the store is gone, this rank is still to end
                board.pin(f"alive/{board.rank}", {"alive": alive, "place": asdict(self.status.place)})
                if asked := board.read("stacks, please"):
                    board.pin(f"stack/{asked}/{board.rank}", self._stack())
                if time.monotonic() - self._moved_at > self._timeout_s / 2:
                    for rank in range(board.size):
                        self._silent_s(rank, self._sign(board, rank))
                verdict = self._verdict_of_another(board)
                if verdict and not self._end.wait(self._hearing_s):
                    self._end_the_run(board, *verdict)
                self._told = alive

    def _watch(self, board: Board) -> None:
        """Keep the time limit: end the run where this rank does not move, or the store is silent while it prepares."""
        moves, told, unanswered = -1, 0, 0
        path = status.stack_path()
        with open(path or os.devnull, "w") as file:
            while not self._end.is_set():
                place = self.status.place
                if place.moves != moves or place.phase == PREPARING or self._is_failing:
                    moves, self._moved_at = place.moves, time.monotonic()
                # By its own rounds, not the clock: preparing may hold both threads for long.
                told, unanswered = self._told, 0 if self._told != told else unanswered + 1
                self.status.touch()
                if path or place.phase != PREPARING:  # preparing may hold it for long: no word of that on a terminal
                    # Its own thread needs no interpreter: it speaks also where the rank does not let go of that.
                    target = file if path else sys.stderr
                    faulthandler.dump_traceback_later(self._timeout_s + self._interval_s, file=target)
                if time.monotonic() - self._moved_at > self._timeout_s:
                    self._end_the_run(board, *self._name_who_hangs(board))
                if place.phase == PREPARING and unanswered * self._interval_s > self._timeout_s:
                    self._end_the_run(board, board.lost(), LOST)
                self._end.wait(self._interval_s)

    def _name_who_hangs(self, board: Board) -> tuple[str, str]:
        """Return the block about the ranks that all others wait for, or a line about a rank or store that is gone.

        And which of these it is. One rank asks all others; what it finds is what all say.
        """
        faulthandler.cancel_dump_traceback_later()
        try:
            deadline = time.monotonic() + 4 * _SILENCE_S
            while not board.is_first("asks") and time.monotonic() < deadline:
                if verdict := self._verdict_of_another(board):
                    return verdict
                time.sleep(self._interval_s / 4)
            found = self._ask_all(board)
            self._speaks = board.is_first("speaks")
            board.pin("verdict", found)
            time.sleep(self._hearing_s)
            return found
        except dist.DistError:
            return board.lost(), LOST

    def _verdict_of_another(self, board: Board) -> tuple[str, str] | None:
        """Return what the rank that asked all others found, if one has; that rank says it."""
        verdict = board.read("verdict")
        if verdict and self._speaks is None:
            self._speaks = False
        return verdict and (verdict[0], verdict[1])

    def _ask_all(self, board: Board) -> tuple[str, str]:
        ranks, stacks = range(board.size), {board.rank: self._stack()}
        board.pin("stacks, please", "of all")
        deadline = time.monotonic() + _SILENCE_S + self._interval_s
        while len(stacks) < board.size and time.monotonic() < deadline:
            found = {rank: board.read(f"stack/of all/{rank}") for rank in ranks if rank not in stacks}
            stacks |= {rank: text for rank, text in found.items() if text}
            time.sleep(self._interval_s / 4)
        signs = {rank: self._sign(board, rank) for rank in ranks if rank != board.rank}
        if failures := list(filter(None, map(self._failure, signs.values()))):
            return failures[0]["message"], LOST
        places = {rank: self._place(sign) for rank, sign in signs.items()} | {board.rank: self.status.place}
        # Of a rank below the same launcher that told of no death: what it has no stack for holds the interpreter.
        silent = {rank: self._silent_s(rank, sign) for rank, sign in signs.items() if rank not in stacks}
        here = status.places_in_group()
        lost = {rank: places[rank] for rank, for_s in silent.items() if for_s > _SILENCE_S and rank not in here}
        if lost:
            return lost_line(lost, max(silent[rank] for rank in lost), self.status.place), LOST
        return hang_block(places, stacks, self._timeout_s), HUNG

    def _end_the_run(self, board: Board, block: str, about: str) -> None:
        error = self._lost(block, board)
        status.report_exit(1, f"error: {redacted(str(error))}", about)
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
                return self._error_of(fault, self.board)
            if "timed out" in str(error).lower():
                return self._lost(self._name_who_hangs(self.board)[0], self.board)
            return None
        return self._lost(self.board.lost(), self.board)

    def _found_fault(self, board: Board) -> dict[str, Any] | None:
        """Return what ended another rank: the first that misses one looks at all, and the others read what it found."""
        looks, deadline = board.is_first("looks"), time.monotonic() + 2 * _SILENCE_S
        others = [rank for rank in range(board.size) if rank != board.rank]
        while time.monotonic() < deadline:
            found = (self._fault_of(board, rank) for rank in others)
            fault = next(filter(None, found), None) if looks else board.read("fault")
            if fault and looks:
                board.pin("fault", fault)
            if fault:
                return fault
            time.sleep(self._interval_s / 4)
        return None

    def _fault_of(self, board: Board, rank: int) -> dict[str, Any] | None:
        sign = self._sign(board, rank)
        if sign and not sign.get("failure") and (silent_s := self._silent_s(rank, sign)) > _SILENCE_S:
            return {"code": 1, "message": lost_line({rank: self._place(sign)}, silent_s, self.status.place)}
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

    def _error_of(self, fault: dict[str, Any], board: Board) -> Exception:
        return BadInput(fault["message"]) if fault["code"] == 2 else self._lost(fault["message"], board)

    def _lost(self, message: str, board: Board) -> PeerLost:
        speaks = self._speaks is not False  # also where nobody can be asked who does
        with suppress(dist.DistError):
            speaks = board.is_first("speaks") if self._speaks is None else speaks
        first, newline, rest = message.partition("\n")
        error = guards.failed(self._folder, first) if self._folder else RunFailed(first, step=0)
        return PeerLost(f"{error}{newline}{rest}", step=error.step, speaks=speaks)

    # --- signs of life

    def _sign(self, board: Board, rank: int) -> dict[str, Any]:
        sign = board.read(f"alive/{rank}") or {}
        failure = board.read(f"failed/{rank}")
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
