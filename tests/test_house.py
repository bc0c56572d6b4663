"""The house keeps its walls: who may import whom, what stays lazy, and how long a file may be."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trainer", "serving", "launch")
FORBIDDEN = {"trainer": {"serving", "launch"}, "serving": {"trainer", "launch"}, "launch": set()}
DOOR = "serving.directory"  # the one module of serving that trainer may import
TORCH = {"torch", "transformers"}
LONGEST_FILE = 300


def test_packages_import_only_through_the_doors():
    crossed = [
        f"{place} imports {module}"
        for place, package, module in imports_of_the_house()
        if top(module) in FORBIDDEN[package] and not (package == "trainer" and module == DOOR)
    ]
    assert not crossed, crossed


def test_in_serving_only_the_exporter_imports_torch_or_transformers():
    crossed = [
        f"{place} imports {module}"
        for place, package, module in imports_of_the_house()
        if package == "serving" and top(module) in TORCH and not place.startswith("serving/export/")
    ]
    assert not crossed, crossed


def test_in_serving_only_the_session_imports_onnxruntime():
    crossed = [
        f"{place} imports {module}"
        for place, package, module in imports_of_the_house()
        if package == "serving" and top(module) == "onnxruntime" and not place.startswith("serving/session.py:")
    ]
    assert not crossed, crossed


def test_no_import_is_relative():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, relative


@pytest.mark.parametrize(
    ("action", "absent"),
    [
        ("import serving.engine", {"torch", "transformers", "ray"}),
        ("import serving.server", {"torch", "transformers", "ray"}),
        ("sys.argv = ['trivet', '--help']; launch_main()", {"torch", "transformers", "ray", "onnxruntime"}),
    ],
    ids=["serving.engine", "serving.server", "trivet --help"],
)
def test_heavy_packages_are_imported_only_when_they_are_needed(action: str, absent: set[str]):
    loaded = modules_after(action)
    assert not absent & loaded


def test_no_source_file_is_longer_than_300_lines():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert not {name: size for name, size in sizes.items() if size > LONGEST_FILE}


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 10, "the source moved: this test looks at nothing"
    return files


def imports_of_the_house() -> Iterator[tuple[str, str, str]]:
    """Yield (file:line, package, dotted name) for every import; `from a import b` also counts as `a.b`."""
    for path in source_files():
        name = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole_package = "." not in node.module and node.module in PACKAGES
                modules = [f"{node.module}.{alias.name}" for alias in node.names] if whole_package else [node.module]
            else:
                continue
            yield from ((f"{name}:{node.lineno}", name.parts[0], module) for module in modules)


def top(module: str) -> str:
    return module.partition(".")[0]


def modules_after(action: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after `action`."""
    script = f"""
import json, sys
def launch_main():
    from launch.cli import main
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
{action}
print()
print(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))
