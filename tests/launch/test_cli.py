"""How the command line ends: what a user sees for what they can mend, and what only we can."""

import pytest

from launch import cli


def fail_with(error: Exception):
    def app():
        raise error

    return app


@pytest.mark.parametrize(("missing", "extra"), [("torch", "train"), ("onnxruntime", "serve-cpu"), ("ray", "sweep")])
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(trivet, monkeypatch, missing, extra):
    monkeypatch.setattr(cli, "app", fail_with(ModuleNotFoundError(f"No module named {missing!r}", name=missing)))
    code, out, err = trivet("train", "x.yaml")
    assert (code, out) == (2, "")
    assert err == f"error: {missing} is not installed, and this command needs it: pip install 'trivet[{extra}]'\n"


def test_a_module_of_ours_that_is_missing_is_no_bad_input(trivet, monkeypatch):
    monkeypatch.setattr(cli, "app", fail_with(ModuleNotFoundError("No module named 'serving.x'", name="serving.x")))
    code, _, err = trivet("doctor")
    assert code == 1
    assert err.startswith("Traceback")
    assert err.rstrip().endswith("ModuleNotFoundError: No module named 'serving.x'")


def test_a_mistyped_command_names_the_nearest(trivet):
    code, _, err = trivet("trian")
    assert code == 2
    assert "Did you mean" in err
