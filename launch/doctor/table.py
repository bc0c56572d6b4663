"""The findings for a reader: by area, at the width of the terminal, with commands that can be copied as one line."""

import itertools
import textwrap

from rich.console import Console
from rich.text import Text

from launch.doctor.findings import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
MARK_WIDTH, LONGEST_SUBJECT = 10, 22


def print_table(findings: list[Finding]) -> None:
    """Print every finding under its area, then the problems again with their commands."""
    console = Console(highlight=False)
    for area, group in itertools.groupby(findings, key=lambda finding: finding.area):
        console.print(Text(f"\n{area}" if area else "", style="bold"))
        for finding in group:
            _print_finding(console, finding)
    problems = [finding for finding in findings if finding.state == "problem"]
    counted = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:" if problems else "No problem found."
    console.print(Text(f"\n{counted}", style="bold red" if problems else "bold green"))
    for problem in problems:
        console.print(Text(f"{problem.subject}: {problem.found}"))
        _print_command(console, problem.fix, indent=2)


def _print_finding(console: Console, finding: Finding) -> None:
    """One row, wrapped under its own column, and below it the command if it is no problem; those come at the end."""
    indent = MARK_WIDTH + LONGEST_SUBJECT + 2
    subject = finding.subject
    lines = textwrap.wrap(finding.found, max(20, console.width - indent)) or [""]
    console.print(Text(f"  {finding.state}".ljust(MARK_WIDTH), style=STYLES[finding.state]), end="")
    if len(subject) > LONGEST_SUBJECT:
        console.print(Text(subject), soft_wrap=True)
        console.print(Text(" " * indent + lines[0]), soft_wrap=True)
    else:
        console.print(Text(subject.ljust(LONGEST_SUBJECT + 2) + lines[0]), soft_wrap=True)
    for line in lines[1:]:
        console.print(Text(" " * indent + line), soft_wrap=True)
    if finding.state != "problem" and finding.fix:
        _print_command(console, finding.fix, indent=MARK_WIDTH)


def _print_command(console: Console, command: str, *, indent: int) -> None:
    console.print(Text(" " * indent + "$ " + command, style="cyan"), soft_wrap=True)
