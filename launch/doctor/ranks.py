"""One rank of `trivet doctor --nproc` or `--nodes`: `python -m launch.doctor.ranks REPORT FOLDER` under a launcher.

All ranks measure together; rank 0 writes the findings to REPORT. FOLDER is the one that they should all see.
"""

import dataclasses
import fcntl
import json
import os
import statistics
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.doctor.findings import Finding, State
from launch.nodes import host_name
from trainer import machines
from trainer.status import own_rank
from trainer.watchdog import is_of_a_connection

AREA = "between ranks"
LATENCY_ROUNDS, CLOCK_ROUNDS, BANDWIDTH_ROUNDS = 50, 10, 3
FIRST_BYTES, MOST_BYTES = 2**20, 2**26
MEASURED_S = 0.5  # what one all-reduce for the bandwidth should take at most, about
SHOWN_WEIGHTS = 10**8
MEET_WITHIN_S = 60  # and every collective
SEEN_WITHIN_S = 10  # a file on one machine, by another; network drives keep directories for some seconds
CLOCK_NOTE_S, CLOCK_PROBLEM_S = 0.1, 2.0


def main() -> int:
    """Measure with the other ranks; rank 0 writes what was found."""
    report, folder = Path(sys.argv[1]), Path(sys.argv[2])
    machines.refuse_lone_worlds()
    machines.use_reachable_interface()
    try:
        findings = _measured(folder)
    except RuntimeError as error:
        if not is_of_a_connection(error):
            raise
        findings = [_apart(error)]
    if own_rank() == 0:
        named = [dataclasses.asdict(dataclasses.replace(finding, area=AREA)) for finding in findings]
        report.write_text(json.dumps(named), encoding="utf-8")
    return 0


def _measured(folder: Path) -> list[Finding]:
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=MEET_WITHIN_S))
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError(f"{os.environ['WORLD_SIZE']} processes found a world of {state.num_processes}")
    if state.num_processes == 1:
        return [Finding("ranks", "one alone: nothing to measure; ask for more with --nproc or --nodes", "note")]
    hosts = gathered(host_name())
    findings = [_ranks(hosts), *_network(state.device), _clocks(hosts), *_folder(folder, hosts)]
    state.destroy_process_group()
    return findings


def _apart(error: Exception) -> Finding:
    """Return what it means that ranks which reached the main port do not reach each other."""
    found = f"they do not reach each other within {MEET_WITHIN_S} s ({str(error).splitlines()[0]})"
    return Finding("ranks", found, "problem", "# open the TCP ports above 1023 between the machines")


def gathered(value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _ranks(hosts: list[str]) -> Finding:
    counted = ", ".join(f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts))
    over = os.environ.get(machines.GLOO_INTERFACE)
    return Finding(
        "ranks", f"{counted}; {dist.get_backend()}{f' over {over}' if over else ''}", value=len(hosts), unit="processes"
    )


