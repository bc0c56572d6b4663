"""The `trivet` command line: what each command takes. What it does lies beside it, imported when it is called."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch import cli_machine, cli_serving, politeness
from launch.cli_machine import AddressOption, JoinOption, NodesOption, RankOption
from launch.disk_errors import explain
from launch.extras import missing_extra
from launch.nodes import JOIN_TIMEOUT_S, nodes_of
from launch.onnxruntime_wheels import refuse_wheel_clash
from serving.directory import BadInput
from trainer.guards import RunFailed
from trainer.redact import redacted

app = typer.Typer(
    help="From raw text to a served model: train, export to ONNX with proof, serve with continuous batching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(help="A config file (.yaml); see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides.", show_default=False)
]


def main() -> None:
    """Run the command line. Bad input, a missing extra too, is one line on stderr and exit code 2."""
    politeness.apply()
    try:
        app()
    except BadInput as error:
        _end(2, str(error))
    except RunFailed as error:
        _end(1, str(error))
    except Exception as error:
        if message := missing_extra(error):
            _end(2, message)
        if message := explain(error):
            _end(1, message)
        print(redacted(traceback.format_exc()), file=sys.stderr)
        sys.exit(1)


def _end(code: int, message: str) -> NoReturn:
    print(f"error: {redacted(message)}", file=sys.stderr)
    sys.exit(code)


@app.command()
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    parallel: Annotated[
        str | None,
        typer.Option(help="ddp, zero1, zero2, zero3, zero3-offload or fsdp2; ddp where --nproc is above 1."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|never|PATH", help="What to go on from (checkpoint.resume); auto.")
    ] = None,
    reshard: Annotated[
        bool, typer.Option("--reshard", help="Also from a checkpoint of another mode or number of processes.")
    ] = False,
    nodes: NodesOption = 1,
    machine_rank: RankOption = None,
    main_address: AddressOption = None,
    join_timeout_s: JoinOption = JOIN_TIMEOUT_S,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="After a failure, go on from the last checkpoint, at most so often.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, build everything, train nothing.")
    ] = False,
) -> None:
    """Train one run: from its newest checkpoint if it was stopped, else from the start."""
    from launch import config_file, endings, processes, restarts, roll_call
    from launch import train as one_run
    from trainer import modes
    from trainer.config import RunConfig

    arguments = [*(overrides or [])]
    arguments += [f"checkpoint.resume={resume}"] if resume is not None else []
    arguments += ["checkpoint.reshard=true"] if reshard else []
    run_config = config_file.load(config, arguments, RunConfig)
    processes.check_parallel(parallel or "ddp")
    modes.check(run_config, parallel or "ddp")
    modes.micro_rows(run_config, nproc * nodes)
    is_one_process = nproc * nodes == 1 and parallel is None
    mode = "single" if is_one_process else parallel or "ddp"
    if dry_run:
        return one_run.dry_run(run_config, nproc=nproc, nodes=nodes, mode=mode)
    machines = nodes_of(nodes, machine_rank, main_address, join_timeout_s)
    if is_one_process and not max_restarts:
        raise typer.Exit(one_run.main([str(config), *arguments]))
    env = dict[str, str]()
    if is_one_process:
        argv = processes.train_command(config, arguments)
    else:
        argv, env = processes.accelerate_command(config, arguments, nproc=nproc, parallel=mode, nodes=machines)
        print(processes.show_command(argv, env), file=sys.stderr)
    code = roll_call.start_together(
        argv, env, machines, nproc=nproc, parallel=mode, save_timeout_s=run_config.checkpoint.save_timeout_s,
        start_again=restarts.again(run_config, max_restarts), timeout_s=run_config.run.timeout_s,
    )  # fmt: skip
    if code == endings.INTERRUPTED:
        restarts.tell_failed(run_config, code, "a second Ctrl-C")
    raise typer.Exit(code)


@app.command()
def preview(
    config: ConfigArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch to show.")] = 4,
    step: Annotated[int, typer.Option(min=1, help="The step whose batch is shown; the first is 1.")] = 1,
) -> None:
    """Show real batches with what the loss does to each token, and fail where that cannot be meant."""
    politeness.check_hub_address()
    from launch import config_file
    from launch.preview import preview
    from trainer.config import RunConfig

    raise typer.Exit(preview(config_file.load(config, overrides or [], RunConfig), num_rows=rows, step=step))


@app.command("verify-training")
def verify_training(
    config: ConfigArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps of each run that is compared.")] = 6,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run the exactness that training promises on this config and machine, and print the deviations seen."""
    politeness.check_hub_address()
    from launch import config_file
    from launch.verify_training import verify_training
    from trainer.config import RunConfig

    run_config = config_file.load(config, overrides or [], RunConfig)
    raise typer.Exit(verify_training(run_config, steps=steps, json_output=json))


