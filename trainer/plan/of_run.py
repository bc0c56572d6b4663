"""The plan of a run that is built: its own outline, its own rows, its own mode."""

from trainer import compute, modes, zero
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.plan import Plan, make_plan, rows_run
from trainer.plan.sketch import run_like


def planned(config: RunConfig, parts: Parts, *, world_size: int) -> Plan | None:
    """Return the plan of one rank of so many, in the run's mode. None where the model cannot be run without memory.

    Nothing of the run is changed, and no rank waits for another.
    """
    world, feed = parts.world, parts.feed
    mode = world.name if world.size == world_size else "ddp"
    if mode == "zero3" and zero.is_offloaded():
        mode = "zero3-offload"
    compute.set_up(parts.outline, config.batch.model_copy(update={"compile": False}))
    sketch = run_like(parts.outline, world.accelerator.unwrap_model(parts.model), parts.objective)
    row = feed.longest(1)
    batch = feed.longest(rows_run(modes.micro_rows(config, world_size), row["input_ids"].shape[1]))
    on_gpu = world.accelerator.device.type == "cuda"
    try:
        return make_plan(sketch, config, batch, row, mode, world_size=world_size, on_gpu=on_gpu)
    except Exception:  # whatever a model's own code makes of tensors without memory: a run does not depend on it
        return None
