"""A proof in a process of its own: the memory of the model that was exported and that of the proof never add up.

The process runs this file and prints a line of JSON for each stage, and one for what came of it.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from serving.verify import prove


def prove_apart(folder: Path, provider: str, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of `serving.verify.prove`. Raises BadInput like it, and RuntimeError where the process died.

    It ends with this one's call, also when that is interrupted.
    """
    command = [sys.executable, "-m", "serving.proof_process", str(folder), provider]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
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
    raise RuntimeError(f"the proof of {folder} ended with {process.returncode}; is there too little memory?")


def main(folder: str, provider: str) -> None:
    """Prove `folder` and print what comes of it."""

    def say(**said: Any) -> None:
        print(json.dumps(said), flush=True)

    try:
        say(record=prove(Path(folder), provider, progress=lambda stage: say(stage=stage)))
    except BadInput as error:
        say(refused=str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
