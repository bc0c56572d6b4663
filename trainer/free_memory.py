"""How much memory this process can still get: from the GPU, or from the machine within the limits set for it.

Standard library only, but for a GPU: `available_bytes` is for whoever has no torch at hand.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Where version 2 and version 1 say what a group may take, what it has taken, and what of that the kernel gives back
# when it is asked: pages of files, read lately or not, and its own caches.
_NAMES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def free_bytes(device: "torch.device", *, world_size: int = 1, root: Path = Path("/")) -> int | None:
    """Return how much memory this process can still get on `device`; None where nobody says.

    The memory of a machine is shared by the ranks that the launcher put there, or else by all of `world_size`.
    """
    if device.type == "cuda":
        return _of_gpu(device)
    return available_bytes(processes=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), root=root)


def available_bytes(*, processes: int = 1, root: Path = Path("/")) -> int | None:
    """Return what each of so many processes can still get of the memory of this machine; None where nobody says.

    The least of: the machine's, that of each control group above this process, and what `ulimit -v` leaves. Only the
    last is not shared. `root` is where /proc and /sys lie.
    """
    shared = [size // processes for size in (*_machine(root), *_control_groups(root))]
    return min([*shared, *_address_space(root)], default=None)


def group_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of each control group above this process, innermost first.

    A container sees its own group as the root, or is told a name from outside that is not there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        if controllers:  # several may share a folder, and mostly a link for each leads there
            top = top / controller if (top / controller).is_dir() else top / controllers
        inside = top / name.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(top):
                yield (1 if controllers else 2), folder


def _of_gpu(device: "torch.device") -> int:
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _machine(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, KeyError):
        yield _entries(root / "proc/meminfo")["MemAvailable:"] * 1024


def _address_space(root: Path) -> Iterator[int]:
    """What `ulimit -v` leaves, where it is set."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            yield limit - int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _control_groups(root: Path) -> Iterator[int]:
    """What each group above this process may still take."""
    for version, folder in group_folders("memory", root):
        limit, taken, given_back = _NAMES[version]
        with contextlib.suppress(OSError, ValueError):  # not there, or no limit: "max"
            most, entries = int((folder / limit).read_text()), _entries(folder / "memory.stat")
            yield most - int((folder / taken).read_text()) + sum(entries.get(name, 0) for name in given_back)


def _entries(path: Path) -> dict[str, int]:
    """The lines `name number ...` of a file of the kernel's."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}
