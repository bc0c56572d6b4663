"""One run in this process: `python -m launch.train CONFIG [section.key=value ...]`, alone or under a launcher.

Exit codes: 0 done (also: already finished), 2 bad input, 75 stopped after saving a checkpoint, 130 second Ctrl-C,
1 anything else. Under a launcher's agent a saved stop exits 0, since agents count anything else as a failure.
"""

import os
import sys
import traceback
from pathlib import Path

from launch import config_file, processes
from launch.config_file import ConfigError
from serving.directory import BadInput
from trainer.config import PretrainedModel, RunConfig
from trainer.guards import RunFailed

# Keys that may differ when a run goes on: they change neither what is learned from nor how a step is computed.
_FREE_ON_RESUME = ("run.steps", "checkpoint.", "evaluation.", "log.", "batch.micro_rows", "model.made_by", "run.dir")


def main(argv: list[str] | None = None) -> int:
    """Train the run that the arguments name; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        return _end(2, "usage: python -m launch.train CONFIG [section.key=value ...]")
    try:
        code = train(config_file.load(Path(arguments[0]), arguments[1:], RunConfig))
    except BadInput as error:
        return _end(2, f"error: {error}")
    except KeyboardInterrupt:
        return _end(130)
    except Exception as error:
        if not isinstance(error, RunFailed):
            traceback.print_exc()
        return _end(1, f"error: {error}")
    return _end(code)


def train(config: RunConfig) -> int:
    """Train a validated config, making its base model first where that is missing; return the exit code."""
    if is_finished(config):
        print(f"{config.run.folder}: already finished; change run.name to train again", file=sys.stderr)
        return 0
    from launch.base_model import ensure_base_model

    if code := ensure_base_model(config):
        return code
    from trainer import loop, run_folder

    try:
        return loop.train(config, config_file.to_yaml(config))
    except BadInput:
        raise
    except BaseException as error:
        if _rank() == 0 and config.run.folder.is_dir():
            step = (run_folder.read_status(config.run.folder) or {}).get("step", 0)
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            run_folder.write_status(config.run.folder, "failed", code=code, step=step, reason=repr(error))
        raise


def dry_run(config: RunConfig) -> None:
    """Check and build everything a run needs and say what it would do; nothing is written and nothing trained."""
    finished = is_finished(config)
    model = config.model
    if isinstance(model, PretrainedModel) and model.made_by is not None and not Path(model.path).is_dir():
        print(f"{model.path} is not there yet: a run would first train {model.made_by}, checked here instead")
        dry_run(config_file.load(model.made_by, [], RunConfig))
        return
    from trainer.build import build

    feed = build(config).feed
    tokens = sum(feed.tokens_at(step) for step in range(config.run.steps))
    epochs = config.run.steps * config.batch.rows / len(feed.train)
    print(
        f"{config.run.folder}: {config.run.steps} steps of {config.batch.rows} rows, {tokens:,} tokens, "
        f"{epochs:.2f} epochs; {'already finished' if finished else 'nothing was written'}"
    )


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


def _end(code: int, message: str = "") -> int:
    """Say why the run ended, once, and leave the code where a group above the launcher looks for it."""
    if message and _rank() == 0:
        print(message, file=sys.stderr)
    processes.report_exit(code, message)
    return 0 if code == 75 and "TORCHELASTIC_RUN_ID" in os.environ else code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
