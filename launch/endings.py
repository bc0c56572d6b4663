"""How a group of ranks ended: its exit code and why, from what each left in the group's folder."""

import signal
from pathlib import Path

from trainer import status

STOPPED, BAD_INPUT, INTERRUPTED = 75, 2, 130
_ABOUT = ("", status.LOST, status.HUNG)


def exit_code(folder: Path, leader_code: int, *, asked_to_stop: bool) -> int:
    """Return the exit code of `trivet` for a group whose leader, the launcher or the only rank, ended with a code.

    A group that was asked to stop before any of its ranks began has nothing to save, and stopped.
    """
    ended, started = status.reports(folder), status.places(folder)
    codes = {leader_code, *(report.code for report in ended.values())}
    if BAD_INPUT in codes:
        return BAD_INPUT
    # A signal may yet end a rank that has saved and said so, as its interpreter ends; the launcher counts that.
    all_stopped = ended and ended.keys() == started.keys() and all(each.code == STOPPED for each in ended.values())
    if all_stopped or (STOPPED in codes and leader_code in (0, STOPPED)):
        return STOPPED
    if asked_to_stop and leader_code and not has_begun(folder):
        return STOPPED
    if INTERRUPTED in codes or leader_code == -signal.SIGINT:
        return INTERRUPTED
    return 1 if leader_code else 0


def has_begun(folder: Path) -> bool:
    """Whether a rank has come further than reading its data and building its model."""
    return any(place.phase != status.PREPARING for place in status.places(folder).values())


def error(folder: Path, *, by_kernel: bool) -> str:
    """Return what the ranks say that went wrong: one line, or a block about one that hangs; nothing where none does.

    What a rank says about itself counts most, then who hangs, then who was killed first, and then who missed whom.
    """
    ended, signs = status.reports(folder), status.last_signs(folder)
    killed = sorted((rank for rank in signs if rank not in ended), key=signs.__getitem__)
    told = {about: [each.message for each in ended.values() if each.about == about] for about in _ABOUT}
    own = [message for message in told[""] if not (killed and status.tells_of_a_connection(message))]
    if message := next(filter(None, [*own, *told[status.HUNG]]), ""):
        return message
    if killed:
        return _of_killed(status.places(folder)[killed[0]], by_kernel=by_kernel)
    return next(filter(None, told[status.LOST]), "")


def overdue(folder: Path, signal_name: str, save_timeout_s: float) -> str:
    """Return why a group was killed that was asked to stop and did not in time."""
    ended = status.reports(folder)
    left = [f"rank {rank}: {place}" for rank, place in status.places(folder).items() if rank not in ended]
    return (
        f"error: checkpoint.save_timeout_s: {save_timeout_s:g} s after {signal_name} the run had not stopped, "
        f"and was killed ({'; '.join(left[:4]) or 'no rank had begun'}); started again, it goes on from its last "
        "checkpoint; raise checkpoint.save_timeout_s if a step and a checkpoint take longer"
    )


def _of_killed(place: status.Place, *, by_kernel: bool) -> str:
    who = (
        "probably by the kernel, for want of memory (it killed a process at that time)"
        if by_kernel
        else "from outside (kill -9), or the machine's memory ran out"
    )
    return (
        f"error: rank {place.rank} was killed {who}; {place}; started again, the run goes on from its last "
        "checkpoint, if any; to need less memory lower batch.micro_rows (the result stays the same) or batch.max_length"
    )
