"""The checks of a quantised model: what it costs on held-out text, and that no row depends on its neighbours.

Its logits are not the source's and not compared with those: see quality.py for what is. Alone and in a crowd they are
compared with each other, down to fp32 rounding. Each prompt is one chunk there: where a prompt is cut, fp32 rounding
differs, a quantised activation may turn over, and what follows differs by as much as quantisation itself costs.
Shape letters: V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from serving import verify_rows
from serving.checks import LOGIT_TOLERANCE, Check, check_text, graded, max_abs_diff
from serving.engine import Engine
from serving.manifest import Manifest
from serving.quality import HeldOut, check_quality
from serving.request import Request, Sampling
from serving.session import Session
from serving.tasks import TASKS, Row, run_rows
from serving.text import Text
from serving.verify_decoder import CROWD_SLOTS, Reference

NUM_NEW_TOKENS = 16
NUM_BATCHES, BATCH_ROWS = 4, 8  # of texts that are read whole

Said = dict[tuple[int, int], tuple[list[int], np.ndarray]]


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks of a quantised model, calling `report` at the start of each stage; return them by name."""
    report("verifying text")
    checks = (_text_of_decoder if manifest["task"] == "causal_lm" else _text_of_rows)(folder, manifest, session)
    report("verifying quality")
    held_out = HeldOut.load(folder)
    checks["quality"] = check_quality(session, manifest, held_out)
    report("verifying rows alone and in a crowd")
    if manifest["task"] == "causal_lm":
        checks["alone_and_in_a_crowd"] = check_crowd(session, manifest, Reference.load(folder).prompts)
    else:
        checks["alone_and_in_a_batch"] = check_batch(session, manifest, held_out.rows)
    return checks


def _text_of_decoder(folder: Path, manifest: Manifest, session: Session) -> dict[str, Check]:
    return {"text": check_text(folder, Reference.load(folder).cases)}


def _text_of_rows(folder: Path, manifest: Manifest, session: Session) -> dict[str, Check]:
    reference = verify_rows.Reference.load(folder)
    task = TASKS[manifest["task"]](manifest, session, Text.open(folder))
    return {"text": check_text(folder, reference.cases), "rows": verify_rows.check_rows(task, reference)}


def check_batch(session: Session, manifest: Manifest, rows: list[Row]) -> Check:
    """Compare what the graph says of texts alone, and in batches with others that are cut to their length."""
    differences, sizes, count = [], [], 0
    lengths = sorted({len(row.ids) for row in rows})
    for length in sorted({lengths[len(lengths) * part // NUM_BATCHES] for part in range(NUM_BATCHES)}):
        batch = [_cut(row, length) for row in rows if len(row.ids) >= length][:BATCH_ROWS]
        alone = [run_rows(session, manifest, [row])[0] for row in batch]
        for mine, among_others in zip(alone, run_rows(session, manifest, batch), strict=True):
            if mine.size:  # no mask may be left of a text that was cut
                differences.append(max_abs_diff(among_others, mine))
                sizes.append(float(np.abs(mine).max()))
        count += len(batch)
    return graded(max(differences), LOGIT_TOLERANCE * max(sizes), rows=count)


def _cut(row: Row, length: int) -> Row:
    return Row(row.ids[:length], row.truncated, row.types[:length] if row.types is not None else None)


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
