"""Free memory, read from a made-up /proc and /sys/fs/cgroup."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import free_memory
from trainer.free_memory import available_bytes, free_bytes, group_folders

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes a machine with so much memory and these files; no launcher, no `ulimit -v`."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(free_memory.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)

    def make(available_kib: int = 10_000, **files: str) -> Path:
        meminfo = (
            f"MemTotal:  {2 * available_kib} kB\nMemFree: 1 kB\nMemAvailable:   {available_kib} kB\n\nHugePages: 0\n"
        )
        for name, text in {"proc/meminfo": meminfo, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def group(folder: str, limit: object, taken: int, stat: str = "", *, version: int = 2) -> dict[str, str]:
    names = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}[version]
    where = f"sys/fs/cgroup/{folder}"
    return {f"{where}/{names[0]}": f"{limit}\n", f"{where}/{names[1]}": f"{taken}\n", f"{where}/memory.stat": stat}


def test_without_limits_it_is_what_the_machine_has(machine):
    assert free_bytes(CPU, root=machine(10_000)) == 10_000 * 1024


def test_where_nobody_says_there_is_no_number(machine, tmp_path):
    assert free_bytes(CPU, root=tmp_path) is None


def test_a_group_of_version_2_leaves_its_limit_less_what_is_not_cache(machine):
    stat = "anon 5\nfile 700\ninactive_file 100\nactive_file 200\nslab_reclaimable 30\nslab_unreclaimable 7\n"
    root = machine(**{"proc/self/cgroup": "0::/box\n"}, **group("box", 5000, 1000, stat))
    assert free_bytes(CPU, root=root) == 5000 - (1000 - 100 - 200 - 30)


def test_a_group_of_version_1_counts_the_caches_of_the_groups_below_too(machine):
    stat = "inactive_file 1\nactive_file 2\ntotal_inactive_file 100\ntotal_active_file 200\n"
    lines = "9:name=systemd:/\n4:memory:/box\n0::/\n"
    root = machine(**{"proc/self/cgroup": lines}, **group("memory/box", 5000, 1000, stat, version=1))
    assert free_bytes(CPU, root=root) == 5000 - (1000 - 100 - 200)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_nested_groups_counts(machine, version):
    top = "memory/" if version == 1 else ""
    none = 9223372036854771712 if version == 1 else "max"
    groups = {
        **group(f"{top}a/b/c", none, 10, version=version),
        **group(f"{top}a/b", 3000, 2500, version=version),
        **group(f"{top}a", 4000, 3000, version=version),
    }
    line = "4:memory:/a/b/c\n" if version == 1 else "0::/a/b/c\n"
    assert free_bytes(CPU, root=machine(**{"proc/self/cgroup": line}, **groups)) == 500


@pytest.mark.parametrize("place", ["memory", "cpu,memory"], ids=["a link for each", "their own folder only"])
def test_controllers_of_version_1_that_share_a_folder_are_found(machine, place):
    lines = {"proc/self/cgroup": "3:cpuset:/\n2:cpu,memory:/box\n"}
    root = machine(**lines, **group(f"{place}/box", 5000, 1000, version=1))
    assert free_bytes(CPU, root=root) == 4000
    assert [version for version, _ in group_folders("memory", root)] == [1, 1]


def test_a_container_that_is_told_its_name_outside_finds_its_group_at_the_root(machine):
    root = machine(**{"proc/self/cgroup": "4:memory:/docker/0123\n"}, **group("memory", 5000, 1000, version=1))
    assert free_bytes(CPU, root=root) == 4000


def test_the_ranks_of_a_machine_share_its_memory_and_its_groups(machine, monkeypatch):
    root = machine(10_000)
    assert available_bytes(processes=4, root=root) == free_bytes(CPU, world_size=4, root=root) == 10_000 * 1024 // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of four ranks, two are on another machine
    assert free_bytes(CPU, world_size=4, root=root) == 10_000 * 1024 // 2
    root = machine(10_000, **{"proc/self/cgroup": "0::/box\n"}, **group("box", 5000, 1000))
    assert free_bytes(CPU, world_size=4, root=root) == 2000


def test_what_ulimit_leaves_is_each_process_s_own(machine, monkeypatch):
    root = machine(10_000_000, **{"proc/self/statm": "7 5 3 1 0 2 0\n"})
    monkeypatch.setattr(free_memory.resource, "getrlimit", lambda _: (1_000_000, 2_000_000))
    expected = 1_000_000 - 7 * resource.getpagesize()
    assert free_bytes(CPU, world_size=4, root=root) == expected


def test_on_this_machine_there_is_a_number():
    assert available_bytes() > 0


def test_without_a_gpu_no_torch_is_loaded():
    code = (
        "import sys; from trainer import free_memory; free_memory.available_bytes(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0
