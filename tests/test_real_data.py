"""On real data, each objective beats a bag of words or an n-gram model that was fitted on the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the data sets are not there: {DATA}")
@pytest.mark.parametrize("objective", ["causal_lm", "masked_lm", "sft", "classification", "token_classification"])
def test_an_objective_beats_its_baseline_on_real_data(objective, tmp_path):
    command = [sys.executable, "benchmarks/objectives.py", str(DATA), objective, "--json", str(tmp_path / "lines.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    [line] = json.loads((tmp_path / "lines.json").read_text())
    assert line["objective"] == objective
    assert line["beats"], line
