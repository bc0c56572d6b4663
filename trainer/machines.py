"""The machines of a run, as one of its ranks sees them: who formed the world, and over which network ranks talk.

Standard library only: what looks at a machine before torch is there imports it too.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Mapping

from serving.directory import BadInput

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_ANY_PORT = 9  # connecting a datagram socket sends nothing: any port will do


def refuse_lone_worlds(environment: Mapping[str, str] = os.environ) -> None:
    """Raise BadInput where a launcher was asked for several processes, but this one would train alone.

    Accelerate starts one process for a CPU launch config of several, and hands a launch config of several machines
    under DeepSpeed to DeepSpeed's launcher, which without a hostfile trains every machine alone. Both end with code 0.
    """
    by_agent = "TORCHELASTIC_RUN_ID" in environment
    with_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if with_deepspeed and not by_agent:
        raise BadInput(
            "deepspeed_multinode_launcher: DeepSpeed's own launcher found, which can train every machine alone; "
            "accepted: standard; write it under deepspeed_config, as in configs/accelerate/multi_node.yaml"
        )
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if by_accelerate and not by_agent and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise BadInput(
            "num_processes: the launch config asks for several processes, but Accelerate started this one alone, as it "
            "does with use_cpu: true or --cpu; accepted on a CPU: distributed_type MULTI_GPU with use_cpu: false, as "
            "configs/accelerate/ddp.yaml has it"
        )


def use_reachable_interface() -> None:
    """Let gloo talk over the network that leads to the main machine, unless GLOO_SOCKET_IFNAME says otherwise.

    Left alone it announces the address of the host's name, often a loopback one that no other machine can reach.
    """
    if GLOO_INTERFACE in os.environ or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return
    if found := interface_towards(os.environ.get("MASTER_ADDR", "")):
        os.environ[GLOO_INTERFACE] = found


def interface_towards(host: str) -> str | None:
    """Return the interface by which this machine reaches `host`, None if that cannot be told.

    That is so for a name that resolves to a loopback address, as a machine's own name often does.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((host, _ANY_PORT))
            own, towards = asking.getsockname()[0], asking.getpeername()[0]
    except (OSError, UnicodeError):
        return None
    if towards.startswith("127.") and host not in (towards, "localhost"):
        return None
    return interface_of(own)


def interface_of(address: str) -> str | None:
    """Return the interface that has this IPv4 address, None if none has; any of 127.0.0.0/8 is the loopback's."""
    if address.startswith("127."):
        address = "127.0.0.1"
    return next((name for name, own in addresses().items() if own == address), None)


def addresses() -> dict[str, str]:
    """Return interface -> IPv4 address, of those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
