"""The checks of a quantised model: what it costs on held-out text, and that no row depends on its neighbours.

Its logits are not the source's, so that they are not compared with those; see quality.py for what is. Alone and in a
crowd they are compared with each other.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.checks import CROWD_TOLERANCE, Check, check_text
from serving.engine import Engine
from serving.forward import whole_texts
from serving.manifest import Manifest
from serving.quality import HeldOut, check_perplexity
from serving.request import Request, Sampling
from serving.session import Session
from serving.verify_decoder import Reference, check_logits, check_tokens


class Alone(Reference):
    """What a quantised graph itself says of each text alone."""

    @property
    def tolerance(self) -> float:
        """The largest absolute logit difference that is accepted."""
        return CROWD_TOLERANCE * float(np.concatenate(self.logits_TV).std())


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks of a quantised decoder, calling `report` at the start of each stage; return them by name."""
    reference = Reference.load(folder)
    report("verifying text")
    checks = {"text": check_text(folder, reference.cases)}
    report("verifying quality")
    checks["quality"] = check_perplexity(session, manifest, HeldOut.load(folder))
    if not checks["quality"]["passed"]:
        return checks
    report("verifying rows alone and in a crowd")
    alone = answers_alone(session, manifest, reference)
    checks["logits_padded_batch"] = check_logits(session, manifest, alone, batch=alone.num_short)
    checks["tokens_in_a_crowd"] = check_tokens(session, manifest, alone, crowd=True)
    return checks


def answers_alone(session: Session, manifest: Manifest, reference: Reference) -> Reference:
    """Return what the graph itself says of the reference's prompts, each alone."""
    ids, logits = [], []
    for index, prompt in enumerate(reference.prompts):
        request = Request(str(index), prompt, Sampling(len(reference.ids[index]) - len(prompt), ignore_end=True))
        engine = Engine(manifest, session, slots=1, max_length=len(reference.ids[index]), step_tokens=len(prompt) + 1)
        engine.add(request)
        engine.run()
        ids.append(prompt + request.output_ids)
        logits_TV = whole_texts(session, manifest, [ids[-1][:-1]])[0]
        logits.append(logits_TV[-len(reference.logits_TV[index]) :])
    return Alone(ids, reference.prompt_lengths, logits, {})
