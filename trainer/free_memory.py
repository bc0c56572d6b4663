"""How much memory this process can still get: from the GPU, or from the machine within the limits set for it."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Where version 2 and version 1 say what a group may take, what it has taken, and what of that is cache of files.
_VERSIONS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory this process can still get on `device`; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([*_machine(), *_address_space(), *_control_groups()], default=None)


def _machine() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        yield _entry(Path("/proc/meminfo"), "MemAvailable:") * 1024


def _address_space() -> Iterator[int]:
    """What `ulimit -v` leaves, where it is set."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            yield limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _control_groups() -> Iterator[int]:
    """What each group above this process may still take. A container sees its own group as the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controller, name = line.split(":", 2)
        if controller in _VERSIONS:
            limit, taken, cache = _VERSIONS[controller]
            root = _CGROUPS / controller
            inside = root / name.lstrip("/")
            for folder in [inside, *inside.parents]:
                if folder.is_relative_to(root):
                    with contextlib.suppress(OSError, ValueError):  # not there, or no limit: "max"
                        used = int((folder / taken).read_text()) - _entry(folder / "memory.stat", cache)
                        yield int((folder / limit).read_text()) - used


def _entry(path: Path, name: str) -> int:
    """The number in the line that starts with `name`. Raises ValueError if there is none."""
    for line in path.read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise ValueError(f"{path}: no {name}")
