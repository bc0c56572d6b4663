"""What `trivet doctor --nproc` and `--nodes` ask: how ranks reach each other, and what their machines share."""

import json
import sys
import tempfile
from pathlib import Path

from launch import processes, roll_call
from launch.doctor.findings import Finding
from launch.nodes import Nodes


def doctor_between(nproc: int, nodes: Nodes | None, *, json_output: bool = False) -> int:
    """Start `nproc` ranks on this machine, let all ranks measure, and print what they found, on machine 0 alone.

    Returns 1 if something is wrong, else 0, or the code of the ranks where they did not get that far.
    """
    with tempfile.TemporaryDirectory(prefix="trivet-doctor-") as folder:
        report = Path(folder, "findings.json")
        argv, env = processes.accelerate_command(
            report, [str(Path.cwd())], nproc=nproc, parallel="ddp", nodes=nodes, module="launch.doctor.ranks"
        )
        print(processes.show_command(argv, env), file=sys.stderr)
        code = roll_call.start_together(argv, env, nodes, nproc=nproc, parallel="doctor")
        if code or (nodes and nodes.machine_rank):
            print("machine 0 prints what was found" if not code else "the ranks ended early", file=sys.stderr)
            return code
        findings = [Finding(**fields) for fields in json.loads(report.read_text(encoding="utf-8"))]
    if json_output:
        from launch.doctor import report as whole_report

        print(json.dumps(whole_report(findings), indent=2))
    else:
        from launch.doctor.table import print_table

        print_table(findings)
    return int(any(finding.state == "problem" for finding in findings))
