"""The commands that mend: for this interpreter, this system and the way Trivet was installed."""

import platform
import shlex
import shutil
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]  # the clone, or the folder of the installed packages
DRIVERS = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"


def pip(*arguments: str) -> str:
    """Return a pip command line for the interpreter that runs now."""
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def extra(name: str) -> str:
    """Return the command that installs what an extra of Trivet needs."""
    return pip("install", f"trivet[{name}]")


def reinstall() -> str:
    """Return the command that installs everything again at the versions that Trivet is tested with."""
    if (HOME / "Makefile").exists() and (HOME / "requirements.lock").exists():
        return f"make -C {shlex.quote(str(HOME))} clean install"
    return pip("install", "--force-reinstall", "trivet[train,serve-cpu]")


def driver(major: int) -> str:
    """Return the command that installs an NVIDIA driver of at least this major version."""
    system = _system()
    if system == "ubuntu":
        return f"sudo apt-get install nvidia-driver-{major}"
    if system == "debian":
        return f"sudo apt-get install nvidia-driver  # it must be {major} or newer"
    return f"# install NVIDIA driver {major} or newer, then start this machine again: {DRIVERS}"


def system_package(debian: str, fedora: str) -> str:
    """Return the command that installs a package of the system."""
    return f"sudo dnf install {fedora}" if shutil.which("dnf") else f"sudo apt-get install {debian}"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:
        return ""
