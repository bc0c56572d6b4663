"""The memory that an export takes: what the program itself needs, and each weight once."""

import subprocess
import sys

import pytest

EXPORT = """
import sys
from pathlib import Path
from launch import collecting
collecting.rarely()  # as the command does
from serving.export import export_model
export_model(sys.argv[1], sys.argv[2])
[line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


@pytest.fixture
def peak_of_export(tmp_path, save_model):
    """Return a function from a number of layers to (bytes of the weights, bytes that their export took at its peak)."""

    def of(num_layers: int) -> tuple[int, int]:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
        folder = save_model(tmp_path / f"{num_layers}", "llama", num_hidden_layers=num_layers, head_dim=128, **sizes)
        command = [sys.executable, "-c", EXPORT, folder, tmp_path / f"onnx-{num_layers}"]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        return (folder / "model.safetensors").stat().st_size, int(ended.stdout)

    return of


@pytest.mark.slow
def test_the_exporting_process_holds_each_weight_once(peak_of_export):
    """The rest of 1.3 times 2.2 GB (see benchmarks/results/export_large.md) is the program, whatever the model."""
    (fewer, least), (more, most) = peak_of_export(4), peak_of_export(16)
    assert (most - least) / (more - fewer) < 1.1, f"{least:,} bytes for {fewer:,}, {most:,} for {more:,}"
