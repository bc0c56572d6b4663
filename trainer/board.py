"""What the ranks of a run tell each other beside their collectives, in a store that outlives most of them."""

import itertools
import json
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.guards import Unreachable
from trainer.status import own_rank

_numbers = itertools.count()  # of the runs of this process: they must not read each other's notes


class Silent(dist.DistError):
    """A store that gives no answer."""


class Board:
    """Notes by name, JSON values, that every rank can pin and read. One thread each: ask for `another` for another.

    Each call raises Silent where the store gives no answer for `patience_s`, and from then on at once. Without any
    patience given a call may never return: the store's own calls have no time limit.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, address: str = "", patience_s: float | None = None
    ) -> None:
        self.rank, self.size, self.address, self.patience_s = rank, size, address, patience_s
        self._store, self._is_silent = store, False

    def another(self, patience_s: float | None = None) -> "Board":
        """Return the same board by a connection of its own."""
        return Board(self._store.clone(), self.rank, self.size, self.address, patience_s)

    def pin(self, name: str, value: Any) -> None:
        """Leave a note, in place of an older one."""
        self._ask(lambda: self._store.set(name, json.dumps(value)))

    def read(self, name: str) -> Any:
        """Return a note, None where there is none yet. Never waits for one."""
        text = self._ask(lambda: self._store.get(name) if self._store.check([name]) else None)
        return None if text is None else json.loads(text)

    def is_first(self, name: str) -> bool:
        """Return whether nobody has asked for this name before."""
        return self._ask(lambda: self._store.add(name, 1)) == 1

    def lost(self) -> str:
        """Return what to say where the store cannot be reached."""
        return f"the store at {self.address} gives no answer: rank 0, its machine or the network is gone"

    def _ask(self, call: Callable[[], Any]) -> Any:
        if self.patience_s is None:
            return call()
        answer: Future[Any] = Future()
        if not self._is_silent:
            # A thread of its own: no call of the store can be interrupted.
            threading.Thread(target=_answer, args=(call, answer), daemon=True).start()
            try:
                return answer.result(self.patience_s)
            except TimeoutError:
                self._is_silent = True
        raise Silent(self.lost())


def _answer(call: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(call())
    except Exception as error:
        answer.set_exception(error)


def connect(timeout_s: int) -> Board | None:
    """Return the board of the world that the launcher made, None for a world of one.

    Raises Unreachable where the main address does not answer within `timeout_s`, which is the board's patience too.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), own_rank()
    if size == 1:
        return None
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # As torch's own rendezvous does: the agent has the store, or else rank 0, which both can share.
        store = dist.TCPStore(
            host, port, is_master=rank == 0 and not by_agent, wait_for_workers=False, multi_tenant=True,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    except dist.DistError as error:
        raise Unreachable(
            f"MASTER_ADDR: {host}:{port} found unreachable from rank {rank} of {size} ({socket.gethostname()}) for "
            f"{timeout_s} s ({str(error).splitlines()[0]}); accepted: the address of the machine of rank 0, with its "
            "port open to the others"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Board(dist.PrefixStore(f"trivet/{attempt}/{next(_numbers)}", store), rank, size, f"{host}:{port}", timeout_s)
