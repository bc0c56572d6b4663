"""The commands about machines: what this one is and can do, and what starts a run on several."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.nodes import JOIN_TIMEOUT_S, nodes_of

app = typer.Typer()

NodesOption = Annotated[int, typer.Option(min=1, help="Machines of the run; this command is started on each.")]
RankOption = Annotated[int | None, typer.Option(help="Which machine this is: 0 to --nodes - 1.", show_default=False)]
AddressOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: on rank 0.", show_default=False)
]
JoinOption = Annotated[int, typer.Option(min=1, help="Seconds that a machine waits for the others.")]


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Measure the network between so many processes instead.")
    ] = None,
    nodes: NodesOption = 1,
    machine_rank: RankOption = None,
    main_address: AddressOption = None,
    join_timeout_s: JoinOption = JOIN_TIMEOUT_S,
) -> None:
    """Say what is installed, what will really run, and what is wrong with its fix."""
    machines = nodes_of(nodes, machine_rank, main_address, join_timeout_s)
    if nproc or machines:
        from launch.doctor.between import doctor_between

        raise typer.Exit(doctor_between(nproc or 1, machines, json_output=json))
    from launch.doctor import doctor

    raise typer.Exit(doctor(json_output=json))


@app.command("launch-script")
def launch_script(
    kind: Annotated[str, typer.Argument(metavar="slurm|k8s|k8s-pytorchjob|ssh", show_default=False)],
    config: Annotated[Path, typer.Argument(help="A config file (.yaml); see configs/.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides.", show_default=False)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; a process for each. 0: one on the CPU.")] = 1,
    parallel: Annotated[str, typer.Option(help="A mode of `trivet train`.")] = "ddp",
) -> None:
    """Print what starts a run on a cluster: a Slurm script, a Kubernetes object, or a script that uses ssh."""
    from launch import config_file
    from launch.cluster import launch_script
    from trainer.config import RunConfig

    words = overrides or []
    loaded = config_file.load(config, words, RunConfig)
    sys.stdout.write(launch_script(kind, config, words, loaded, nodes=nodes, gpus=gpus_per_node, parallel=parallel))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A config file (.yaml); see configs/.", show_default=False)],
    gpu_memory_gb: Annotated[float, typer.Option(help="Memory of one GPU, in 10^9 bytes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all; a process for each.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs: the memory is that of a process.")] = False,
    gpu_tflops: Annotated[
        float | None, typer.Option(help="What one GPU computes at most, in 10^12 FLOP/s.", show_default=False)
    ] = None,
    mfu: Annotated[float, typer.Option(help="The part of that which training reaches.")] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say which parallel modes fit in the memory of so many GPUs, and how long the run takes; nothing is built."""
    from launch import config_file
    from launch.plan import Asked
    from launch.plan import plan as make
    from trainer.config import RunConfig

    words = overrides or []
    asked = Asked(gpus, gpu_memory_gb, on_cpu=cpu, tflops=gpu_tflops, mfu=mfu)
    raise typer.Exit(make(config, words, config_file.load(config, words, RunConfig), asked, json_output=json))
