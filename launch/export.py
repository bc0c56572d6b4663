"""`trivet export` and `trivet verify`, and how a verification record is shown."""

import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from launch.held_out import held_out_rows, refuse_data
from launch.stopping import stopped, stopped_by_sigterm
from serving.directory import BadInput, read_manifest
from serving.export_options import Options
from serving.export_paths import check_target, find_model
from serving.generation_config import not_served
from serving.loras import lora_names
from serving.manifest import COMMANDS, without_endpoint
from serving.proofs import Unproven, require_verified
from serving.session import check_provider, onnxruntime_version
from serving.verify import VerificationFailed, verify

_COUNTS = ("rows", "positions", "tokens", "mismatches", "near_ties")  # of a check, where it counts them


def export(model: Path, onnx_dir: Path, *, explain: bool = False, data: Path | None = None, **asked: Any) -> int:
    """Export what `model` points at; return 0, or 1 when the proof failed (nothing is published then).

    `asked` are the fields of serving.export_options.Options; `explain`: tell what the graph is made of; `data`:
    held-out text for what quantisation costs.
    SIGTERM ends it as Ctrl-C does: with nothing half-written, and 130.
    """
    if "," in (asked.get("quantization") or ""):
        formats = asked["quantization"]
        raise BadInput(f"--quantize {formats}: an export has one format; give one, or add --compare for each of them")
    console = Console(stderr=True)
    try:
        with stopped_by_sigterm():
            record = _exported(model, onnx_dir, asked, data, console)
    except VerificationFailed as error:
        return _failed(error)
    except KeyboardInterrupt:
        return stopped(f"export: stopped; nothing was written to {onnx_dir}")
    for line in _what_next(onnx_dir, record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if explain and record["provider"] is None:
        print("explain: nothing here runs this graph, so there is nothing to tell of who runs what", file=sys.stderr)
    elif explain:
        print_explanation(onnx_dir, record["provider"])
    return 0


def _exported(
    model: Path, onnx_dir: Path, asked: dict[str, Any], data: Path | None, console: Console
) -> dict[str, Any]:
    """Export, and say on `console` what is being done; return the record of the proof."""
    options = Options(**asked)
    check_target(onnx_dir.resolve(), find_model(model).resolve())
    if options.quantization is None:
        refuse_data(data)
    with console.status("export: loading torch and transformers") as status:
        from serving.export import export_model
        from trainer.strategies.adapter_files import load as attach

        held_out = held_out_rows(model, data) if options.quantization else None
        show = status.update if console.is_terminal else lambda text: print(text, file=sys.stderr, flush=True)
        tell = lambda stage: show(f"export: {stage}")  # noqa: E731
        return export_model(model, onnx_dir, options, held_out=held_out, attach=attach, progress=tell)


def _what_next(onnx_dir: Path, record: dict[str, Any]) -> list[str]:
    """Print the record, if anything could be verified here; return what is still to be done."""
    if record["provider"] is not None:
        print_record(onnx_dir, record)
    if asked := not_served(onnx_dir):
        print(f"note: generation_config.json asks for {', '.join(asked)}, which is not served", file=sys.stderr)
    manifest, folder = read_manifest(onnx_dir, "onnx"), shlex.quote(str(onnx_dir))
    provider = manifest["optimize_for"]
    served_there = "" if provider == "cpu" else f" --provider {provider}"
    if record["provider"] == provider:
        if names := lora_names(manifest):
            return [f"next: trivet generate {folder} --lora {shlex.quote(names[0])} --prompt ...{served_there}"]
        command = COMMANDS[manifest["task"]] if without_endpoint(manifest) else "trivet serve"
        return [f"next: {command} {folder}{_question(manifest, command)}{served_there}"]
    proven = "verified on the CPU alone" if record["provider"] else f"not verified: {record['reason']}"
    return [
        f"{onnx_dir}: {proven}; it is refused on {provider} until it is verified there",
        f"next, on a machine with a GPU: trivet verify {folder}{served_there}",
    ]


def _question(manifest: dict[str, Any], command: str) -> str:
    """Return the options without which `command` answers nothing: the text that `trivet predict` is asked about."""
    if command != "trivet predict":
        return ""
    text = f"... {manifest['mask_token']} ..." if manifest["task"] == "masked_lm" else "..."
    pair = ' --text-pair "..."' if manifest.get("text_pair") == "always" else ""
    return f' --text "{text}"{pair}'


def verify_again(onnx_dir: Path, provider: str) -> int:
    """Prove an ONNX directory again; return 0, or 1 when the proof failed."""
    try:
        record = verify(onnx_dir, provider)
    except VerificationFailed as error:
        return _failed(error)
    print_record(onnx_dir, record)
    return 0


def offer_verification(onnx_dir: Path, provider: str) -> None:
    """On a terminal, ask whether to verify a directory that has no valid proof for this provider, and do so.

    Ends the command where the proof fails. Whatever else may be wrong with the directory is left to those who open it.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    try:
        check_provider(provider)
        require_verified(onnx_dir, provider, onnxruntime_version())
    except Unproven as error:
        if not typer.confirm(f"{error}\nVerify it now?", default=True, err=True):
            raise
        if code := verify_again(onnx_dir, provider):
            raise typer.Exit(code) from None
    except BadInput:
        return


def _failed(error: VerificationFailed) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def print_record(onnx_dir: Path, record: dict[str, Any]) -> None:
    """Print what was compared, the figures, and on what."""
    table = Table(title=f"{onnx_dir}: verified on {record['provider']}, onnxruntime {record['onnxruntime']}")
    table.add_column("check")
    table.add_column("evidence")
    table.add_column("passed")
    for row in check_rows(record):
        table.add_row(*row)
    Console().print(table)


def print_explanation(onnx_dir: Path, provider: str) -> None:
    """Print the graph's nodes by type beside those that onnxruntime runs, and what was left in pieces."""
    from serving.export.explain import explain

    found = explain(onnx_dir, provider)
    table = Table(title=f"{onnx_dir}: {found.nodes.total()} nodes; onnxruntime runs {found.runs.total()}")
    for column in ("node", "in the graph", "run", "by"):
        table.add_column(column, justify="right" if column in ("in the graph", "run") else "left")
    for name in sorted({*found.nodes, *(name for name, _ in found.runs)}, key=lambda name: (-found.nodes[name], name)):
        by = {provider: count for (op_type, provider), count in found.runs.items() if op_type == name}
        table.add_row(name, str(found.nodes[name]), str(sum(by.values())), ", ".join(by))
    console = Console()
    console.print(table)
    console.print(
        "not fused: " + ("; ".join(found.not_fused) or "nothing that could be"), highlight=False, soft_wrap=True
    )


def check_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return one row for each check: its name, what was found and how much was looked at, whether it passed."""
    rows = []
    for name, check in record["checks"].items():
        counts = [f"{check[key]:,} {key.replace('_', ' ')}" for key in _COUNTS if key in check]
        rows.append([name.replace("_", " "), "; ".join([check["found"], *counts]), "yes" if check["passed"] else "NO"])
    return rows
