"""One run in this process: `python -m launch.train CONFIG [section.key=value ...]`, alone or under a launcher.

Exit codes: 0 done (also: already finished), 2 bad input, 75 stopped after saving a checkpoint, 130 second Ctrl-C,
1 anything else. Under a launcher's agent a saved stop exits 0, since agents count anything else as a failure.
"""

import os
import sys
import traceback
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from launch import config_file, disk_errors, politeness
from launch.config_file import ConfigError
from launch.extras import missing_extra
from serving import format_version
from serving.directory import MANIFEST, BadInput
from trainer import status
from trainer.config import PretrainedModel, RunConfig
from trainer.guards import PeerLost, RunFailed, StopRequest, Unreachable, exit_code
from trainer.redact import redacted

# Keys that may differ when a run goes on: they change neither what is learned from nor how a step is computed. The
# number of steps is among them so that a run can be made longer, which is said: a schedule then follows the new length.
_FREE_ON_RESUME = (
    "run.steps", "checkpoint.", "evaluation.", "log.", "batch.micro_rows", "batch.activation_checkpointing",
    "batch.compile", "optim.on_non_finite", "optim.max_skipped_steps", "model.made_by", "run.dir", "run.timeout_s",
)  # fmt: skip
_SHOWN_DIFFERENCES = 4  # with their values; of more, the names


def main(argv: list[str] | None = None) -> int:
    """Train the run that the arguments name; return the exit code."""
    # Of several ranks none may die of a signal during its imports: the others would wait for it.
    with StopRequest() if "RANK" in os.environ else nullcontext() as stop:
        politeness.apply()
        status.report_start()
        return _main(argv, stop)


