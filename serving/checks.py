"""What the proofs of all tasks share: the comparison of texts, and how a difference of logits is judged."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from serving.engine import NEAR_TIE
from serving.text import Text

# The largest logit difference accepted, as a share of how far the source's logits lie apart (`spread`): a difference
# means something only beside that. fp32 rounding was seen at 1e-5 of it, for two random layers as for the 30 of
# SmolLM2-135M; in two layers, one matrix 1% too large gave 6e-2, and a position wrong by one more than 1.
LOGIT_TOLERANCE = 1e-3

# The same for each number format of weights and activations, and for the root of the mean squared difference, which
# finds what the largest one hides among rounding. Largest and mean seen in fp16: 3.5e-2 and 2.9e-3 for SmolLM2-135M,
# up to 5.4e-2 and 3.8e-3 for ten kinds of four random layers; in bf16 (SmolLM2-135M in transformers, for want of a
# GPU) 3.2e-1 and 2.8e-2.
TOLERANCES = {"fp32": LOGIT_TOLERANCE, "fp16": 1e-1, "bf16": 8e-1}
RMS_TOLERANCES = {"fp32": LOGIT_TOLERANCE, "fp16": 8e-3, "bf16": 8e-2}

# What quantisation may cost on held-out text. Never which tokens come out: a rounding turns over what was nearly a tie,
# and all that follows. Of models that predict tokens, the perplexity divided by the source's; of those that decide,
# accuracy, and without right answers the decisions that differ from the source's: accuracy drops by no more than that.
# Of vectors, their mean cosine with the source's. Perplexity may fall no further than it may rise, to one over these:
# rounding knows nothing of the text, and where it helps by chance, it helps by less than it costs elsewhere (x0.989
# seen, random weights in int4). A graph that predicts the text better than its source has other weights.
PERPLEXITY_LIMITS = {"int8": 1.03, "int8-weights": 1.03, "int4": 1.10}
ACCURACY_DROP_LIMIT = 0.01
COSINE_LIMIT = 0.99

# How often the likeliest token must be the source's. An average of losses hides other weights that are as good at the
# text, as of a model before it was fine-tuned; which token it would say does not. Seen: SmolLM2-135M on WikiText 89.5 %
# in int8, 95.7 % in int8-weights, 79.4 % in int4; accepted is about twice as much that differs. Of labels, 98.3 % in
# int4 and 99 % in int8 (MiniLM on SST-2), so up to three times as much: with it, accuracy cannot rise further either.
SAME_TOKEN_FLOORS = {"int8": 0.80, "int8-weights": 0.91, "int4": 0.60}
SAME_LABEL_FLOOR = 0.95

Check = dict[str, Any]
Cases = dict[str, list[dict[str, Any]]]


def check_facts(folder: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> Check:
    """Compare what trivet.json says of the model, and its chat template, with what held when the source was asked."""
    differing = {name: value for name, value in facts.items() if manifest.get(name) != value}
    wrong = [f"{name} is {manifest.get(name)!r}, not {value!r}" for name, value in differing.items()]
    if "chat_template_sha256" in facts:
        asked, served = facts["chat_template_sha256"], Text.open(folder).chat_template_sha256
        wrong += [] if served == asked else [f"the chat template's sha256 is {served}, not {asked}"]
    found = f"{len(wrong)} of {len(facts)} facts differ" + (f", first: {wrong[0]}" if wrong else "")
    return {"passed": not wrong, "found": found, "cases": len(facts), "differ": len(wrong)}


def check_text(folder: Path, cases: Cases) -> Check:
    """Compare the ids of texts and chats, and the text of ids, with the source's tokenizer: equal, or failed.

    `cases` has the lists `texts`, `chats` and `decoded`, or some.
    """
    text = Text.open(folder)
    wrong = []
    for case in cases.get("texts", []):
        if text.encode(case["text"], add_special_tokens=case["add_special_tokens"]) != case["ids"]:
            wrong.append(f"encode({case['text'][:40]!r})")
    for case in cases.get("chats", []):
        now = datetime.fromisoformat(case["now"]) if "now" in case else None
        if not text.has_chat_template or text.chat(case["messages"], now=now) != case["ids"]:
            wrong.append(f"chat({case['messages'][-1]['content'][:40]!r})")
    for case in cases.get("decoded", []):
        if text.decode(case["ids"], skip_special_tokens=case["skip_special_tokens"]) != case["text"]:
            wrong.append(f"decode({case['text'][:40]!r})")
    num_cases = sum(map(len, cases.values()))
    found = f"{len(wrong)} of {num_cases} texts, chats and decodings differ" + (f", first {wrong[0]}" if wrong else "")
    return {"passed": not wrong, "found": found, "cases": num_cases, "differ": len(wrong)}


def graded(max_abs_diff: float, tolerance: float, **facts: int) -> Check:
    """Return the check of a logit difference: passed up to `tolerance`, both absolute. `facts` are counts to keep."""
    found = f"logits differ by {max_abs_diff:.2e}, accepted {tolerance:.2e}"
    passed = max_abs_diff <= tolerance
    return {"passed": passed, "found": found, "max_abs_diff": max_abs_diff, "tolerance": tolerance, **facts}


def graded_mean(check: Check, rms: float, tolerance: float) -> Check:
    """Return the check of a logit difference with that of its root mean square, which must pass too."""
    passed = rms <= tolerance  # not where it is NaN
    found = check["found"] + ("" if passed else f"; root mean square {rms:.2e}, accepted {tolerance:.2e}")
    return check | {"passed": check["passed"] and passed, "found": found, "rms_diff": rms, "rms_tolerance": tolerance}


def near_tie(dtype: str, largest: float) -> float:
    """Return how close the source's two best logits must lie for the other one to be no mistake.

    In half precision, where each logit was seen to move by up to `largest`, they may change places up to twice that.
    """
    return NEAR_TIE if dtype == "fp32" else 2 * largest


def spread(logits_NV: np.ndarray) -> float:
    """Return how far logits lie apart: the standard deviation over the vocabulary, from the middle half of it alone.

    Tokens that a model never says may have logits far below all others, and would make every difference look small.
    """
    some_NV = logits_NV[:: max(1, len(logits_NV) // 64)]
    low_N, high_N = np.percentile(some_NV, (25, 75), axis=-1)
    return float(np.median(high_N - low_N)) / 1.349  # of a normal distribution


def max_abs_diff(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; infinity where either is not finite."""
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else float("inf")
