"""Proof that an ONNX directory answers as its source did. Without torch, on the provider that will serve.

The source's inputs and outputs come from reference.safetensors. Compared are the tokenizer and the chat template, the
logits of whole prompts (one by one and as one padded batch), and the real engine's greedy tokens with the logits behind
each, one by one and in a crowd with chunked prompts. Shape letters: B rows, T tokens, V vocabulary.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from serving.directory import REFERENCE, BadInput, append_verification, check_files, identity, read_manifest
from serving.engine import NEAR_TIE, Engine, check_fields
from serving.forward import whole_texts
from serving.request import Request, Sampling
from serving.session import Session, onnxruntime_version
from serving.text import Text

# The largest logit difference accepted, as a share of the standard deviation of the source's logits: a difference means
# something only beside how far logits lie apart. fp32 rounding was seen at 1e-5 of it, for two random layers as for the
# 30 of SmolLM2-135M; in two layers, one matrix 1% too large gave 6e-2, and a position wrong by one more than 1.
LOGIT_TOLERANCE = 1e-3

CROWD_SLOTS = 4  # fewer than the prompts, so that rows are left and taken again
CROWD_STEP_TOKENS = 7  # fewer than most prompts, so that they come in chunks

Check = dict[str, Any]


class VerificationFailed(BadInput):
    """The ONNX directory does not answer as its source does; the message has the evidence."""


@dataclass(frozen=True)
class Reference:
    """What the source answered: prompts with their greedy continuations, logits over both, texts and chats.

    Of a long text only the last logits are there, so they are looked up from the end.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    logits_TV: list[np.ndarray]
    cases: dict[str, list[dict[str, Any]]]

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read the directory's reference.safetensors."""
        with safe_open(folder / REFERENCE, framework="numpy") as file:
            lengths = file.get_tensor("prompt_lengths").tolist()
            ids = [file.get_tensor(f"ids.{index}").tolist() for index in range(len(lengths))]
            logits = [file.get_tensor(f"logits.{index}") for index in range(len(lengths))]
            cases = {name: json.loads(text) for name, text in file.metadata().items()}
        return cls(ids, lengths, logits, cases)

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts alone."""
        return [ids[:length] for ids, length in zip(self.ids, self.prompt_lengths, strict=True)]

    @property
    def num_short(self) -> int:
        """How many texts, the first ones, have logits at every token."""
        return sum(len(logits_TV) == len(ids) - 1 for ids, logits_TV in zip(self.ids, self.logits_TV, strict=True))

    def next_logits(self, index: int, position: int) -> np.ndarray:
        """Return the logits behind the token at `position` of a text."""
        return self.logits_TV[index][position - len(self.ids[index])]

    @property
    def tolerance(self) -> float:
        """The largest absolute logit difference that is accepted."""
        return LOGIT_TOLERANCE * float(np.concatenate(self.logits_TV).std())


def verify(
    folder: str | Path, provider: str = "cpu", *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compare the ONNX directory with its source and add the record to verification.json; return the record.

    Raises VerificationFailed when a gate fails (the record is kept: the engine then refuses the directory), and
    BadInput when the directory is altered or the provider is not there.
    """
    folder = Path(folder)
    record = prove(folder, provider, progress=progress)
    append_verification(folder, record)
    if not record["passed"]:
        raise VerificationFailed(f"{folder}: not equal to its source: {record['reason']}; export it again")
    return record


