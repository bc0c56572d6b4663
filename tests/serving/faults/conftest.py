"""An export that must be refused, with the evidence, and of which nothing is published."""

import json
from pathlib import Path

import pytest

from serving.directory import BadInput
from serving.export import HeldOutRows, Options, export_model


@pytest.fixture
def failed_checks(failed_checks, record_property):
    """The function that names the failed checks of a spoilt directory; the reason is the evidence."""

    def named(folder: Path, **asked) -> list[str]:
        names = failed_checks(folder, **asked)
        records = json.loads((folder / "verification.json").read_text())["records"]
        record_property("evidence", records[-1]["reason"])
        return names

    return named


@pytest.fixture
def refused(tmp_path, record_property):
    """Return a function that exports, expects a refusal that says `evidence`, and that nothing is left of it."""

    def by(model: Path, evidence: str, **options) -> None:
        held_out = (
            HeldOutRows([{"text": "the quick brown fox " * 200}], "one fox") if "quantization" in options else None
        )
        with pytest.raises(BadInput, match=evidence) as caught:
            export_model(model, tmp_path / "onnx", Options(**options), held_out=held_out)
        assert not (tmp_path / "onnx").exists()
        assert not list(tmp_path.glob(".*"))
        record_property(
            "evidence",
            str(caught.value).replace(str(tmp_path), "").partition("published: ")[2]
            or str(caught.value).rpartition("/")[2],
        )

    return by
