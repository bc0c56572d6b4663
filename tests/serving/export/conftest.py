"""Models that are refused before any work."""

import json
from pathlib import Path

import pytest

from serving.export import ExportError, export_model


def _bare_model(folder: Path, config, **changes) -> Path:
    """Write a config beside weights that no one could load: a refusal shows that nothing tried to."""
    folder.mkdir()
    config.architectures = changes.pop("architectures", [type(config).__name__.replace("Config", "ForCausalLM")])
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    (folder / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture(scope="session")
def bare_model():
    """The function that writes a config beside weights that no one could load."""
    return _bare_model


def _refused(source: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_model(source, tmp_path / "onnx")
    assert not list(tmp_path.glob("*onnx*")), "nothing half-written"


@pytest.fixture(scope="session")
def refused():
    """The function that exports, expects a refusal with that message, and that nothing is left of it."""
    return _refused
