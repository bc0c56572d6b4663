"""The plan of a run that is built: its own outline, its own rows, its own mode."""

from trainer import compute, zero
from trainer.build import Parts
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.plan.modes import make_plan
from trainer.plan.plan import Plan
from trainer.plan.recordings import Recordings
from trainer.plan.sketch import run_like


def own_mode(world: World) -> str:
    """Return the mode of a world by the name that plans have for it."""
    return "zero3-offload" if world.name == "zero3" and zero.is_offloaded() else world.name


def planned(config: RunConfig, parts: Parts, *, mode: str, world_size: int) -> Plan | None:
    """Return the plan of one rank of so many in a mode. None where the model cannot be run without memory.

    Nothing of the run is changed, and no rank waits for another.
    """
    world, feed = parts.world, parts.feed
    compute.set_up(parts.outline, config.batch.model_copy(update={"compile": False}))
    on_gpu = world.accelerator.device.type == "cuda"
    try:
        sketch = run_like(parts.outline, world.accelerator.unwrap_model(parts.model), parts.objective)
        return make_plan(Recordings(sketch, config, feed, world_size=world_size, on_gpu=on_gpu), mode)
    except Exception:  # whatever a model's own code makes of tensors without memory: a run does not depend on it
        return None
