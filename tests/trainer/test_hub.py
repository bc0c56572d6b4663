"""A model that is nowhere is refused within seconds, before any data is read."""

import pytest
from huggingface_hub import constants

from serving.directory import BadInput
from trainer import hub


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """A hub that refuses every connection, and no proxy that might know better."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.delenv("ALL_PROXY", raising=False)


def test_a_folder_is_taken_as_it_is(tmp_path):
    hub.check_reachable(str(tmp_path), "model.path")


@pytest.mark.parametrize("path", ["runs/no/model", "./model", "/no/model", "../x", "a b"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=r"model\.path: .*: no such folder; check the path"):
        hub.check_reachable(path, "model.path")


@pytest.mark.parametrize("path", ["gpt2", "org/some-model_1.5"])
def test_a_hub_name_without_a_hub_is_refused_at_once(path):
    with pytest.raises(BadInput, match=r"as a hub name it needs http://127\.0\.0\.1:9, which does not answer"):
        hub.check_reachable(path, "model.path")


def test_offline_mode_takes_what_is_cached_and_refuses_the_rest(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: "/cache" if name == "org/cached" else None)
    hub.check_reachable("org/cached", "model.path")
    with pytest.raises(BadInput, match=r"model\.path: org/other: .* not in the cache .*, while HF_HUB_OFFLINE is set"):
        hub.check_reachable("org/other", "model.path")
