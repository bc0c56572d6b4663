"""What every rank of a launch runs in which rank 1 differs from rank 0 in one thing after another.

Arguments: where results go, the config of a run that never starts, that of one whose data rank 1 prepares for longer
than a collective may take. Each rank stands in a folder of its own, so that what the config names by relative paths
can be another file there.
"""

import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

from launch import config_file
from launch import train as launch_train
from serving.directory import BadInput
from trainer import build, distributed, handshake
from trainer.config import RunConfig

RANK = int(os.environ["RANK"])
SLOW_S = 15  # of tokenising, on rank 1; run.timeout_s is less


def refused(config: RunConfig, variables: dict[str, str], *patches) -> str:
    """Return why the run is refused on this rank when rank 1 has these variables and patches."""
    stack = [mock.patch.dict(os.environ, variables), *patches] if RANK == 1 else []
    for each in stack:
        each.start()
    try:
        launch_train.train(config)
    except BadInput as error:
        return str(error)
    finally:
        for each in stack:
            each.stop()
    return "not refused"


def slow_feed(*args, **kwargs):
    """Prepare the data of this rank slowly, as on a machine whose cache is empty."""
    if RANK == 1:
        time.sleep(SLOW_S)
    return feed_for_real(*args, **kwargs)


feed_for_real = build.make_feed


def main() -> None:
    results, never, slow = map(Path, sys.argv[1:])
    config, lr = (config_file.load(never, words, RunConfig) for words in ([], ["optim.lr=0.5"]))
    code = mock.patch.object(handshake, "_code", return_value={"version of torch": "1.0"})
    seen = {
        "config": refused(lr if RANK else config, {}),
        "code": refused(config, {}, code),
        "world": refused(config, {"WORLD_SIZE": "3"}),
    }
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}):  # two machines, of which each has its own run.dir
        seen["folder"] = refused(config, {})
    seen["data"] = refused(config, {})
    seen["left"] = sorted(str(path) for path in Path().rglob("*"))
    distributed._AFTER_THE_WATCHDOG_S = 0
    build.make_feed = slow_feed
    handshake._TELL_EVERY_S, handshake._STACKS_AFTER = 2, 1
    seen["slow"] = launch_train.train(config_file.load(slow, [], RunConfig))
    Path(f"{results}.{RANK}").write_text(json.dumps(seen))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent / f"rank-{RANK}"
    os.chdir(folder)
    main()
