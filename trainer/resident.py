"""How much memory this process takes, and took at most: as Linux says, elsewhere as getrusage does."""

import resource
import sys
from pathlib import Path


def now_bytes() -> int:
    """Return what it takes now; where nobody says, the most it took so far."""
    return _said("VmRSS") or _by_getrusage()


def peak_bytes() -> int:
    """Return the most it took so far."""
    # getrusage comes second: on Linux it also counts what the parent took when it started this process.
    return _said("VmHWM") or _by_getrusage()


def _said(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _by_getrusage() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
