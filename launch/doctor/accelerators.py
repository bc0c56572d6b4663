"""Which devices there are, and which one training will run on. torch is imported only in the functions."""

import re
import subprocess

from launch.doctor import repair
from launch.doctor.findings import Finding

# CUDA major version -> oldest driver that runs it, from
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
DRIVER_LIMIT_S = 10.0
HANGING_DRIVER = "nvidia-smi  # if it hangs, start this machine again"


def nvidia_gpus() -> list[str]:
    """Return one line for each GPU of the NVIDIA driver: name, memory, driver version. Empty without a driver.

    Raises TimeoutExpired where the driver hangs.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_LIMIT_S)
    except OSError:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def driver(gpus: list[str], unanswered: list[Finding]) -> list[Finding]:
    """The GPUs that the driver reports, or what was found when it did not answer."""
    found = Finding("NVIDIA driver", "; ".join(gpus) if gpus else "no GPU found", "ok" if gpus else "note")
    return unanswered or [found]


def driver_too_old(cuda: str | None, gpus: list[str]) -> int | None:
    """Return the driver's major version that this CUDA version needs, None if every GPU line has it or says nothing."""
    needed = OLDEST_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    versions = [int(found[1]) for gpu in gpus if (found := re.search(r",\s*(\d+)\.[\d.]+$", gpu))]
    return needed if needed and versions and min(versions) < needed else None


def torch_devices(gpus: list[str]) -> list[Finding]:
    """What training will run on. A driver with a torch that can't use it is a problem: training would use the CPU."""
    import torch

    subject, cuda = "training runs on", torch.version.cuda
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return [Finding(subject, f"{names} (torch {torch.__version__}, CUDA {cuda})")]
    found = f"the CPU (torch {torch.__version__})"
    if not gpus:
        threads = torch.get_num_threads()
        return [Finding(subject, f"{found}; threads: {threads}", value=threads, unit="threads")]
    if cuda is None:
        return [
            Finding(subject, f"{found}: a CPU build that cannot use the GPU", "problem", repair.reinstall(cuda=True))
        ]
    if needed := driver_too_old(cuda, gpus):
        found = f"{found}: its CUDA {cuda} needs NVIDIA driver {needed} or newer"
        return [Finding(subject, found, "problem", repair.driver(needed))]
    found = f"{found}: CUDA {cuda} finds no device that it can use"
    return [Finding(subject, found, "problem", "nvidia-smi && env | grep CUDA_VISIBLE_DEVICES")]
