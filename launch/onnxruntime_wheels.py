"""The wheels that bring onnxruntime. They own one folder: the later one wins file by file, removing either breaks both.

Found from their metadata, before onnxruntime is loaded: what is in that folder then may not even import.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from serving.directory import BadInput

ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


def wheel_clash(installed: Mapping[str, str], *, gpu: bool) -> tuple[str, str] | None:
    """Return what is wrong and the command that mends it, or None where at most one of the wheels is installed.

    `installed` maps distribution names to versions. Of two wheels the one that can use this machine's GPU is kept.
    """
    wheels = [name for name in ONNXRUNTIME_WHEELS if name in installed]
    if len(wheels) < 2:
        return None
    keep = "onnxruntime-gpu" if gpu and "onnxruntime-gpu" in wheels else wheels[0]
    pip = f"{sys.executable} -m pip"
    fix = f"{pip} uninstall -y {' '.join(wheels)} && {pip} install --no-deps {keep}=={installed[keep]}"
    return f"{' and '.join(wheels)} overwrite each other's files", fix


def refuse_wheel_clash() -> None:
    """Raise BadInput, with the command that mends it, if more than one of the wheels is installed."""
    if clash := wheel_clash(_installed(), gpu=has_nvidia_driver()):
        found, fix = clash
        raise BadInput(f"onnxruntime: {found}; run: {fix}")


def has_nvidia_driver() -> bool:
    """Whether there is an NVIDIA driver, by the signs that the Makefile goes by; nothing is asked of it."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _installed() -> dict[str, str]:
    versions = {}
    for name in ONNXRUNTIME_WHEELS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
