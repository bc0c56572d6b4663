"""The machines of a run meet before any of them starts its processes: all there, each with a rank of its own.

What would otherwise be a hang, or a traceback of the launcher after a quarter of an hour, is one line on every machine.
Machine 0 listens on the port that the launcher takes right afterwards; each other one says who it is and waits.
"""

import dataclasses
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

from launch import endings, processes
from launch.nodes import Nodes, host_name
from serving.directory import BadInput
from trainer.guards import STOP_SIGNALS
from trainer.machines import GLOO_INTERFACE, addresses, interface_of

_RETRY_S = 0.5
_LONGEST_LINE_BYTES = 4096
_PATIENCE_S = 5  # with one that has connected, to say who it is

Card = dict[str, Any]  # what a machine says of itself
_CARD = {"trivet": int, "rank": int, "host": str, "asked": dict}


class Stopped(Exception):
    """A stop signal came while the machines met: there is nothing to save, and the same command can be run again."""


def start_together(
    argv: list[str],
    env: dict[str, str],
    nodes: Nodes | None,
    *,
    nproc: int,
    parallel: str,
    save_timeout_s: float | None = None,
    start_again: Callable[[int], dict[str, str] | None] | None = None,
    timeout_s: int = 0,
) -> int:
    """Run a launcher's command as `processes.run_group` does, with `nodes` when all machines are there.

    Before another attempt they meet again; others may notice a failure `timeout_s` later than this one.
    """

    def meet_again(failures: int) -> dict[str, str] | None:
        more = start_again(failures) if start_again else None
        if more is None or nodes is None:
            return more
        patient = dataclasses.replace(nodes, join_timeout_s=nodes.join_timeout_s + timeout_s)
        try:
            return {**more, **join(patient, nproc=nproc, parallel=parallel)}
        except BadInput as error:  # it was right the first time: a machine is gone
            print(f"error: {error}", file=sys.stderr)
            return None

    try:
        network = join(nodes, nproc=nproc, parallel=parallel) if nodes else {}
        return processes.run_group(
            argv, {**env, **network}, save_timeout_s=save_timeout_s, start_again=meet_again if start_again else None
        )
    except Stopped as stopped:
        print(f"stopped by {stopped} while the machines met; start it again to go on", file=sys.stderr)
        return endings.STOPPED


def join(nodes: Nodes, *, nproc: int, parallel: str) -> dict[str, str]:
    """Wait until every machine is there; return the variables by which this one's processes will talk to the others.

    Raises BadInput, on every machine that can be told, where one does not come within `nodes.join_timeout_s`, two have
    one rank, or they were started with different `nproc`, `parallel` or number of machines; and Stopped.
    """
    asked = {"--nodes": nodes.count, "--nproc": nproc, "--parallel": parallel}
    card = {"trivet": 1, "rank": nodes.machine_rank, "host": host_name(), "asked": asked}
    deadline = time.monotonic() + nodes.join_timeout_s
    with _raising_stopped():
        print(
            f"machine {nodes.machine_rank} of {nodes.count} meets the others at {nodes.address}, for at most "
            f"{nodes.join_timeout_s} s",
            file=sys.stderr,
        )
        address = _call(nodes, card, deadline) if nodes.machine_rank == 0 else _answer(nodes, card, deadline)
    interface = None if GLOO_INTERFACE in os.environ else interface_of(address)
    print(
        f"all {nodes.count} machines are there" + (f"; ranks talk over {interface}" if interface else ""),
        file=sys.stderr,
    )
    return {GLOO_INTERFACE: interface} if interface else {}


# --- machine 0 -------------------------------------------------------------------------------------------------------


def _call(nodes: Nodes, own: Card, deadline: float) -> str:
    """Return this machine's address, as the others reach it, when all of them are there."""
    _require_own_address(nodes, deadline)
    cards, lines = {0: own}, dict[int, socket.socket]()
    outcome: str | None = None  # while it is open; then what is wrong, or nothing
    with _listen(nodes) as server, ExitStack() as every_line:
        try:
            while len(cards) < nodes.count:
                line, card = _next_card(nodes, cards, server, deadline)
                every_line.callback(_hang_up, line, lambda: outcome)
                for gone in [rank for rank, known in lines.items() if _is_closed(known)]:
                    del cards[gone], lines[gone]
                _check(nodes, cards, card)
                cards[card["rank"]], lines[card["rank"]] = card, line
        except BadInput as error:
            outcome = str(error)
            raise
        outcome = ""
        return _plain(next(iter(lines.values())).getsockname()[0])


def _hang_up(line: socket.socket, outcome: Callable[[], str | None]) -> None:
    """Tell the other end how the roll call ended. One that was cut short says nothing: the other may ask again."""
    if (error := outcome()) is not None:
        _send(line, {"error": error})
    line.close()


