"""Manners, set before any library is imported: nothing is sent home, and waiting threads leave the cores to others.

What a user has set stays as it is. Each variable was looked up in the library that reads it. Nothing is needed for
torch, accelerate, PEFT, DeepSpeed, TensorBoard and FastAPI, which send nothing unasked.
"""

import os
from urllib.parse import urlsplit

from serving.directory import BadInput
from trainer.redact import redacted

MANNERS = {
    "DO_NOT_TRACK": "1",  # read by huggingface_hub, and by convention (https://donottrack.sh)
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub; transformers then leaves its versions out of the user agent
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a web service to convert a model on the hub
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: names and hashes of models, and a device id kept in the home folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",  # crash reports to the makers; not what a run logs
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow takes DO_NOT_TRACK only where it says `true`
    # OpenMP threads that wait for each other sleep. By default they spin: where another job has one of the cores, a
    # training step then took four times as long (SmolLM2-135M, two cores).
    "OMP_WAIT_POLICY": "PASSIVE",
}


def apply() -> None:
    """Set what is not set yet, for this process and all that it starts. Call it before any heavy import."""
    for name, value in MANNERS.items():
        os.environ.setdefault(name, value)


def check_hub_address() -> None:
    """Raise BadInput for an HF_ENDPOINT with which huggingface_hub cannot even be imported. Call it before that."""
    address = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(address).port
    except ValueError:  # as where a / in the password ends the host
        raise BadInput(
            f"HF_ENDPOINT: {redacted(address)} found; accepted: http(s)://host or http(s)://host:port; "
            f"in a user or password write / as %2F, @ as %40, ? as %3F and # as %23"
        ) from None