@app.command()
def sweep(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Compare strategies: many ordinary runs, ranked."""
    from launch import config_file, sweep
    from launch.sweep_config import SweepConfig

    raise typer.Exit(sweep.sweep(config_file.load(config, overrides or [], SweepConfig), config))


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(help="Run or sweep folders.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Where the page goes; default: report.html in the first.")] = None,
) -> None:
    """Write report.html with plots, and print a table."""
    from launch import report

    report.terminal_table(paths)
    print(report.write_report(paths, output))


@app.command()
def init(
    name: Annotated[
        str | None, typer.Argument(help="Name of the task: its config and its run folder.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--from", help="A .csv, .jsonl or .txt file (.gz too), or a folder.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="causal_lm, sft or classification; default: guessed.")] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="The text (causal_lm, classification).")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The class.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="COLUMN", help="What is asked (sft).")] = None,
    completion: Annotated[str | None, typer.Option(metavar="COLUMN", help="What is answered.")] = None,
    context: Annotated[str | None, typer.Option(metavar="COLUMN", help="What follows the prompt, if anything.")] = None,
    messages: Annotated[str | None, typer.Option(metavar="COLUMN", help="Whole chats.")] = None,
    base: Annotated[str | None, typer.Option(help="The model to start from: a folder or a hub name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a config that is there.")] = False,
) -> None:
    """Write a config for your data and say what is in it; without arguments, copy the example configs to ./configs."""
    from launch.init import init
    from launch.init.guesses import Wish

    columns = {"text": text, "label": label, "prompt": prompt, "completion": completion, "context": context}
    columns["messages"] = messages
    wish = Wish(objective, {setting: column for setting, column in columns.items() if column is not None})
    raise typer.Exit(init(name, data, wish, base, force=force))


@app.command("config-docs")
def config_docs(
    key: Annotated[str | None, typer.Argument(help="A section or key: optim, strategy.rank. Default: all.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="The keys of a sweep config.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema, for editors.")] = False,
) -> None:
    """Print every config key with its type, range, default and meaning."""
    from launch import config_docs

    raise typer.Exit(config_docs.config_docs(key, sweep=sweep, schema=schema))


@app.command()
def quickstart(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Fine-tune the model just made from scratch; no model is downloaded.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_NAME", help="Fine-tune this causal model; default: SmolLM2-135M-Instruct."),
    ] = None,
    dir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
) -> None:
    """The whole path on this machine in a few minutes: text, training, export, proof, decoding, serving, report."""
    if tiny and base is not None:
        raise BadInput(f"--base: {base} found beside --tiny, which takes no other model; leave one of them out")
    refuse_wheel_clash()
    politeness.check_hub_address()
    from launch.quickstart import quickstart

    raise typer.Exit(quickstart(dir, tiny=tiny, base=base))


app.add_typer(cli_serving.app)
app.add_typer(cli_machine.app)

if __name__ == "__main__":
    main()
