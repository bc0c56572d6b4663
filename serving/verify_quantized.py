"""The checks of a quantised model: what it costs on held-out text, and that no row depends on its neighbours.

Its logits are not the source's and not compared with those: see quality.py for what is. Alone and in a crowd they are
compared with each other, down to fp32 rounding. Each prompt is one chunk there: where a prompt is cut, fp32 rounding
differs, a quantised activation may turn over, and what follows differs by as much as quantisation itself costs.
Shape letters: V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving.checks import LOGIT_TOLERANCE, Check, check_text, graded, max_abs_diff
from serving.engine import Engine
from serving.manifest import Manifest
from serving.quality import HeldOut, check_perplexity
from serving.request import Request, Sampling
from serving.session import Session
from serving.verify_decoder import CROWD_SLOTS, Reference

NUM_NEW_TOKENS = 16

Said = dict[tuple[int, int], tuple[list[int], np.ndarray]]


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks of a quantised decoder, calling `report` at the start of each stage; return them by name."""
    reference = Reference.load(folder)
    report("verifying text")
    checks = {"text": check_text(folder, reference.cases)}
    report("verifying quality")
    checks["quality"] = check_perplexity(session, manifest, HeldOut.load(folder))
    report("verifying rows alone and in a crowd")
    checks["alone_and_in_a_crowd"] = check_crowd(session, manifest, reference.prompts)
    return checks


def check_crowd(session: Session, manifest: Manifest, prompts: list[list[int]]) -> Check:
    """Compare what the engine computes for each prompt alone, and while others join, decode and leave beside it."""
    alone: Said = {}
    for index, prompt in enumerate(prompts):
        alone |= _decoded(session, manifest, {index: prompt}, slots=1)
    crowd = _decoded(session, manifest, dict(enumerate(prompts)), slots=CROWD_SLOTS)
    differences, wrong = [], 0
    for key, (tokens, logits_V) in alone.items():
        among_others, found_V = crowd.get(key, ([], np.full_like(logits_V, np.nan)))
        if tokens == among_others:
            differences.append(max_abs_diff(found_V, logits_V))
        else:
            wrong += 1
    tolerance = LOGIT_TOLERANCE * float(np.concatenate([logits_V for _, logits_V in alone.values()]).std())
    check = graded(max(differences), tolerance, rows=len(prompts), tokens=len(alone), mismatches=wrong)
    return check | {"passed": check["passed"] and not wrong}


def _decoded(session: Session, manifest: Manifest, prompts: dict[int, list[int]], *, slots: int) -> Said:
    """Return the tokens so far and the next one's logits, by prompt and step. All but the last two prompts join late.

    A step takes all prompts that wait for it, each whole.
    """
    said: Said = {}
    of: dict[Request, int] = {}

    def observe(request: Request, logits_V: np.ndarray) -> None:
        said[of[request], len(request.output_ids)] = list(request.output_ids), logits_V.copy()

    longest = max(map(len, prompts.values())) + NUM_NEW_TOKENS
    settings = {"max_length": longest, "step_tokens": slots * longest, "slots": slots}
    engine = Engine(manifest, session, observe=observe, **settings)
    for number, index in enumerate(reversed(prompts)):
        request = Request(str(index), prompts[index], Sampling(max_new_tokens=NUM_NEW_TOKENS, ignore_end=True))
        of[request] = index
        engine.add(request)
        if number == 1:
            for _ in range(3):
                engine.step()
    engine.run()
    return said
