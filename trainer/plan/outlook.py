"""What a run would need in each mode, and how much there is to compute: from its config and data, without its model."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from serving.directory import BadInput
from trainer import hub, model_dir, model_folder, modes
from trainer.config import PretrainedModel, RunConfig
from trainer.dataset import make_feed, prepare_data
from trainer.feed import Feed
from trainer.flops import flops_per_token
from trainer.plan.modes import make_plan, names
from trainer.plan.passes import autocast, without_memory
from trainer.plan.plan import Plan
from trainer.plan.recordings import Recordings
from trainer.plan.sketch import Sketch, sketch
from trainer.strategies import count_parameters

if TYPE_CHECKING:
    from trainer.distributed import World


@dataclass(frozen=True)
class Outlook:
    """`plans`: by mode, from the cheapest; why it cannot be, for a mode that the config does not go with."""

    plans: dict[str, Plan | str]
    learning: int  # weights
    total: int
    tokens_per_step: float
    reads: str  # in tokens and epochs
    flops_per_token: float
    doubt: str


def outlook(config: RunConfig, *, world_size: int, on_gpu: bool) -> Outlook:
    """Return what so many ranks would need. Reads the data, as a run does. Raises BadInput for a run that cannot be."""
    modes.micro_rows(config, world_size)
    if isinstance(config.model, PretrainedModel):
        hub.check_reachable(config.model.path, "model.path")
        model_dir.refuse_unmerged(config.model.path)
        model_folder.check_base(config.model.path, trust_remote_code=config.model.trust_remote_code)
    data = prepare_data(config)
    drawn = sketch(config, data.objective, data.tokenizer)
    feed = make_feed(config, data, cast("World", SimpleNamespace(rank=0, size=world_size)))
    learning, total = count_parameters(drawn.model)
    return Outlook(
        plans=_plans(Recordings(drawn, config, feed, world_size=world_size, on_gpu=on_gpu)),
        learning=learning,
        total=total,
        tokens_per_step=feed.tokens_at(0),
        reads=feed.outlook(config.run.steps),
        flops_per_token=_flops(config, drawn, feed),
        doubt=drawn.doubt,
    )


def _plans(recordings: Recordings) -> dict[str, Plan | str]:
    found: dict[str, Plan | str] = {}
    for mode in names(recordings.world_size):
        try:
            found[mode] = make_plan(recordings, mode)
        except BadInput as error:
            found[mode] = str(error)
    return found


def _flops(config: RunConfig, drawn: Sketch, feed: Feed) -> float:
    with without_memory(drawn.model):
        return flops_per_token(drawn.model, drawn.objective, feed.longest(1), lambda: autocast(config.precision.type))
