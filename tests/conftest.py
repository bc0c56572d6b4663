"""What the tests of several packages share: the command line, run as a user would, in this process."""

import socket
import sys

import pytest

from launch import politeness

politeness.apply()  # the tests phone home as little as the commands do


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Nothing is prepared into the user's own cache, and child processes share this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def trivet(monkeypatch, capfd):
    """Return a function that runs `trivet ARGUMENTS` and returns (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from launch import cli

        monkeypatch.setattr(sys, "argv", ["trivet", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
