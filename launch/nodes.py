"""The machines of a run: how many, which of them this is, and where they meet. Accelerate calls them machines too."""

import dataclasses
import socket

from serving.directory import BadInput

DEFAULT_PORT = 29500
JOIN_TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class Nodes:
    """`count` machines that meet at `host`:`port`, which is on the one of rank 0; this one has rank `machine_rank`.

    One that cannot meet the others gives up after `join_timeout_s`.
    """

    count: int
    machine_rank: int
    host: str
    port: int
    join_timeout_s: int = JOIN_TIMEOUT_S

    @property
    def address(self) -> str:
        """Where the machines meet, as one would type it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def launch_flags(self, parallel: str) -> list[str]:
        """Return what `accelerate launch` has to be told; of one machine's launch config nothing else need change."""
        flags = {
            "--num_machines": self.count,
            "--machine_rank": self.machine_rank,
            "--main_process_ip": self.host,
            "--main_process_port": self.port,
            "--rdzv_conf": f"timeout={self.join_timeout_s}",
        }
        if parallel.startswith("zero"):  # its default trains every machine alone where there is no hostfile
            flags["--deepspeed_multinode_launcher"] = "standard"
        return [word for name, value in flags.items() for word in (name, str(value))]


def nodes_of(
    count: int, machine_rank: int | None, main_address: str | None, join_timeout_s: int = JOIN_TIMEOUT_S
) -> Nodes | None:
    """Return the machines that the command line names, None for one machine. Raises BadInput where they don't fit."""
    if count == 1:
        for option, value in (("--machine-rank", machine_rank), ("--main-address", main_address)):
            if value is not None:
                raise BadInput(f"{option}: {value} found without --nodes; accepted: with --nodes 2 or more")
        return None
    if main_address is None:
        raise BadInput(
            f"--main-address: nothing found beside --nodes {count}; accepted: HOST:PORT of the machine of rank 0, the "
            "same on every machine"
        )
    if machine_rank is None or not 0 <= machine_rank < count:
        found = "nothing" if machine_rank is None else machine_rank
        raise BadInput(
            f"--machine-rank: {found} found beside --nodes {count} and --main-address {main_address}; accepted: 0 to "
            f"{count - 1}, another on every machine, 0 on the one of the main address"
        )
    host, port = _split(main_address)
    return Nodes(count, machine_rank, host, port, join_timeout_s)


def _split(main_address: str) -> tuple[str, int]:
    host, colon, port = main_address.rpartition(":")
    if not colon or main_address.endswith("]"):
        host, port = main_address, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise BadInput(f"--main-address: {main_address!r} found; accepted: HOST:PORT with a port from 1 to 65535")
    return host, int(port)


def host_name() -> str:
    """Return what this machine calls itself, to tell it from the others in messages."""
    return socket.gethostname()
