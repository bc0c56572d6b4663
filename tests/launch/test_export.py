"""`trivet export`: what it refuses before torch is loaded."""

import subprocess
import sys

import pytest

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # importing one now raises
from launch.cli import main
main()
"""


@pytest.mark.parametrize("compare", [[], ["--quantize", "int8", "--compare"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--quantize", "int9"], "--quantize: 'int9' is unknown; accepted: int8, int8-weights, int4"),
        (["model", "--dtype", "bf17"], "--dtype: 'bf17' is unknown; accepted: fp32, fp16, bf16"),
        (["model", "--optimize-for", "gpu"], "--optimize-for: 'gpu' is unknown; accepted: cpu, cuda"),
        (["modle"], "modle: no such folder; expected a model directory, a run or a sweep"),
        (["model/config.json"], "model/config.json: is a file; give the folder that it is in"),
    ],
)
def test_a_wrong_option_or_source_is_refused_before_torch_is_loaded(tmp_path, on_path, arguments, compare, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    command = [sys.executable, "-c", WITHOUT_TORCH, "export", *compare, *arguments, "onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
