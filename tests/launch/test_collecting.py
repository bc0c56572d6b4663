"""The collector of cyclic garbage stays out of an export's way."""

import subprocess
import sys

PROGRAM = """
import atexit, gc
from launch import collecting
atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > 1000))  # the first in is the last out
print(gc.get_threshold()[0], gc.get_freeze_count() > 1000)
collecting.rarely()
"""


def test_the_collector_runs_rarely_and_skips_everything_when_the_process_ends():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    (before, frozen), (after, frozen_at_the_end) = (line.split() for line in done.stdout.splitlines())
    assert int(before) < int(after) == 50_000
    assert (frozen, frozen_at_the_end) == ("False", "True")
