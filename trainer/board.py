"""What the ranks of a run tell each other beside their collectives, in a store that outlives most of them."""

import itertools
import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.guards import Unreachable
from trainer.status import own_rank

_numbers = itertools.count()  # of the runs of this process: they must not read each other's notes


class Board:
    """Notes by name, JSON values, that every rank can pin and read. One thread each: ask for `another` for another."""

    def __init__(self, store: dist.Store, rank: int, size: int, address: str = "") -> None:
        self.rank, self.size, self.address = rank, size, address
        self._store = store

    def another(self) -> "Board":
        """Return the same board by a connection of its own."""
        return Board(self._store.clone(), self.rank, self.size, self.address)

    def pin(self, name: str, value: Any) -> None:
        """Leave a note, in place of an older one."""
        self._store.set(name, json.dumps(value))

    def read(self, name: str) -> Any:
        """Return a note, None where there is none yet. Never waits for one."""
        return json.loads(self._store.get(name)) if self._store.check([name]) else None

    def is_first(self, name: str) -> bool:
        """Return whether nobody has asked for this name before."""
        return self._store.add(name, 1) == 1


def connect(timeout_s: int) -> Board | None:
    """Return the board of the world that the launcher made, None for a world of one.

    Raises Unreachable where the main address does not answer within `timeout_s`.
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
    return Board(dist.PrefixStore(f"trivet/{attempt}/{next(_numbers)}", store), rank, size, f"{host}:{port}")