def _main(argv: list[str] | None, stop: StopRequest | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        return _end(2, "usage: python -m launch.train CONFIG [section.key=value ...]")
    try:
        config = config_file.load(Path(arguments[0]), arguments[1:], RunConfig)
        code = train(config, stop)
        if code == 0:
            _say(f"model: {config.run.folder}/model; next: {_next_command(config)}")
    except BadInput as error:
        return _end(2, f"error: {error}", alone=isinstance(error, Unreachable))
    except KeyboardInterrupt:
        return _end(130)
    except Exception as error:
        if message := missing_extra(error):
            return _end(2, f"error: {message}")
        explained = str(error) if isinstance(error, RunFailed) else disk_errors.explain(error)
        if not explained:
            print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return _end(1, f"error: {explained or error}", lost=error if isinstance(error, PeerLost) else None)
    return _end(code)


def train(config: RunConfig, stop: StopRequest | None = None) -> int:
    """Train a validated config, making its base model first where that is missing; return the exit code.

    `stop` hears signals already, if given.
    """
    politeness.check_hub_address()
    if is_finished(config):
        _say(f"{config.run.folder}: already finished; change run.name to train again")
        return 0
    from launch.base_model import ensure_base_model

    if code := ensure_base_model(config):
        return code
    from trainer import loop, run_folder

    try:
        return loop.train(config, format_version.comment() + config_file.to_yaml(config), stop)
    except BadInput:
        raise
    except BaseException as error:
        if (status.own_rank() == 0 or getattr(error, "speaks", False)) and config.run.folder.is_dir():
            step = getattr(error, "step", None)
            if step is None:
                step = (run_folder.read_status(config.run.folder) or {}).get("step", 0)
            with suppress(OSError):  # the disk may be why it failed
                reason = str(error) if isinstance(error, PeerLost) else repr(error)
                run_folder.write_status(config.run.folder, "failed", code=exit_code(error), step=step, reason=reason)
        raise


def dry_run(config: RunConfig, *, nproc: int = 1, nodes: int = 1, mode: str = "single") -> None:
    """Check and build everything a run needs and say what it would do; nothing is written and nothing trained.

    Builds it in one process; memory and batch are those of `nproc` processes in a mode on each of `nodes` machines
    like this one.
    """
    politeness.check_hub_address()
    finished = is_finished(config)
    model = config.model
    from trainer import loop, out_of_memory
    from trainer.build import build
    from trainer.modes import micro_rows

    micro_rows(config, nproc * nodes)
    if isinstance(model, PretrainedModel) and model.made_by is not None and not Path(model.path).is_dir():
        _dry_run_without_base(config, model)
        return
    with out_of_memory.while_building(config):
        parts = build(config)
    plan = loop.check_memory(config, parts, mode=mode, world_size=nproc * nodes, nproc=nproc)
    shared = f" of {nproc * nodes} in mode {mode}" if nproc * nodes > 1 else ""
    needs = f", about {out_of_memory.in_words(plan.total_bytes)} of memory for each process{shared}" if plan else ""
    needs += " and about 0.5 GiB more for the program itself" if plan else ""
    feed = parts.feed
    print(
        f"{config.run.folder}: {config.run.steps} steps of {config.batch.rows} rows, {feed.outlook(config.run.steps)}"
        f"{needs}; {'already finished' if finished else 'nothing was written'}"
    )


def _dry_run_without_base(config: RunConfig, model: PretrainedModel) -> None:
    """Check of a run what needs no model, and then the run that makes its base model, where one does."""
    from launch import base_model

    base_model.check_without_base(config)
    print(f"{config.run.folder}: its rows, columns and labels are checked; the rest of it once {model.path} is there")
    if not isinstance(model.made_by, Path):
        print(f"{model.path} is not there yet: a run would first fetch {model.made_by}; nothing was written")
        return
    print(f"{model.path} is not there yet: a run would first train {model.made_by}, which is checked here")
    dry_run(base_model.run_that_makes(Path(model.path), model.made_by))


def is_finished(config: RunConfig) -> bool:
    """Whether the run's folder holds this very run, done.

    Raises ConfigError if it holds a different one, and NewerFormat if a newer Trivet wrote there.
    """
    from trainer import run_folder

    saved = config.run.folder / "config.yaml"
    if not saved.exists():
        _refuse_foreign_files(config)
        return False
    run_folder.refuse_newer(config.run.folder)  # first: a newer format may have other keys in its config
    status = run_folder.read_status(config.run.folder)
    earlier = config_file.load(saved, [], RunConfig)
    different = config_file.differences(earlier, config)
    changed = {key: values for key, values in different.items() if not key.startswith(_FREE_ON_RESUME)}
    if changed:
        raise ConfigError(
            f"run.name: {config.run.folder} holds a different run ({show_differences(changed)}); "
            f"choose another run.name, or remove that folder; of a run that goes on may differ: {_free_keys()}"
        )
    if status is None:
        return False
    if status["step"] > config.run.steps:
        raise ConfigError(f"run.steps: {config.run.steps} found, but the run stands at step {status['step']}; raise it")
    if "run.steps" in different:
        _tell_more_steps(earlier, config, was_done=status["state"] == "done")
    products = [config.run.folder / "model" / MANIFEST, config.run.folder / "result.json"]
    # An early end is the end, unless it is the patience that changed.
    stopped_early = bool(status.get("reason")) and "run.steps" not in different
    is_over = stopped_early and not any(key.startswith("evaluation.") for key in different)
    if config.checkpoint.resume == "never":
        return False
    is_done = status["state"] == "done" and (status["step"] >= config.run.steps or is_over)
    return is_done and all(path.is_file() for path in products)


def _tell_more_steps(earlier: RunConfig, config: RunConfig, *, was_done: bool) -> None:
    """Say what a run with more steps than it was started with does."""
    longer = f"run.steps was {earlier.run.steps} and is {config.run.steps}: "
    if was_done and not any((config.run.folder / "checkpoints").glob("step-*")):
        _say(
            f"{longer}the finished run kept no checkpoint to go on from, so all of it is trained again from step 0; "
            "with checkpoint.every set, it keeps some"
        )
    elif config.optim.schedule != "constant":
        _say(
            f"{longer}the {config.optim.schedule} schedule of the steps to come follows the new length, so this is not "
            f"the run that {config.run.steps} steps at once give"
        )


def _refuse_foreign_files(config: RunConfig) -> None:
    """Raise ConfigError if the run's folder holds something, though no run: a model there would be replaced."""
    folder = config.run.folder
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError(f"run.name: {folder} holds other files ({shown}) and no run; choose another run.name")


def _free_keys() -> str:
    return ", ".join(f"{key}*" if key.endswith(".") else key for key in _FREE_ON_RESUME if key != "run.dir")


def show_differences(changed: dict[str, tuple[Any, Any]]) -> str:
    """Say the first few keys with what stands there and here, and name the others: one line."""
    shown = [f"{key} {_brief(there)} there, {_brief(here)} here" for key, (there, here) in changed.items()]
    others = list(changed)[_SHOWN_DIFFERENCES:]
    return "; ".join(shown[:_SHOWN_DIFFERENCES]) + (f"; also {', '.join(others)}" if others else "")


def _brief(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"...{text[-57:]}"


def _end(code: int, message: str = "", lost: PeerLost | None = None, *, alone: bool = False) -> int:
    """Say why the run ended, once, and leave the code where a group above the launcher looks for it.

    What is wrong with another rank is said by whoever is there first, or by that group; what keeps this rank `alone`
    by itself, or by that group.
    """
    message = redacted(message)
    if alone or (lost is not None and lost.speaks):
        if not status.is_in_group():
            print(message, file=sys.stderr)
    elif message and lost is None:
        _say(message)
    status.report_exit(code, message, status.LOST if lost else "")
    return 0 if code == 75 and "TORCHELASTIC_RUN_ID" in os.environ else code


def _say(text: str) -> None:
    """Print a line, once for all ranks."""
    if status.own_rank() == 0:
        print(text, file=sys.stderr)


def _next_command(config: RunConfig) -> str:
    return f"trivet export {config.run.folder} onnx/{config.run.name}"


if __name__ == "__main__":
    sys.exit(main())