def prove(folder: Path, provider: str = "cpu", *, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run all checks and return the record, passed or not, without writing it. Raises BadInput like `verify`."""
    report = progress or (lambda stage: None)
    started = time.perf_counter()
    manifest = read_manifest(folder, "onnx")
    check_files(folder, manifest)
    check_fields(folder, manifest)
    session = Session.open(folder, provider=provider)
    reference = Reference.load(folder)
    report("verifying text")
    checks = {"text": check_text(folder, reference)}
    report("verifying logits")
    checks["logits_one_by_one"] = check_logits(session, manifest, reference, batch=1)
    checks["logits_padded_batch"] = check_logits(session, manifest, reference, batch=reference.num_short)
    report("verifying tokens")
    checks["tokens_one_by_one"] = check_tokens(session, manifest, reference, crowd=False)
    checks["tokens_in_a_crowd"] = check_tokens(session, manifest, reference, crowd=True)
    failed = [f"{name}: {check['found']}" for name, check in checks.items() if not check["passed"]]
    return {
        "provider": provider,
        "onnxruntime": onnxruntime_version(),
        "identity": identity(folder),
        "passed": not failed,
        "reason": "; ".join(failed) or None,
        "checks": checks,
        "seconds": round(time.perf_counter() - started, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# --- the checks ------------------------------------------------------------------------------------------------------


def check_text(folder: Path, reference: Reference) -> Check:
    """Compare the ids of texts and chats, and the text of ids, with the source's tokenizer: equal, or failed."""
    text = Text.open(folder)
    wrong = []
    for case in reference.cases["texts"]:
        if text.encode(case["text"], add_special_tokens=case["add_special_tokens"]) != case["ids"]:
            wrong.append(f"encode({case['text'][:40]!r})")
    for case in reference.cases["chats"]:
        if not text.has_chat_template or text.chat(case["messages"]) != case["ids"]:
            wrong.append(f"chat({case['messages'][-1]['content'][:40]!r})")
    for case in reference.cases["decoded"]:
        if text.decode(case["ids"], skip_special_tokens=case["skip_special_tokens"]) != case["text"]:
            wrong.append(f"decode({case['text'][:40]!r})")
    num_cases = sum(len(cases) for cases in reference.cases.values())
    found = f"{len(wrong)} of {num_cases} texts, chats and decodings differ" + (f", first {wrong[0]}" if wrong else "")
    return {"passed": not wrong, "found": found, "cases": num_cases, "differ": len(wrong)}


def check_logits(session: Session, manifest: dict[str, Any], reference: Reference, *, batch: int) -> Check:
    """Compare the logits of whole texts with all that the reference has, `batch` texts to a run, padded right."""
    texts = [ids[:-1] for ids in reference.ids]
    differences = []
    for start in range(0, len(texts), batch):
        logits_BTV = whole_texts(session, manifest, texts[start : start + batch])
        for index, logits_TV in enumerate(logits_BTV, start):
            expected_TV, end = reference.logits_TV[index], len(texts[index])
            differences.append(_max_abs_diff(logits_TV[end - len(expected_TV) : end], expected_TV))
    positions = sum(map(len, reference.logits_TV))
    return _graded(max(differences), reference, rows=len(texts), positions=positions, batch=batch)


def check_tokens(session: Session, manifest: dict[str, Any], reference: Reference, *, crowd: bool) -> Check:
    """Compare the engine's greedy tokens, and the logits behind them, with the source's.

    One by one, each prompt is one chunk. In a crowd there are fewer slots than prompts, prompts come in chunks, and
    most requests join while others decode. A wrong token is excused where the source's two best logits are a near tie;
    what follows it in its row is another text, and is not compared.
    """
    requests = [
        Request(str(index), prompt, Sampling(max_new_tokens=len(ids) - len(prompt), ignore_end=True))
        for index, (prompt, ids) in enumerate(zip(reference.prompts, reference.ids, strict=True))
    ]
    comparison = _Comparison(reference, requests)
    longest = max(map(len, reference.ids))
    settings = (
        {"slots": CROWD_SLOTS, "step_tokens": CROWD_STEP_TOKENS} if crowd else {"slots": 1, "step_tokens": longest}
    )
    engine = Engine(manifest, session, max_length=longest, observe=comparison.observe, **settings)
    if crowd:
        for request in requests[-2:]:
            engine.add(request)
        for _ in range(3):
            engine.step()
        for request in requests[:-2]:
            engine.add(request)
        engine.run()
    else:
        for request in requests:
            engine.add(request)
            engine.run()
    return comparison.check()


class _Comparison:
    """Follows the engine's requests, whose i-th is the reference's i-th text."""

    def __init__(self, reference: Reference, requests: list[Request]) -> None:
        self._reference = reference
        self._index = {request: index for index, request in enumerate(requests)}
        self._differences = [0.0]

    def observe(self, request: Request, logits_V: np.ndarray) -> None:
        """Compare the logits of the next token, if the tokens so far are the source's."""
        index = self._index[request]
        position = len(request.prompt_ids) + len(request.output_ids)
        if request.prompt_ids + request.output_ids == self._reference.ids[index][:position]:
            self._differences.append(_max_abs_diff(logits_V, self._reference.next_logits(index, position)))

    def check(self) -> Check:
        """Return the result after the engine has run."""
        errors, wrong, near_ties = [], [], 0
        for request, index in self._index.items():
            expected = self._reference.ids[index][len(request.prompt_ids) :]
            step = _first_difference(request.output_ids, expected)
            if request.error:
                errors.append(f"text {index}: {request.error}")
            elif step is None:
                continue
            elif self._margin(index, len(request.prompt_ids) + step) < NEAR_TIE:
                near_ties += 1
            else:
                wrong.append(f"text {index} token {step} is {request.output_ids[step]}, not {expected[step]}")
        check = _graded(
            max(self._differences),
            self._reference,
            rows=len(self._index),
            tokens=sum(len(request.output_ids) for request in self._index),
            mismatches=len(wrong),
            near_ties=near_ties,
        )
        if errors or wrong:
            first = (errors + wrong)[0]
            check |= {
                "passed": False,
                "found": f"{check['found']}, {len(wrong)} rows with wrong tokens, first: {first}",
            }
        return check

    def _margin(self, index: int, position: int) -> float:
        second, first = np.partition(self._reference.next_logits(index, position), -2)[-2:]
        return float(first - second)


def _first_difference(found: list[int], expected: list[int]) -> int | None:
    return next((step for step, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)


def _graded(max_abs_diff: float, reference: Reference, **facts: int) -> Check:
    passed = max_abs_diff <= reference.tolerance
    found = f"logits differ by {max_abs_diff:.2e}, accepted {reference.tolerance:.2e}"
    return {
        "passed": passed,
        "found": found,
        "max_abs_diff": max_abs_diff,
        "tolerance": reference.tolerance,
        **facts,
    }


def _max_abs_diff(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; infinity where either is not finite."""
    difference = float(np.abs(found - expected).max())
    return difference if np.isfinite(difference) else float("inf")
