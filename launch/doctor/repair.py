"""The commands that mend: for this interpreter, this system and the way Trivet was installed."""

import importlib.metadata
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

from launch.onnxruntime_wheels import has_nvidia_driver

HOME = Path(__file__).resolve().parents[2]  # the clone, or the folder of the installed packages
DRIVERS = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"
CPU_BUILDS = "  # first set PIP_EXTRA_INDEX_URL to an index with CPU builds of torch, or it brings several GB of CUDA"


def pip(*arguments: str) -> str:
    """Return a pip command line for the interpreter that runs now."""
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def install(*requirements: str, options: tuple[str, ...] = ()) -> str:
    """Return the command that installs these requirements.

    Where torch runs on CPUs and is among them, it is torch's tested version, and a remark says where small builds are:
    the newest one of a package index brings CUDA.
    """
    if not any(map(_is_torch, requirements)) or not _wants_cpu_torch():
        return pip("install", *options, *requirements)
    wanted = [tested_torch() if _is_torch(text) else text for text in requirements]
    return pip("install", *options, *wanted) + CPU_BUILDS


def extra(name: str) -> str:
    """Return the command that installs what an extra of Trivet needs; a torch that is there already stays."""
    brings_torch = name in ("train", "export") and _version("torch") is None and _wants_cpu_torch()
    return install(f"trivet[{name}]", *(["torch"] if brings_torch else []))


def reinstall(*, cuda: bool = False) -> str:
    """Return the command that installs everything again at the versions that Trivet is tested with.

    With `cuda` the CUDA build of torch is what is wanted.
    """
    cpu = not cuda and _wants_cpu_torch()
    if is_clone():
        return f"make -C {shlex.quote(str(HOME))} clean install" + (CPU_BUILDS if cpu else "")
    serve = "serve-gpu" if _version("onnxruntime-gpu") else "serve-cpu"  # the two must never share an environment
    return install(f"trivet[train,{serve}]", *(["torch"] if cpu else []), options=("--force-reinstall",))


def own_files() -> str:
    """Return the command that writes Trivet's own files again; in a wheel it leaves every other package as it is."""
    return reinstall() if is_clone() else pip("install", "--force-reinstall", "--no-deps", "trivet")


def is_clone() -> bool:
    """Whether Trivet runs from its repository, whose Makefile installs it; not from a wheel beside other packages."""
    try:
        has_both = (HOME / "Makefile").exists() and (HOME / "requirements.lock").exists()
        return has_both and 'name = "trivet"' in (HOME / "pyproject.toml").read_text()
    except OSError:
        return False


def tested_torch() -> str:
    """Return torch at the version in a clone's lock file; in a wheel, at the lower bound of its requirement."""
    if is_clone():
        texts, pattern = (HOME / "requirements.lock").read_text().splitlines(), r"torch==([\w.]+)"
    else:
        texts = (importlib.metadata.requires("trivet") or []) if _version("trivet") else []
        pattern = r"torch\b.*>=([\w.]+)"
    return next((f"torch=={found[1]}" for text in texts if (found := re.match(pattern, text))), "torch")


def _is_torch(requirement: str) -> bool:
    """Whether this lets pip choose the version of torch."""
    return re.match(r"torch\s*([\[(<>!~;]|$)", requirement) is not None and "==" not in requirement


def _wants_cpu_torch() -> bool:
    """Whether the installed torch is a CPU build, or there is no NVIDIA GPU that another could use."""
    return (_version("torch") or "").endswith("+cpu") or not has_nvidia_driver()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
