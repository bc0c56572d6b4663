"""What can be exported, and which faults are refused: the tables, from the tests that show it.

    python benchmarks/support_tables.py

Runs the slow tests of MODELS in tests/serving (every architecture, task and number format; half an hour on two CPU
cores, a test on each) and those of tests/serving/faults (a few minutes), which need no network, and writes what
they recorded to benchmarks/results/support.md. Where a test fails, it stops and leaves that file as it was.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for each of two processes: more would wait for each other
FORMATS = ("fp32", "fp16", "int8", "int8-weights", "int4")
MODELS = ("test_architectures.py", "test_adapters.py", "test_module.py")
TEMPORARY = re.compile(rf"{re.escape(str(Path(tempfile.gettempdir()).resolve()))}/[^\s'\",;:|)]+")
TASKS = {
    "text": "text generation", "label": "one label of a text", "pair": "one label of a pair",
    "labels": "several labels", "number": "a number", "tags": "a label for each word",
    "masks": "masked words", "vector": "embeddings", "tensors": "tensors",
}  # fmt: skip


def main() -> None:
    support, faults = recorded("slow", *MODELS), recorded("not slow", "faults")
    text = "\n\n".join(
        ["# What is exported, and what is refused", about(), *support_table(support), fault_table(faults)]
    )
    (ROOT / "benchmarks" / "results" / "support.md").write_text(text + "\n")
    print(text)


def recorded(marked: str, *where: str) -> dict[str, dict[str, str]]:
    """Run the tests of tests/serving that are there and marked so; return what each recorded, if none failed."""
    paths = [f"tests/serving/{name}" for name in where]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *paths, "-m", marked, "-n", "2"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=True, env={**os.environ, **ONE_THREAD})
        return properties(report)


def properties(report: Path) -> dict[str, dict[str, str]]:
    """Return what each test recorded, by its name; of a temporary path, only its last part."""
    return {
        case.attrib["name"]: {
            each.attrib["name"]: TEMPORARY.sub(lambda path: Path(path.group()).name, each.attrib["value"])
            for each in case.iter("property")
        }
        for case in ElementTree.parse(report).getroot().iter("testcase")
    }


def support_table(found: dict[str, dict[str, str]]) -> list[str]:
    """Return the table of architectures, tasks and formats, and below it why something was refused."""
    lines = [f"| architecture | task | {' | '.join(FORMATS)} |", "|---" * (2 + len(FORMATS)) + "|"]
    reasons: dict[str, int] = {}
    for (name, task), outcomes in sorted(by_model(found).items()):
        cells = [cell(outcomes[each], reasons) if each in outcomes else "-" for each in FORMATS]
        lines.append(f"| {name} | {TASKS[task]} | {' | '.join(cells)} |")
    return ["\n".join(lines), "\n".join(f"{number}. {reason}" for reason, number in reasons.items())]


def by_model(found: dict[str, dict[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """Return the outcomes by architecture and task, without the tests that record none."""
    outcomes = {}
    for test, facts in found.items():
        if facts:
            one, other = re.fullmatch(r".*\[(.+?)-(.+)\]", test).groups()  # type: ignore[union-attr]
            outcomes[(other, one) if one in TASKS else (one, other)] = facts
    return outcomes


def cell(outcome: str, reasons: dict[str, int]) -> str:
    """Return `verified`, or `refused` with the number of the reason, figures left out."""
    if outcome == "verified":
        return outcome
    reason = re.sub(r"\d[\d.e+-]*", "#", outcome)
    return f"refused ({reasons.setdefault(reason, len(reasons) + 1)})"


def fault_table(found: dict[str, dict[str, str]]) -> str:
    """Return the table of faults and of the evidence with which each was refused."""
    lines = ["| fault | refused with |", "|---|---|"]
    for test, facts in sorted((test, facts) for test, facts in found.items() if facts):
        name = test.partition("[")[2].rstrip("-]") or test.removeprefix("test_").partition("[")[0]
        evidence = facts["evidence"].replace("|", "/")
        lines.append(f"| {name.replace('_', ' ')} | {evidence[:240]}{'...' if len(evidence) > 240 else ''} |")
    return "\n".join(lines)


def about() -> str:
    """Return what the tables were made with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    names = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return (
        f"`python benchmarks/support_tables.py` at commit {commit}, {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{versions}. Random models of two to four layers: this is about the graphs, not about the quality of "
        "quantised trained weights, for which see quantization.md."
    )


if __name__ == "__main__":
    main()
