"""The key file of `trivet serve`: refused in one line, before anything else is looked at."""

import pytest

ACCEPTED = "give a text file with one key a line"


@pytest.fixture(autouse=True)
def _no_question_before(monkeypatch):
    monkeypatch.setattr("launch.export.offer_verification", lambda *_: pytest.fail("a proof was offered first"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"cannot be read (No such file or directory); {ACCEPTED}"),
        (b"\xff\xfe", f"cannot be read (not UTF-8 text); {ACCEPTED}"),
        (b" \n", "holds no key; write one a line"),
    ],
)
def test_a_key_file_without_keys_is_named_with_what_is_accepted(tmp_path, trivet, content, message):
    path = tmp_path / "keys.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = trivet("serve", tmp_path / "nowhere", "--api-key-file", path)
    assert (code, out, err) == (2, "", f"error: --api-key-file: {path} {message}\n")


def test_a_folder_is_no_key_file(tmp_path, trivet):
    code, _, err = trivet("serve", tmp_path / "nowhere", "--api-key-file", tmp_path)
    assert (code, err) == (2, f"error: --api-key-file: {tmp_path} cannot be read (Is a directory); {ACCEPTED}\n")
