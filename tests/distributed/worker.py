"""What every rank of a launch runs: configs one after the other, watched, with what it saw left for the tests.

A run "x.yaml@3" is told to stop, on the last rank only, right after step 3 has been taken there. In a run whose name
begins with "silent", two examples of three carry no loss. In one whose name begins with "dies" the last rank is killed
when it has written its part of its second checkpoint, if it started without any.
"""

import json
import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator
from bytes_held import bytes_held, gradient_bytes  # beside this file
from silent import silenced

from launch import config_file
from launch import train as launch_train
from trainer import checkpoint, distributed
from trainer.config import RunConfig
from trainer.feed import Feed
from trainer.packing import IGNORED

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

finish_for_real, backward_for_real = distributed.finish_step, distributed.backward
parts_for_real, write_for_real, prepare_for_real = Feed.parts_at, checkpoint._write_slices, Accelerator.prepare
stop_after, taken, written, dies = 0, 0, 0, False
seen: dict = {}


def backward(world, model, loss, **kwargs):
    """Measure the gradients after each backward pass, of the second step."""
    backward_for_real(world, model, loss, **kwargs)
    if taken == 1:
        seen["gradients"] = max(seen.get("gradients", 0), gradient_bytes(world, model))


def finish_step(world, model, optimizer, **kwargs):
    """Measure the rest before the second step, and signal after the one that was named."""
    global taken
    if taken == 1:
        seen["bytes"] = {**bytes_held(world, model, optimizer), "gradients": seen["gradients"]}
    norm = finish_for_real(world, model, optimizer, **kwargs)
    taken += 1
    if taken == stop_after and RANK == SIZE - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return norm


def prepare(accelerator, model, *others):
    """Count the weights that lie whole on this rank when the engine takes the model."""
    seen["whole"] = sum(parameter.numel() for parameter in model.parameters())
    return prepare_for_real(accelerator, model, *others)


def parts_at(self, step):
    """Count what carries loss in each of this rank's micro-batches."""
    parts = parts_for_real(self, step)
    examples = [[example for each in part for example in each.row] for part in parts]
    counts = [sum(int((example.targets != IGNORED).sum()) for example in part) for part in examples]
    seen.setdefault("targets", []).append(counts)
    return parts


def write_slices(*args):
    """Write a rank's part of a checkpoint, and die of the second."""
    global written
    write_for_real(*args)
    written += 1
    if dies and written == 2 and RANK == SIZE - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    global stop_after, taken, seen, written, dies
    distributed.finish_step, distributed.backward = finish_step, backward
    Feed.parts_at, checkpoint._write_slices, Accelerator.prepare = parts_at, write_slices, prepare
    codes, found = [], {}
    for argument in sys.argv[2:]:
        path, _, step = argument.partition("@")
        stop_after, taken, seen, written = int(step or 0), 0, {}, 0
        config = config_file.load(Path(path), [], RunConfig)
        dies = config.run.name.startswith("dies") and not config.run.folder.exists()
        with silenced(config.run.name.startswith("silent")):
            codes.append(launch_train.train(config))
        found[config.run.name] = seen
    Path(f"{sys.argv[1]}.{RANK}").write_text(json.dumps({"codes": codes, "seen": found}))


if __name__ == "__main__":
    main()
