"""What the ranks that are left say about those that hang or are lost."""

import re
from collections.abc import Mapping
from pathlib import Path

from trainer import status
from trainer.status import Place

_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)')
_INNERMOST = 4
_NAMED = 4  # of the ranks that were lost; a machine may take many with it
# Files of the innermost frame of a rank that only waits for the others. In the engine of the backward pass it may.
_WAITING = ("/torch/distributed/", "/torch/nn/parallel/distributed.py", "/deepspeed/comm/", "/torch/autograd/graph.py")


def lost_line(lost: Mapping[int, Place], silent_s: float, waiting: Place) -> str:
    """Return a line about ranks that gave no sign for so long; each place is that of its last sign, of up to a second
    before. `waiting` is that of the rank that says so.
    """
    named = [f"rank {rank} was lost: {place}" for rank, place in lost.items()]
    more = [f"{len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return (
        f"{'; '.join(named[:_NAMED] + more)}; no sign for {silent_s:.0f} s: killed, or its machine or network is gone; "
        f"rank {waiting.rank} waits in phase {waiting.phase}, step {waiting.step}"
    )


def hang_block(places: dict[int, Place], stacks: dict[int, str], timeout_s: int) -> str:
    """Return a line that names the ranks all others wait for, and below it the Python stack of each.

    Those are the ranks that moved least; among several those whose stack is not in a collective, if any is not.
    """
    least = min(place.moves for place in places.values())
    behind = [rank for rank, place in places.items() if place.moves == least]
    # Who has no stack holds the interpreter, and so does not wait either.
    inner = {rank: stacks.get(rank, "").rpartition('  File "')[2] for rank in behind}
    busy = [rank for rank in behind if not any(part in inner[rank] for part in _WAITING)]
    hanging = busy or behind
    named = "; ".join(f"rank {rank} hangs: {places[rank]}" for rank in hanging)
    waiting = [rank for rank in places if rank not in hanging]
    wait = f", and {len(waiting)} other{'s wait' if len(waiting) > 1 else ' waits'} for it" if waiting else ""
    first = f"{named}; it has not moved for {timeout_s} s{wait}; raise run.timeout_s if that may take longer"
    none = "  none: it holds the interpreter, in a call that is not Python's\n"
    told = [f"Python stack of rank {rank}:\n{stacks.get(rank) or status.read_stack(rank) or none}" for rank in hanging]
    return "\n".join([first, *(each.rstrip() for each in told)])


def innermost(stack: str) -> str:
    """Return the last frames of a Python stack in a few words, the innermost first."""
    frames = _FRAME.findall(stack)[: -_INNERMOST - 1 : -1]
    return ", called by ".join(f"{name} ({Path(file).name}:{line})" for file, line, name in frames)
