"""Which evaluation was best, and whether a run ends early: pure functions of the scores so far.

Scores are by the step of their evaluation; that before step 0 is none of them. They lie in each checkpoint, so a run
that goes on decides what it would have decided.
"""

from trainer.config import Evaluation

Scores = dict[str, float]


def best_step(scores: Scores, mode: str) -> int | None:
    """Return the step of the best score (the first of equal ones), where `mode` is "min" or "max"; None of none."""
    sign = 1 if mode == "min" else -1
    return min((int(step) for step in scores), key=lambda step: (sign * scores[str(step)], step), default=None)


def reason(config: Evaluation, scores: Scores, mode: str) -> str:
    """Say why the run ends here; nothing where it goes on."""
    if config.patience is None:
        return ""
    sign, reached, waited = (1 if mode == "min" else -1), None, 0
    for step in sorted(map(int, scores)):
        score = sign * scores[str(step)]
        if reached is None or score < reached - config.min_improvement:
            reached, waited = score, 0
        else:
            waited += 1
    if waited < config.patience:
        return ""
    better = f"a score better by {config.min_improvement:g}" if config.min_improvement else "a better score"
    best = best_step(scores, mode)
    return f"stopped early: {waited} evaluations without {better} (evaluation.patience); best: step {best}"
