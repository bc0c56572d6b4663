"""What each parallel mode asks of a run config: known before any process is started, so that bad input ends there."""

from typing import Any

from serving.directory import BadInput
from trainer.config import RunConfig

_DEEPSPEED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("optim.type", ("adamw",)),
    ("optim.on_non_finite", ("stop",)),  # its engine clips and steps in one call, and tells the norm afterwards
    ("precision.type", ("fp32", "bf16")),
)
# Mode -> key of the run config, and the values it may have.
ACCEPTED: dict[str, tuple[tuple[str, tuple[Any, ...]], ...]] = {
    "zero1": _DEEPSPEED,
    "zero2": _DEEPSPEED,
    "zero3": (*_DEEPSPEED, ("batch.compile", (False,))),
    # Adafactor keeps what it knows of rows and columns, of which no rank has all.
    "fsdp2": (("optim.type", ("adamw", "sgd")), ("precision.type", ("fp32", "bf16")), ("batch.compile", (False,))),
}


def check(config: RunConfig, mode: str) -> None:
    """Raise BadInput for what the config asks for and the mode cannot do."""
    for key, accepted in ACCEPTED.get(mode.removesuffix("-offload"), ()):
        section, name = key.split(".")
        found = getattr(getattr(config, section), name)
        if found not in accepted:
            listed = ", ".join(str(value).lower() for value in accepted)
            raise BadInput(
                f"{key}: {str(found).lower()} found; accepted with {mode}: {listed}; use that, or --parallel ddp"
            )


def check_on_cpu(config: RunConfig) -> None:
    """Raise BadInput for what only a GPU computes in a sensible time and range."""
    if config.precision.type == "fp16":
        raise BadInput("precision.type: fp16 found, and no GPU; accepted on a CPU: fp32, bf16; use one of them")


def micro_rows(config: RunConfig, world_size: int) -> int:
    """Return the rows of one forward pass on one rank. Raises BadInput where the batch cannot be divided evenly."""
    rows, micro = config.batch.rows, config.batch.micro_rows
    if rows % world_size:
        raise BadInput(f"batch.rows: {rows} rows cannot be shared by {world_size} processes; use a multiple of it")
    share = rows // world_size
    if micro is not None and share % micro:
        raise BadInput(f"batch.micro_rows: {micro} does not divide the {share} rows of a process; use a divisor")
    return micro or share