def _next_card(
    nodes: Nodes, cards: dict[int, Card], server: socket.socket, deadline: float
) -> tuple[socket.socket, Card]:
    """Return the connection and the card of the next machine that comes; others that knock are sent away."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        with suppress(TimeoutError):
            line, _ = server.accept()
            card = _receive(line, min(_PATIENCE_S, left))
            if {name: type(value) for name, value in card.items()} == _CARD:
                return line, card
            line.close()
    missing = [str(rank) for rank in range(nodes.count) if rank not in cards]
    came = ", ".join(f"{rank} ({cards[rank]['host']})" for rank in sorted(cards))
    raise BadInput(
        f"--nodes: machine {', '.join(missing)} of {nodes.count} did not come to {nodes.address} within "
        f"{nodes.join_timeout_s} s; there: {came}; start what is missing with its --machine-rank, or open the port "
        f"between the machines"
    )


def _check(nodes: Nodes, cards: dict[int, Card], new: Card) -> None:
    """Raise BadInput where the new machine has another's rank, or was started in another way than this one."""
    if (other := cards.get(new["rank"])) is not None:
        raise BadInput(
            f"--machine-rank: {new['rank']} found on {other['host']} and on {new['host']}, which meet at "
            f"{nodes.address}; accepted: 0 to {nodes.count - 1}, another on every machine"
        )
    for option, here in cards[0]["asked"].items():
        if (there := new["asked"].get(option)) != here:
            raise BadInput(
                f"{option}: {here} found on machine 0 ({cards[0]['host']}) and {there} on machine {new['rank']} "
                f"({new['host']}); accepted: the same on every machine"
            )


def _require_own_address(nodes: Nodes, deadline: float) -> None:
    """Raise BadInput if the main address is not one of this machine's. Its name may not be known yet, so ask again."""
    while True:
        try:
            found = {(info[0], info[4]) for info in socket.getaddrinfo(nodes.host, 0)}
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise BadInput(_unreachable(nodes, error)) from None
            time.sleep(_RETRY_S)
    for family, address in found:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.bind(address)
            return
    own = ", ".join(address for name, address in addresses().items() if name != "lo")
    raise BadInput(
        f"--machine-rank: 0 found on {host_name()}, but --main-address {nodes.address} is not here (this machine has "
        f"{own or 'no address'}); accepted: 0 on the machine of that address only, 1 to {nodes.count - 1} on others"
    )


def _listen(nodes: Nodes) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", nodes.port), family=family, dualstack_ipv6=both, backlog=nodes.count)
    except OSError as error:
        why = "taken by another program" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
        raise BadInput(
            f"--main-address: port {nodes.port} of {nodes.host} found {why} on machine 0 ({host_name()}); accepted: a "
            "free port, the same on every machine"
        ) from None


# --- the others ------------------------------------------------------------------------------------------------------


def _answer(nodes: Nodes, own: Card, deadline: float) -> str:
    last: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((nodes.host, nodes.port), timeout=min(left, _PATIENCE_S)) as line:
                _send(line, own)
                reply = _receive(line, deadline - time.monotonic())
                address = _plain(line.getsockname()[0])
            if reply.get("error"):
                raise BadInput(str(reply["error"]))
            if "error" in reply:
                return address
            last = ConnectionError("something else than this run answers there")
        except (OSError, UnicodeError) as error:
            last = error
        time.sleep(_RETRY_S)
    raise BadInput(_unreachable(nodes, last))


def _unreachable(nodes: Nodes, error: Exception | None) -> str:
    why = getattr(error, "strerror", None) or error or "no answer"
    return (
        f"--main-address: {nodes.address} found unreachable from machine {nodes.machine_rank} of {nodes.count} "
        f"({host_name()}) for {nodes.join_timeout_s} s ({why}); accepted: an address of the machine that was started "
        "with --machine-rank 0, with its port open to the others"
    )


# --- one line each way -----------------------------------------------------------------------------------------------


def _send(line: socket.socket, message: Card) -> None:
    with suppress(OSError):  # the other end may be gone
        line.sendall(json.dumps(message).encode() + b"\n")


def _receive(line: socket.socket, timeout_s: float) -> Card:
    """Return the message of one line; an empty one for anything else."""
    deadline, text = time.monotonic() + timeout_s, b""
    try:
        while not text.endswith(b"\n") and len(text) < _LONGEST_LINE_BYTES:
            line.settimeout(max(0.01, deadline - time.monotonic()))
            if not (part := line.recv(_LONGEST_LINE_BYTES)):
                return {}
            text += part
        message = json.loads(text)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_closed(line: socket.socket) -> bool:
    return bool(select.select([line], [], [], 0)[0])  # nobody says more than one line


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@contextmanager
def _raising_stopped() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
