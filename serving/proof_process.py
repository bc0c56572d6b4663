"""A proof in a process of its own: the memory of the model that was exported and that of the proof never add up.

The process runs this file and prints a line of JSON for each stage, and one for what came of it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from serving.verify import prove


def prove_apart(folder: Path, provider: str, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of `serving.verify.prove`. Raises BadInput like it, and where the process died.

    It ends with this one's call, also when that is interrupted, and with this process, also when that is killed.
    """
    # By its path and not by -m, which would import what lies in the user's folder; the pipe closes when this one dies.
    command = [sys.executable, "-P", __file__, str(folder), provider]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "stage" in said:
                    progress(said["stage"])
                elif "record" in said:
                    return said["record"]
                else:
                    raise BadInput(said["refused"])
        finally:
            process.kill()
    why = "is there too little memory?" if process.returncode == -signal.SIGKILL else "what it said stands above"
    raise BadInput(f"the process of the proof ended with {process.returncode}, so nothing was published; {why}")


def main(folder: str, provider: str) -> None:
    """Prove `folder` and print what comes of it."""

    def end_with_the_exporter() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_the_exporter, daemon=True).start()

    def say(**said: Any) -> None:
        print(json.dumps(said), flush=True)

    try:
        say(record=prove(Path(folder), provider, progress=lambda stage: say(stage=stage)))
    except BadInput as error:
        say(refused=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
