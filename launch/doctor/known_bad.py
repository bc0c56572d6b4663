"""Versions that are known to break, or to be unsafe, together."""

import dataclasses
from collections.abc import Mapping

from launch.doctor import repair
from launch.doctor.findings import Finding, State
from launch.doctor.packages import contains


@dataclasses.dataclass(frozen=True)
class BadPair:
    """Distributions whose versions all match: what goes wrong then, pip's arguments that mend it, who says so."""

    versions: Mapping[str, str]
    why: str
    fix: tuple[str, ...]
    source: str
    state: State = "problem"


PAIRS = (
    BadPair(
        {"torch": "<2.6"},
        "a weight file can run code in spite of weights_only=True (CVE-2025-32434)",
        ("install", "torch>=2.13,<3"),
        "https://github.com/pytorch/pytorch/security/advisories/GHSA-53q9-r3pm-6pq6",
    ),
    BadPair(
        {"torch": ">=2.6,<2.10"},
        "a weight file can corrupt memory in spite of weights_only=True (CVE-2026-24747)",
        ("install", "torch>=2.13,<3"),
        "https://github.com/pytorch/pytorch/security/advisories/GHSA-63cw-57p8-fm3p",
    ),
    BadPair(
        {"transformers": "<5.0.0rc3", "torch": "<2.6"},
        "resuming from a foreign checkpoint can run its code (CVE-2026-1839)",
        ("install", "transformers>=5.23,<6", "torch>=2.13,<3"),
        "https://github.com/huggingface/transformers/pull/43140",
    ),
    BadPair(
        {"transformers": "<5", "huggingface-hub": ">=1"},
        "transformers 4 refuses to be imported beside huggingface_hub 1 or newer",
        ("install", "transformers>=5.23,<6"),
        "https://github.com/OpenMOSS/MOVA/issues/53 (by a maintainer of huggingface_hub)",
    ),
    BadPair(
        {"optimum-onnx": "<=0.1.0", "transformers": ">=4.58"},
        "optimum-onnx needs transformers below 4.58 and breaks; the next pip install may downgrade transformers",
        ("uninstall", "-y", "optimum-onnx"),
        "https://github.com/huggingface/optimum-onnx/issues/114",
        "note",
    ),
    BadPair(
        {"onnx": "<1.21"},
        "external data of a model can reach files outside its folder (CVE-2026-27489)",
        ("install", "onnx>=1.23,<2"),
        "https://github.com/advisories/GHSA-3r9x-f23j-gc73",
    ),
    BadPair(
        {"onnx": ">=1.23", "protobuf": "<6.31.1"},
        "code that a newer protobuf generated never runs on an older one",
        ("install", "protobuf>=6.31.1"),
        "https://protobuf.dev/support/cross-version-runtime-guarantee; onnx's own metadata",
    ),
    BadPair(
        {"numpy": ">=2", "pandas": "<2.2.2"},
        "this pandas was built for numpy 1: importing it fails or crashes",
        ("install", "--upgrade", "pandas"),
        "https://github.com/numpy/numpy/issues/26191",
    ),
    BadPair(
        {"numpy": ">=2", "onnxruntime": "<1.19"},
        "this onnxruntime was built for numpy 1: importing it fails or crashes",
        ("install", "onnxruntime>=1.31,<2"),
        "https://github.com/microsoft/onnxruntime/issues/21063",
    ),
    BadPair(
        {"numpy": ">=2", "onnxruntime-gpu": "<1.19"},
        "this onnxruntime was built for numpy 1: importing it fails or crashes",
        ("install", "onnxruntime-gpu[cuda,cudnn]>=1.31,<2"),
        "https://github.com/microsoft/onnxruntime/issues/21063",
    ),
    BadPair(
        {"onnxruntime-genai": ">=0", "onnxruntime-gpu": ">=0"},
        "onnxruntime-genai asks for the CPU wheel by name; it overwrites the GPU one at the next pip install",
        ("uninstall", "-y", "onnxruntime-genai"),
        "its metadata: Requires-Dist onnxruntime",
        "note",
    ),
    BadPair(
        {"onnxruntime-gpu": ">=1.31", "nvidia-cublas-cu12": ">=12"},
        "onnxruntime-gpu loads CUDA 13 libraries, those of torch are CUDA 12: it cannot share them",
        ("install", "onnxruntime-gpu[cuda,cudnn]>=1.31,<2"),
        "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider (same major versions)",
        "note",
    ),
    BadPair(
        {"ray": "<2.54"},
        "a web page can stop jobs through Ray's dashboard (CVE-2026-27482); `trivet sweep` starts none",
        ("install", "ray[tune]>=2.60,<2.61"),
        "https://github.com/ray-project/ray/security/advisories/GHSA-q5fh-2hc8-f6rq",
        "note",
    ),
)


def known_bad_pairs(installed: dict[str, str]) -> list[Finding]:
    """Return a finding for every known-bad pair that is installed."""
    if "packaging" not in installed:  # every package of a pair brings it
        return []
    return [
        Finding(
            " + ".join(f"{name} {installed[name]}" for name in pair.versions),
            f"{pair.why}; source: {pair.source}",
            pair.state,
            _pairs_fix(*pair.fix),
        )
        for pair in PAIRS
        if all(name in installed and _matches(wanted, installed[name]) for name, wanted in pair.versions.items())
    ]


def _pairs_fix(verb: str, *arguments: str) -> str:
    return repair.install(*arguments) if verb == "install" else repair.pip(verb, *arguments)


def _matches(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return contains(SpecifierSet(specifier), version)
