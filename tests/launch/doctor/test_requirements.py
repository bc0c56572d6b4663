"""Requirements that another package breaks, and what mends them without breaking Trivet."""

import sys

from launch.doctor import requirements

PACKAGING = {"packaging": "26.3"}
PIP = f"{sys.executable} -m pip"
OWN = ["torch<3,>=2.13; extra == 'export'", "transformers<6,>=5.23; extra == 'export'"]


def test_a_requirement_of_a_package_that_another_breaks_is_a_problem_where_trivet_uses_the_package(install, by_subject):
    install("torchvision", "0.17.0", requires=["torch==2.2.0"])
    install("torch", "2.13.0")
    installed = {"torchvision": "0.17.0", "torch": "2.13.0"} | PACKAGING
    finding = by_subject(requirements.broken_requirements(installed, []))["torch"]
    assert (finding.state, "torchvision 0.17.0 needs torch==2.2.0" in finding.found) == ("problem", True)


def test_a_requirement_of_a_package_that_trivet_does_not_use_is_a_note(install, by_subject):
    install("someones-plots", "1.0", requires=["torch<2"])
    install("torch", "2.13.0")
    installed = {"someones-plots": "1.0", "torch": "2.13.0"} | PACKAGING
    assert by_subject(requirements.broken_requirements(installed, []))["torch"].state == "note"


def test_requirements_of_extras_and_of_other_systems_are_not_looked_at(install):
    install("some-tool", "1.0", requires=["torch<2; extra == 'old'", "torch<2; sys_platform == 'win32'"])
    install("torch", "2.13.0")
    assert requirements.broken_requirements({"some-tool": "1.0", "torch": "2.13.0"} | PACKAGING, []) == []


def test_a_stray_package_that_wants_an_older_transformers_is_upgraded_or_uninstalled(install, by_subject):
    install("foo", "1.0", requires=["transformers<5"])
    install("transformers", "5.23.0")
    installed = {"foo": "1.0", "transformers": "5.23.0"} | PACKAGING
    finding = by_subject(requirements.broken_requirements(installed, OWN))["transformers"]
    assert finding.state == "note"
    assert finding.fix == f"{PIP} install --upgrade foo transformers==5.23.0  # or: {PIP} uninstall foo"


def test_a_broken_version_outside_trivets_range_is_never_mended_out_of_it(install, by_subject):
    install("foo", "1.0", requires=["transformers<4"])
    install("transformers", "4.5.0")
    installed = {"foo": "1.0", "transformers": "4.5.0"} | PACKAGING
    finding = by_subject(requirements.broken_requirements(installed, OWN))["transformers"]
    assert finding.fix.startswith(f"{PIP} install --upgrade foo 'transformers<6,>=5.23'")


def test_a_package_that_trivet_uses_is_upgraded_where_the_other_version_is_right(install, by_subject):
    install("accelerate", "0.9", requires=["torch<2"])
    install("torch", "2.13.0+cpu")
    installed = {"accelerate": "0.9", "torch": "2.13.0+cpu"} | PACKAGING
    finding = by_subject(requirements.broken_requirements(installed, [*OWN, "accelerate<2,>=1.15"]))["torch"]
    assert (finding.state, finding.fix) == (
        "problem",
        f"{PIP} install --upgrade 'accelerate<2,>=1.15' torch==2.13.0+cpu",
    )


def test_what_a_package_that_trivet_uses_asks_for_is_installed(install, by_subject):
    install("onnx", "1.23.2", requires=["protobuf>=6.31.1"])
    install("protobuf", "5.29.5")
    installed = {"onnx": "1.23.2", "protobuf": "5.29.5"} | PACKAGING
    finding = by_subject(requirements.broken_requirements(installed, ["onnx<2,>=1.23"]))["protobuf"]
    assert (finding.state, finding.fix) == ("problem", f"{PIP} install 'protobuf>=6.31.1'")


def test_a_requirement_that_cannot_be_read_is_a_note_and_the_other_lines_are_compared(install, by_subject):
    install("broken-meta", "1.0", requires=["torch (>=1.0.*)", "transformers<5"])
    install("other-tool", "1.0", requires=["torch<2"])
    install("torch", "2.13.0")
    install("transformers", "5.23.0")
    names = {"broken-meta": "1.0", "other-tool": "1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    findings = by_subject(requirements.broken_requirements(names | PACKAGING, OWN))
    assert findings.keys() == {"broken-meta", "torch", "transformers"}
    assert findings["broken-meta"].state == "note"
    assert "'torch (>=1.0.*)'" in findings["broken-meta"].found
    assert "clean install" not in findings["broken-meta"].fix
