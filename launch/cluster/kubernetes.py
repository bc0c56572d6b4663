"""The Kubernetes objects of a run on several machines: a JobSet, or a PyTorchJob of Kubeflow's first operator.

A pod is a machine; Trivet starts the processes in it. `trivet` is the container's first process, so it gets SIGTERM.
"""

import re
from typing import TYPE_CHECKING, Any

import yaml

from launch.endings import BAD_INPUT, STOPPED
from launch.nodes import DEFAULT_PORT

if TYPE_CHECKING:
    from launch.cluster import Job

IMAGE, CLAIM, FOLDER = "trivet-train", "trivet", "/work"
SAVE_S = 300  # between SIGTERM and SIGKILL: a step and a checkpoint
MAX_RESTARTS = 3  # after failures; a saved stop is none
_LONGEST_NAME = 40  # the pods' names are made of it, and host names end at 63

_HEADER = """\
# Trains {name} on {nodes} pods. Made by:
#   {made_by}
# Start it with `kubectl apply -f FILE`; the cluster needs {needs}.
# Adapt the image (containers/train.Dockerfile) and the volume claim: one that all pods may write (ReadWriteMany), with
# configs/ and data; runs/ is written there.
# {restarts}
"""


def jobset(job: "Job") -> str:
    """Return the YAML of a JobSet. A pod that saved and stopped is replaced; bad input ends the whole set."""
    name, container = _name(job), "trivet"
    main_address = f"{name}-node-0-0.{name}:{DEFAULT_PORT}"
    pod = _pod(job, container, job.place_words("$(JOB_COMPLETION_INDEX)", main_address))
    pod["restartPolicy"] = "Never"
    ended_with = [
        {"action": action, "onExitCodes": {"containerName": container, "operator": "In", "values": [code]}}
        for action, code in (("FailJob", BAD_INPUT), ("Ignore", STOPPED))
    ]
    evicted = {"type": "DisruptionTarget", "status": "True"}
    spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [*ended_with, {"action": "Ignore", "onPodConditions": [evicted]}]},
        "template": {"spec": pod},
    }
    on_failure = {"name": "badinput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    parts = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": MAX_RESTARTS, "rules": [on_failure]},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
    }
    header = _HEADER.format(
        name=job.name,
        nodes=job.nodes,
        made_by=job.made_by("k8s"),
        needs="JobSet (jobset.sigs.k8s.io)",
        restarts="A pod that is evicted has the run saved, and all pods replaced, which go on from there.",
    )
    return header + _yaml("jobset.x-k8s.io/v1alpha2", "JobSet", name, parts)


def pytorchjob(job: "Job") -> str:
    """Return the YAML of a PyTorchJob, whose operator tells each pod its rank and the main address."""
    pod = _pod(job, "pytorch", job.place_words("$(RANK)", "$(MASTER_ADDR):$(MASTER_PORT)"))
    replicas = {"Master": 1, "Worker": job.nodes - 1}
    parts = {
        "runPolicy": {"backoffLimit": MAX_RESTARTS, "cleanPodPolicy": "None"},
        "pytorchReplicaSpecs": {
            role: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}
            for role, count in replicas.items()
            if count
        },
    }
    header = _HEADER.format(
        name=job.name,
        nodes=job.nodes,
        made_by=job.made_by("k8s-pytorchjob"),
        needs="Kubeflow's Training Operator 1 (kubeflow.org/v1)",
        restarts="Its restart policies cannot tell exit codes 2 and 75 apart, so bad input is tried again as well.",
    )
    return header + _yaml("kubeflow.org/v1", "PyTorchJob", _name(job), parts)


def _pod(job: "Job", container_name: str, place: list[str]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": container_name,
        "image": IMAGE,
        "workingDir": FOLDER,
        "args": [*(word.replace("$(", "$$(") for word in job.train_words()), *place],
        "volumeMounts": [{"name": "work", "mountPath": FOLDER}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if job.gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus_per_node}}
    return {
        "terminationGracePeriodSeconds": SAVE_S,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": CLAIM}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _name(job: "Job") -> str:
    """Return the run's name as Kubernetes takes names: small letters, digits and dashes, beginning with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return name if name[:1].isalpha() else f"run-{name}".strip("-")


def _yaml(api_version: str, kind: str, name: str, spec: dict[str, Any]) -> str:
    whole = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, "spec": spec}
    return yaml.dump(whole, Dumper=_WithoutAliases, sort_keys=False, width=120)


class _WithoutAliases(yaml.SafeDumper):
    """Writes a part that occurs twice, as the two roles' pods do, twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
