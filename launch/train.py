"""One run in this process: `python -m launch.train CONFIG [section.key=value ...]`, alone or under a launcher.

Exit codes: 0 done (also: already finished), 2 bad input, 75 stopped after saving a checkpoint, 130 second Ctrl-C,
1 anything else. Under a launcher's agent a saved stop exits 0, since agents count anything else as a failure.
"""

import os
import sys
from pathlib import Path

from launch import config_file
from launch.config_file import ConfigError
from serving.directory import BadInput
from trainer.config import RunConfig

# Keys that may differ when a run goes on: they change neither what is learned from nor how a step is computed.
_FREE_ON_RESUME = ("run.steps", "checkpoint.", "evaluation.", "log.", "batch.micro_rows", "model.made_by", "run.dir")


def main(argv: list[str] | None = None) -> int:
    """Train the run that the arguments name; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m launch.train CONFIG [section.key=value ...]", file=sys.stderr)
        return 2
    try:
        config = config_file.load(Path(arguments[0]), arguments[1:], RunConfig)
        code = train(config)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    under_agent = "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if code == 75 and under_agent else code


def train(config: RunConfig) -> int:
    """Train a validated config, making its base model first where that is missing; return the exit code."""
    if is_finished(config):
        print(f"{config.run.folder}: already finished; change run.name to train again", file=sys.stderr)
        return 0
    from launch.base_model import ensure_base_model

    ensure_base_model(config)
    from trainer import loop, run_folder

    try:
        return loop.train(config, config_file.to_yaml(config))
    except BadInput:
        raise
    except BaseException as error:
        if int(os.environ.get("RANK", "0")) == 0 and config.run.folder.is_dir():
            previous = run_folder.read_status(config.run.folder) or {}
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            reason = f"{type(error).__name__}: {error}"
            run_folder.write_status(config.run.folder, "failed", code=code, step=previous.get("step", 0), reason=reason)
        raise


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder holds this very run, done. Raises ConfigError if it holds a different one."""
    from trainer.run_folder import read_status

    saved = config.run.folder / "config.yaml"
    if not saved.exists():
        return False
    changed = [
        key
        for key in config_file.differences(config_file.load(saved, [], RunConfig), config)
        if not key.startswith(_FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"run.name: {config.run.folder} holds a different run ({', '.join(changed)} differ); "
            f"choose another run.name, or remove that folder"
        )
    status = read_status(config.run.folder)
    return status is not None and status["state"] == "done" and status["step"] >= config.run.steps


if __name__ == "__main__":
    sys.exit(main())
