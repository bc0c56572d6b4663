"""One command -> what starts it on every machine: a Slurm batch script, a script over ssh, or a Kubernetes object.

All of them run the same `trivet train` on every machine, which differs in --machine-rank alone, and go by its exit
code: 75 means "run me again", 2 means that the input is at fault and running again will not help.
"""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from launch import processes
from launch.cluster import kubernetes
from launch.nodes import DEFAULT_PORT
from serving.directory import BadInput
from trainer.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, and the machines that it is to have. `name` is the run's."""

    name: str
    config: Path
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    parallel: str

    @property
    def nproc(self) -> int:
        """Processes on each machine: one for each GPU, one without any."""
        return max(1, self.gpus_per_node)

    def train_words(self) -> list[str]:
        """Return the arguments of `trivet` that are the same on every machine."""
        world = ["--nproc", str(self.nproc), "--parallel", self.parallel]
        several = ["--nodes", str(self.nodes)] if self.nodes > 1 else []
        return ["train", str(self.config), *self.overrides, *world, *several]

    def place_words(self, machine_rank: str, main_address: str) -> list[str]:
        """Return the arguments that tell a machine its place, nothing for one machine alone."""
        return ["--machine-rank", machine_rank, "--main-address", main_address] if self.nodes > 1 else []

    def made_by(self, kind: str) -> str:
        """Return the command that makes this job's script."""
        options = ["--nodes", self.nodes, "--gpus-per-node", self.gpus_per_node, "--parallel", self.parallel]
        return shlex.join(map(str, ["trivet", "launch-script", kind, self.config, *self.overrides, *options]))


def _slurm(job: Job) -> str:
    gpus = f"#SBATCH --gpus-per-node={job.gpus_per_node}\n" if job.gpus_per_node else ""
    place = job.place_words('"$SLURM_NODEID"', '"$main_address"')
    return _filled("slurm.sh", job, gpus=gpus, command=" ".join([shlex.join(job.train_words()), *place]))


def _ssh(job: Job) -> str:
    # The whole command stands in double quotes: what another machine's shell gets.
    words = re.sub(r'([\\"$`])', r"\\\1", shlex.join(job.train_words()))
    return _filled("ssh.sh", job, command=" ".join([words, *job.place_words("$1", "${hosts[0]}:$port")]))


def _filled(template: str, job: Job, **values: str) -> str:
    """Return a template of this folder with a value for every @NAME@ in it."""
    kind = template.partition(".")[0]
    values |= {"name": job.name, "nodes": str(job.nodes), "port": str(DEFAULT_PORT), "made_by": job.made_by(kind)}
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1].lower()], text)


KINDS: dict[str, Callable[[Job], str]] = {
    "slurm": _slurm,
    "k8s": kubernetes.jobset,
    "k8s-pytorchjob": kubernetes.pytorchjob,
    "ssh": _ssh,
}


def launch_script(
    kind: str, config_path: Path, overrides: list[str], config: RunConfig, *, nodes: int, gpus: int, parallel: str
) -> str:
    """Return the text of a script or object that trains `config`, read from `config_path`, on several machines.

    Raises BadInput for what would only be found when the machines are there.
    """
    if kind not in KINDS:
        raise BadInput(f"launch-script: {kind!r} found; accepted: {', '.join(KINDS)}")
    if unfit := [word for word in (str(config_path), *overrides) if not word.isprintable()]:
        raise BadInput(f"launch-script: {unfit[0]!r} found; accepted: what fits on one line of a script")
    processes.check_parallel(parallel)
    job = Job(config.run.name, config_path, tuple(overrides), nodes, gpus, parallel)
    from trainer import modes

    modes.check(config, parallel)
    modes.micro_rows(config, job.nproc * nodes)
    return KINDS[kind](job)
