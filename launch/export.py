"""`trivet export`, and how a verification record is shown."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.locate import model_folder
from serving.verify import VerificationFailed


def export(model: Path, onnx_dir: Path) -> int:
    """Export what `model` points at; return 0, or 1 when the proof failed (nothing is published then)."""
    from serving.export import export_model

    console = Console(stderr=True)
    source = model_folder(model)
    try:
        with console.status("export") as status:
            record = export_model(source, onnx_dir, progress=lambda stage: status.update(f"export: {stage}"))
    except VerificationFailed as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    print_record(onnx_dir, record)
    return 0


def print_record(onnx_dir: Path, record: dict[str, Any]) -> None:
    """Print what was compared, the figures, and on what."""
    table = Table(title=f"{onnx_dir}: verified on {record['provider']}, onnxruntime {record['onnxruntime']}")
    table.add_column("check")
    table.add_column("evidence")
    table.add_column("passed")
    for name, check in record["checks"].items():
        facts = ", ".join(f"{key} {_short(value)}" for key, value in check.items() if key != "passed")
        table.add_row(name, facts, "yes" if check["passed"] else "NO")
    Console().print(table)


def _short(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
