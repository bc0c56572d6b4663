"""Examples that carry no loss, so that a rank may have nothing to learn from in a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trainer.objectives.sft import SFTObjective
from trainer.packing import IGNORED, Encoded, Example


@contextmanager
def silenced(yes: bool) -> Iterator[None]:
    """While open, if `yes`, two chats of three carry no loss."""
    encode = SFTObjective.encode

    def without_loss(self, *args, **kwargs) -> Encoded:
        examples = encode(self, *args, **kwargs)
        return Encoded(
            Example(each.input_ids, np.full_like(each.targets, IGNORED)) if len(each.input_ids) % 3 else each
            for each in examples
        )

    if yes:
        SFTObjective.encode = without_loss
    try:
        yield
    finally:
        SFTObjective.encode = encode
