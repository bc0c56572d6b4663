"""Two network namespaces joined by one virtual cable, of which the rate can be set: two machines on one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES, ENDS, ADDRESSES = ("trivet-a", "trivet-b"), ("trivet-va", "trivet-vb"), ("10.78.0.1", "10.78.0.2")
# TCP's payload of a full Ethernet frame of 1500 bytes with its header, as tbf counts them.
PAYLOAD = 1448 / 1514


@contextmanager
def joined() -> Iterator[None]:
    """Make the namespaces and the cable; needs root. They are gone afterwards."""
    try:
        for line in (
            *(f"ip netns add {name}" for name in NAMES),
            f"ip link add {ENDS[0]} netns {NAMES[0]} type veth peer name {ENDS[1]} netns {NAMES[1]}",
            *(f"ip -n {n} addr add {a}/24 dev {e}" for n, a, e in zip(NAMES, ADDRESSES, ENDS, strict=True)),
            *(f"ip -n {name} link set {end} up" for name, end in zip(NAMES, ENDS, strict=True)),
            *(f"ip -n {name} link set lo up" for name in NAMES),
        ):
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{line}: {done.stderr.strip()}; network namespaces need root and iproute2")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def throttle(mbit: int | None) -> None:
    """Let each end send so many megabits a second; None: as fast as it goes."""
    for name, end in zip(NAMES, ENDS, strict=True):
        cable = f"ip netns exec {name} tc qdisc replace dev {end} root"
        what = f"tbf rate {mbit}mbit burst 32kb latency 2s" if mbit else "pfifo_fast"
        subprocess.run([*cable.split(), *what.split()], check=True, capture_output=True)


def bytes_sent() -> int:
    """Return the bytes that have left the first machine by the cable."""
    counter = f"/sys/class/net/{ENDS[0]}/statistics/tx_bytes"
    return int(subprocess.check_output(["ip", "netns", "exec", NAMES[0], "cat", counter]))


def run_on_both(*arguments: object) -> None:
    """Run one `trivet` command on both. Raises RuntimeError, with its last words, where one failed."""
    place = ["--nodes", "2", "--main-address", ADDRESSES[0]]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *trivet(*arguments, *place, "--machine-rank", rank)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, name in enumerate(NAMES)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(text[-2000:] for text in said))


def trivet(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "trivet", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def doctor() -> dict[str, float]:
    """Return bytes a second and the seconds of the smallest all-reduce between two processes of this machine."""
    command = trivet("doctor", "--nproc", "2", "--json")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    found = {row["subject"]: row.get("value") for row in json.loads(done.stdout)["findings"]}
    return {"bytes_per_s": found["all-reduce bandwidth"] * 1e6, "latency_s": found["all-reduce latency"] / 1e6}
