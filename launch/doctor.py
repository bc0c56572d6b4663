"""What is installed here, what will really run, what is wrong, and the command that mends it."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

OURS = ("trainer", "serving", "launch")
ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
EXTRAS = {
    "train": "training",
    "export": "export to ONNX",
    "serve-cpu": "serving on CPUs",
    "serve-gpu": "serving on NVIDIA GPUs",
    "sweep": "sweeps",
    "dev": "working on Trivet",
}
TRIED_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # those that `trivet serve` offers
LITTLE_DISK_BYTES = 2 * 1024**3

# An ONNX graph of one Identity node (float x[1] -> y[1]), to see which provider really takes a session.
_IDENTITY_ONNX = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a"
    "0179120a0a08080112040a02080142040a00100d"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's table; `fix` is the command or the step that mends a problem."""

    subject: str
    found: str
    state: Literal["ok", "note", "problem"] = "ok"
    fix: str = ""


def doctor(json_output: bool = False) -> int:
    """Print what was found on this machine, as a table or as JSON; return 1 if something is wrong, else 0."""
    findings = examine()
    healthy = all(finding.state != "problem" for finding in findings)
    if json_output:
        print(json.dumps({"healthy": healthy, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        _print_table(findings)
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Return every finding, in the order of the table. A check that itself breaks is a problem, not a crash."""
    installed = installed_versions()
    gpus = nvidia_gpus()
    checks: list[Callable[[], Iterable[Finding]]] = [
        lambda: machine(gpus),
        lambda: extras(installed, own_requirements(installed), gpu=bool(gpus)),
        lambda: wheel_clash(installed, gpu=bool(gpus)),
        shadows,
        lambda: torch_devices(gpus) if "torch" in installed else [],
        lambda: onnxruntime_providers(gpus) if any(name in installed for name in ONNXRUNTIME_WHEELS) else [],
        lambda: disk(Path.cwd()),
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(Finding("this check", reason, "problem", "reinstall: make clean install"))
    return findings


# --- checks ----------------------------------------------------------------------------------------------------------


def machine(gpus: list[str]) -> list[Finding]:
    """The interpreter, the cores and the GPUs that the driver reports."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("Python", f"{platform.python_version()} in {sys.prefix}"),
        Finding("machine", f"{platform.system()} {platform.machine()}, {cores} CPU cores"),
        Finding("NVIDIA driver", "; ".join(gpus) if gpus else "no GPU found", "ok" if gpus else "note"),
    ]


def extras(installed: dict[str, str], requirements: list[str] | None, *, gpu: bool = False) -> list[Finding]:
    """For every extra the versions that are installed, or the command that installs it.

    `requirements` are those in trivet's own metadata, None where it is not installed. A missing extra is a note:
    nobody needs them all. A version outside the range is a problem.
    """
    if requirements is None:
        return [Finding("trivet", "runs from its sources, not installed", "note", "make install")]
    findings = [Finding("trivet", installed["trivet"])]
    other_serve = (
        "serve-cpu" if "onnxruntime-gpu" in installed or (gpu and "onnxruntime" not in installed) else "serve-gpu"
    )
    for extra, purpose in EXTRAS.items():
        if extra != other_serve:  # never advise the second of two wheels that break each other
            findings += _one_extra(extra, purpose, _needs(extra, requirements), installed)
    return findings


def _needs(extra: str, requirements: list[str]) -> list[str]:
    """The requirements of one extra, those of the extras that it names (`trivet[export]`) included."""
    needed = []
    for text in requirements:
        if f"extra == '{extra}'" in text.replace('"', "'"):
            inner = re.match(r"trivet\[([\w-]+)\]", text)
            needed += _needs(inner[1], requirements) if inner else [text]
    return needed


def _one_extra(extra: str, purpose: str, needed: list[str], installed: dict[str, str]) -> list[Finding]:
    missing = [_name(text) for text in needed if _name(text) not in installed]
    subject, command = f"{extra} ({purpose})", f"pip install 'trivet[{extra}]'"
    if missing:
        return [Finding(subject, f"not installed: {', '.join(missing)}", "note", command)]
    found = Finding(subject, ", ".join(f"{_name(text)} {installed[_name(text)]}" for text in needed))
    wrong = [text for text in needed if _outside(text, installed[_name(text)])]
    return [
        found,
        *(
            Finding(_name(text), f"{installed[_name(text)]}; Trivet needs {text.partition(';')[0]}", "problem", command)
            for text in wrong
        ),
    ]


def wheel_clash(installed: dict[str, str], *, gpu: bool) -> list[Finding]:
    """Two onnxruntime wheels own one folder: the later one wins file by file, and removing either breaks both."""
    wheels = [name for name in ONNXRUNTIME_WHEELS if name in installed]
    if len(wheels) < 2:
        return []
    keep = "onnxruntime-gpu" if gpu and "onnxruntime-gpu" in wheels else wheels[0]
    pip = f"{sys.executable} -m pip"
    fix = f"{pip} uninstall -y {' '.join(wheels)} && {pip} install --no-deps {keep}=={installed[keep]}"
    return [Finding("onnxruntime", f"{' and '.join(wheels)} overwrite each other's files", "problem", fix)]


def shadows() -> list[Finding]:
    """Another distribution that installs a package named as one of ours, or another folder that is imported first."""
    findings = []
    owners = importlib.metadata.packages_distributions()
    home = Path(__file__).resolve().parents[1]
    for name in OURS:
        foreign = sorted({owner for owner in owners.get(name, ()) if owner != "trivet"})
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if foreign:
            fix = f"{sys.executable} -m pip uninstall {' '.join(foreign)}"
            findings.append(Finding(name, f"also installed by {', '.join(foreign)}", "problem", fix))
        elif origin != home / name:
            fix = f"remove or rename {origin}, or leave that folder" if origin else f"reinstall: {name}/ is missing"
            findings.append(Finding(name, f"imported from {origin}, not from {home}", "problem", fix))
    return findings


def torch_devices(gpus: list[str]) -> list[Finding]:
    """What training will run on. A driver without a CUDA build of torch is a problem: training would use the CPU."""
    import torch

    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    threads = f"{torch.get_num_threads()} threads, collectives: {', '.join(backends)}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return [Finding("training runs on", f"{names} (CUDA {torch.version.cuda}); {threads}")]
    if gpus:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        found = f"the CPU: torch {torch.__version__} is a {build} build that cannot use the GPU"
        return [Finding("training runs on", found, "problem", "make clean install, with an up-to-date NVIDIA driver")]
    return [Finding("training runs on", f"the CPU; {threads}")]


def onnxruntime_providers(gpus: list[str]) -> list[Finding]:
    """Which providers really take a session. onnxruntime lists CUDA even where its libraries cannot be loaded."""
    import onnxruntime

    if not hasattr(onnxruntime, "get_available_providers"):
        fix = f"{sys.executable} -m pip install --force-reinstall --no-deps onnxruntime"
        return [Finding("onnxruntime", "an empty shell: another wheel's removal took its files", "problem", fix)]
    offered = onnxruntime.get_available_providers()
    working = [name for name in offered if name in TRIED_PROVIDERS and _takes_a_session(onnxruntime, name)]
    found = ", ".join(name.removesuffix("ExecutionProvider") for name in working)
    if not working:
        return [Finding("serving runs on", "nothing: no provider takes a session", "problem", "make clean install")]
    if "CUDAExecutionProvider" in offered and "CUDAExecutionProvider" not in working and gpus:
        fix = "pip install 'trivet[serve-gpu]' (it brings CUDA 13 and cuDNN 9)"
        return [Finding("serving runs on", f"{found}; CUDA is offered but does not load", "problem", fix)]
    if gpus and "CUDAExecutionProvider" not in offered:
        fix = f"{sys.executable} -m pip uninstall -y onnxruntime && pip install 'trivet[serve-gpu]'"
        return [Finding("serving runs on", f"{found}; this onnxruntime has no CUDA", "note", fix)]
    return [Finding("serving runs on", f"{found} (onnxruntime {onnxruntime.__version__})")]


def _takes_a_session(onnxruntime: Any, provider: str) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a provider that cannot load is what we are looking for
    if provider == "CUDAExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot find
            onnxruntime.preload_dlls()
    try:
        return provider in onnxruntime.InferenceSession(_IDENTITY_ONNX, options, providers=[provider]).get_providers()
    except Exception:  # onnxruntime raises its own C++ exception types
        return False


def disk(folder: Path) -> list[Finding]:
    """Room for checkpoints and models where runs are written."""
    free = shutil.disk_usage(folder).free
    found = f"{free / 1024**3:.1f} GiB free in {folder}"
    if free < LITTLE_DISK_BYTES:
        return [Finding("disk", found, "problem", "free some space, or write elsewhere: run.dir=/other/disk")]
    return [Finding("disk", found)]


# --- reading the machine ---------------------------------------------------------------------------------------------


def installed_versions() -> dict[str, str]:
    """Return normalised distribution name -> version of everything importable here."""
    return {_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def own_requirements(installed: dict[str, str]) -> list[str] | None:
    """Return the requirements in trivet's own metadata, None where it runs without being installed."""
    return importlib.metadata.requires("trivet") or [] if "trivet" in installed else None


def nvidia_gpus() -> list[str]:
    """Return one line for each GPU of the NVIDIA driver: name, memory, driver version. Empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _name(requirement: str) -> str:
    """The normalised distribution name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]*", requirement).group()).lower()  # type: ignore[union-attr]


def _outside(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement  # comes with every package that an extra names

    return not Requirement(requirement).specifier.contains(version, prereleases=True)


def _print_table(findings: list[Finding]) -> None:
    console = Console()
    table = Table(title="Trivet doctor", title_justify="left", show_header=False)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    for finding in findings:
        fix = f"\n[dim]{escape(finding.fix)}[/]" if finding.fix else ""
        table.add_row(marks[finding.state], escape(finding.subject), escape(finding.found) + fix)
    console.print(table)
    problems = [finding for finding in findings if finding.state == "problem"]
    for problem in problems:
        console.print(f"[bold red]{escape(problem.subject)}[/]: {escape(problem.found)}. Fix: {escape(problem.fix)}")
    if not problems:
        console.print("No problem found.")