def _network(device: torch.device) -> list[Finding]:
    """How long a tiny all-reduce takes, and how many bytes a second a large one moves on each rank."""
    size = dist.get_world_size()
    tiny = [_all_reduce_s(torch.zeros(1, device=device)) for _ in range(LATENCY_ROUNDS)]
    latency_us = round(statistics.median(tiny[5:]) * 1e6)
    first_s = max(gathered(_all_reduce_s(torch.zeros(FIRST_BYTES // 4, device=device))))
    num_bytes = int(min(MOST_BYTES, max(FIRST_BYTES, FIRST_BYTES * MEASURED_S / first_s)))
    large = torch.zeros(num_bytes // 4, device=device)
    seconds = statistics.median(_all_reduce_s(large) for _ in range(BANDWIDTH_ROUNDS))
    # What a ring sends and receives on each rank, whatever their number.
    moved = 2 * (size - 1) / size * num_bytes
    mb_per_s = round(moved / seconds / 1e6, 1)
    gradients_s = 4 * SHOWN_WEIGHTS * seconds / num_bytes
    found = f"{mb_per_s:,} MB/s ({num_bytes / 2**20:.0f} MiB); fp32 gradients of 100M weights take {gradients_s:.1f} s"
    return [
        Finding("all-reduce latency", f"{latency_us:,} µs", value=latency_us, unit="us"),
        Finding("all-reduce bandwidth", found, value=mb_per_s, unit="MB/s"),
    ]


def _all_reduce_s(values: torch.Tensor) -> float:
    started = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _clocks(hosts: list[str]) -> Finding:
    """How far the clocks of the ranks are from rank 0's, within the time that a small collective takes."""
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        rounds.append(gathered(time.time()))
    offsets_s = [statistics.median(each[rank] - each[0] for each in rounds) for rank in range(len(hosts))]
    return clock_finding(offsets_s, hosts)


def clock_finding(offsets_s: list[float], hosts: list[str]) -> Finding:
    """Return what clocks that differ so much from rank 0's mean."""
    worst = max(range(len(hosts)), key=lambda rank: abs(offsets_s[rank]))
    off_s = abs(offsets_s[worst])
    found = f"{off_s * 1e3:.0f} ms apart at most"
    if off_s < CLOCK_NOTE_S:
        return Finding("clocks", found, value=round(off_s, 4), unit="s")
    found = f"{found}, between {hosts[0]} and {hosts[worst]}: times in logs and of files don't compare"
    state: State = "problem" if off_s > CLOCK_PROBLEM_S else "note"
    return Finding("clocks", found, state, "sudo timedatectl set-ntp true", value=round(off_s, 4), unit="s")


def _folder(folder: Path, hosts: list[str]) -> list[Finding]:
    """Whether a file of rank 0 is seen by all ranks, and whether its lock keeps them out."""
    is_main = dist.get_rank() == 0
    nonce = gathered(uuid.uuid4().hex)[0]
    path = folder / f".trivet-doctor-{nonce}"
    try:
        held = _written(path, nonce) if is_main else None
        trouble = gathered("")[0]
    except OSError as error:
        held, trouble = None, gathered(error.strerror or "it cannot be written")[0]
    if trouble:
        return [Finding("shared folder", f"{folder} on {hosts[0]}: {trouble}", "problem", f"ls -ld {folder}")]
    seen = gathered(is_main or _sees(path, nonce))
    kept_out = gathered(is_main or not _takes_lock(path))
    dist.barrier()
    if held is not None:
        held.close()
        path.unlink(missing_ok=True)
    return folder_findings(folder, hosts, seen, kept_out)


def folder_findings(folder: Path, hosts: list[str], seen: list[bool], kept_out: list[bool]) -> list[Finding]:
    """Return what it means that these ranks saw rank 0's file, and that its lock kept these out."""
    blind = sorted({host for host, sees in zip(hosts, seen, strict=True) if not sees})
    if blind:
        found = f"{folder}: a file made on {hosts[0]} is not on {', '.join(blind)}; run.dir must be shared"
        return [Finding("shared folder", found, "problem", "trivet train CONFIG run.dir=/a/shared/disk")]
    loose = sorted({host for host, kept in zip(hosts, kept_out, strict=True) if not kept})
    if loose:
        found = f"{folder} is seen by all, yet a lock of {hosts[0]} lets {', '.join(loose)} in: start a run only once"
        return [Finding("shared folder", found, "note", "mount  # with locks: NFS without nolock, Lustre with flock")]
    return [Finding("shared folder", f"{folder} is seen by all ranks, with locks")]


def _written(path: Path, nonce: str) -> Any:
    file = path.open("w", encoding="utf-8")
    file.write(nonce)
    file.flush()
    os.fsync(file.fileno())
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _sees(path: Path, nonce: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if path.read_text(encoding="utf-8") == nonce:
                return True
        except OSError:  # not here, or not yet
            pass
        time.sleep(0.2)
    return False


def _takes_lock(path: Path) -> bool:
    try:
        with path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
