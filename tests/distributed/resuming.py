"""What every rank of a launch runs in which rank 1 sees other checkpoints than rank 0.

Arguments: where results go, the config of a run that is finished, and a checkpoint of it. Each rank stands in a folder
of its own with a copy of that checkpoint; that of rank 1 is then altered, and then gone.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

from launch import config_file
from launch import train as launch_train
from serving.directory import BadInput
from trainer.config import RunConfig

RANK = int(os.environ["RANK"])
MINE = Path("mine")


def train(config: Path, *words: str, **variables: str) -> int | str:
    """Return the exit code of the run, or why it was refused."""
    with mock.patch.dict(os.environ, variables):
        try:
            return launch_train.train(config_file.load(config, list(words), RunConfig))
        except BadInput as error:
            return str(error)


def alter(folder: Path) -> None:
    """Change the last bit of each part of a checkpoint."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def main() -> None:
    results, config, saved = map(Path, sys.argv[1:])
    longer, other = "run.steps=6", "run.name=other"
    restarted = {"TRIVET_RESTARTS": "1"} if RANK == 0 else {}
    seen: dict = {"restarted": train(config, longer, f"checkpoint.resume={saved}", **restarted)}
    shutil.copytree(saved, MINE)
    if RANK == 1:
        alter(MINE)
    seen["altered"] = train(config, other, f"checkpoint.resume={MINE}")
    if RANK == 1:
        shutil.rmtree(MINE)
    seen["gone"] = train(config, other, f"checkpoint.resume={MINE}")
    Path(f"{results}.{RANK}").write_text(json.dumps(seen))


if __name__ == "__main__":
    folder = Path(sys.argv[1]).parent / f"resuming-{RANK}"
    folder.mkdir()
    os.chdir(folder)
    main()
