"""The checks of a decoder: whole prompts, and the real engine's greedy tokens, beside what the source answered.

Compared are the tokenizer and the chat template, the logits of whole prompts (one by one and as one padded batch), and
the engine's greedy tokens with the logits behind each, one by one and in a crowd with chunked prompts. Shape letters:
B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from serving.checks import (
    RMS_TOLERANCES,
    TOLERANCES,
    Cases,
    Check,
    check_text,
    near_tie,
    spread,
)
from serving.differences import Differences
from serving.engine import Engine
from serving.forward import Forward, whole_texts
from serving.manifest import Manifest
from serving.reference_file import metadata, opened
from serving.request import Request, Sampling
from serving.scheduler import Work
from serving.session import RunFailed, Session

CROWD_SLOTS = 4  # fewer than the prompts, so that rows are left and taken again
CROWD_STEP_TOKENS = 16  # fewer than most prompts, so that they come in chunks
ALONE_TOKENS = 8  # of each answer one by one: the crowd generates all


@dataclass(frozen=True)
class Far:
    """Tokens far on in the context, from position `start` on behind a past of zeros, and the logits after the last.

    `margins_T`: how close each came to other experts; None without any.
    """

    ids: list[int]
    start: int
    logits_V: np.ndarray
    margins_T: np.ndarray | None

    @classmethod
    def read(cls, file: Any, name: str) -> "Far":
        """Read the tensors of `name` in an opened reference.safetensors."""
        ids, start, logits_V = (file.get_tensor(f"{name}.{part}") for part in ("ids", "start", "logits"))
        return cls(ids.tolist(), int(start), logits_V, _tensor(file, f"{name}.margins"))


@dataclass(frozen=True)
class Reference:
    """What the source answered: prompts with their greedy continuations, logits over both, texts and chats.

    Of a long text only the last logits are there, so they are looked up from the end. `loras` names the adapter that
    was merged into the source for each text, None for none. `margins_T`: how close each token came to other experts;
    None without any.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    logits_TV: list[np.ndarray]
    loras: list[str | None]
    cases: Cases
    far: list[Far] = field(default_factory=list)
    margins_T: list[np.ndarray | None] = field(default_factory=list)
    dtype: str = "fp32"

    @classmethod
    def load(cls, folder: Path, dtype: str = "fp32") -> "Reference":
        """Read the directory's reference.safetensors; `dtype` is what the graph is in, which sets what is accepted."""
        with opened(folder) as file:
            lengths = file.get_tensor("prompt_lengths").tolist()
            ids = [file.get_tensor(f"ids.{index}").tolist() for index in range(len(lengths))]
            logits = [file.get_tensor(f"logits.{index}") for index in range(len(lengths))]
            stored = metadata(file)
            margins = [_tensor(file, f"margins.{index}") for index in range(len(lengths))]
            # `far.ids` of an older Trivet, `far.0.ids` and so on of this one.
            named = [name for name in file.keys() if name.startswith("far.") and name.endswith(".ids")]  # noqa: SIM118
            far = [Far.read(file, name.removesuffix(".ids")) for name in named]
            cases = {name: stored[name] for name in ("texts", "chats", "decoded")}
        loras = stored.get("loras", [None] * len(ids))
        return cls(ids, lengths, logits, loras, cases, far, margins, dtype)

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
        return TOLERANCES[self.dtype] * self._spread

    @property
    def rms_tolerance(self) -> float:
        """The largest root of the mean squared difference that is accepted."""
        return RMS_TOLERANCES[self.dtype] * self._spread

    def differences(self) -> Differences:
        """Return what judges differences from these logits."""
        return Differences(self.tolerance, self._spread, self.dtype)

    @cached_property
    def _spread(self) -> float:
        return spread(np.concatenate(self.logits_TV))


def run_checks(folder: Path, manifest: Manifest, session: Session, report: Callable[[str], None]) -> dict[str, Check]:
    """Run all checks, calling `report` at the start of each stage; return them by name."""
    reference = Reference.load(folder, manifest["dtype"])
    report("verifying text")
    checks = {"text": check_text(folder, reference.cases)}
    report("verifying logits")
    checks["logits_one_by_one"] = check_logits(session, manifest, reference, batch=1)
    checks["logits_padded_batch"] = check_logits(session, manifest, reference, batch=reference.num_short)
    if reference.far:
        checks["logits_far_on"] = check_far(session, manifest, reference)
    report("verifying tokens")
    checks["tokens_one_by_one"] = check_tokens(session, manifest, reference, crowd=False)
    checks["tokens_in_a_crowd"] = check_tokens(session, manifest, reference, crowd=True)
    return checks


def check_logits(session: Session, manifest: Manifest, reference: Reference, *, batch: int) -> Check:
    """Compare the logits of whole texts with all that the reference has, `batch` texts to a run, padded right."""
    texts = [ids[:-1] for ids in reference.ids]
    differences = reference.differences()
    for start in range(0, len(texts), batch):
        some = slice(start, start + batch)
        try:
            logits_BTV = whole_texts(session, manifest, texts[some], reference.loras[some])
        except RunFailed as error:
            tokens = max(map(len, texts[some]))
            return {"passed": False, "found": f"texts of {tokens} tokens, {batch} to a run, cannot be run: {error}"}
        for index, logits_TV in enumerate(logits_BTV, start):
            expected_TV, end = reference.logits_TV[index], len(texts[index])
            for position, expected_V in enumerate(expected_TV, end - len(expected_TV)):
                behind = differences.behind_tie(reference.margins_T[index], position + 1)
                differences.add(logits_TV[position], expected_V, behind_tie=behind)
    positions = sum(map(len, reference.logits_TV))
    return differences.check(reference.rms_tolerance, rows=len(texts), positions=positions, batch=batch)


def check_far(session: Session, manifest: Manifest, reference: Reference) -> Check:
    """Compare the logits far on in the context, up to its end and behind a past of zeros, with the source's."""
    differences = reference.differences()
    for far in reference.far:
        length = far.start + len(far.ids)
        request = Request("far", [0] * far.start + far.ids, Sampling(max_new_tokens=1))
        request.num_computed = far.start
        try:
            found_V = Forward(session, manifest, 1, length).chunk(Work(request, 0, len(far.ids)))[0]
        except Exception as error:  # the cache may not fit either
            reason = str(error).strip().partition("\n")[0]
            return {"passed": False, "found": f"position {far.start} cannot be run: {reason}"}
        behind = differences.behind_tie(far.margins_T, len(far.ids))
        differences.add(found_V, far.logits_V, behind_tie=behind)
    return differences.check(positions=max(far.start + len(far.ids) for far in reference.far))


def check_tokens(session: Session, manifest: Manifest, reference: Reference, *, crowd: bool) -> Check:
    """Compare the engine's greedy tokens, and the logits behind them, with the source's.

    One by one, each prompt is one chunk, and the first tokens of its answer are compared. In a crowd there are fewer
    slots than prompts, prompts come in chunks, and most requests join while others decode. A wrong token is excused
    where the source's two best logits are a near tie (see checks.near_tie); what follows it in its row is another
    text, and is not compared.
    """
    requests = [
        Request(str(index), prompt, Sampling(max_new_tokens=_num_tokens(ids, prompt, crowd), ignore_end=True), lora)
        for index, (prompt, ids, lora) in enumerate(zip(reference.prompts, reference.ids, reference.loras, strict=True))
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


def _num_tokens(ids: list[int], prompt: list[int], crowd: bool) -> int:
    return len(ids) - len(prompt) if crowd else min(ALONE_TOKENS, len(ids) - len(prompt))


class _Comparison:
    """Follows the engine's requests, whose i-th is the reference's i-th text."""

    def __init__(self, reference: Reference, requests: list[Request]) -> None:
        self._reference = reference
        self._index = {request: index for index, request in enumerate(requests)}
        self._differences = reference.differences()

    def observe(self, request: Request, logits_V: np.ndarray) -> None:
        """Compare the logits of the next token, if the tokens so far are the source's."""
        index = self._index[request]
        position = len(request.prompt_ids) + len(request.output_ids)
        if request.prompt_ids + request.output_ids == self._reference.ids[index][:position]:
            expected_V, behind = self._reference.next_logits(index, position), self._behind_tie(index, position)
            self._differences.add(logits_V, expected_V, behind_tie=behind)

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
            elif self._is_near_tie(index, len(request.prompt_ids) + step):
                near_ties += 1
            else:
                wrong.append(f"text {index} token {step} is {request.output_ids[step]}, not {expected[step]}")
        check = self._differences.check(
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

    def _behind_tie(self, index: int, position: int) -> bool:
        return self._differences.behind_tie(self._reference.margins_T[index], position)

    def _is_near_tie(self, index: int, position: int) -> bool:
        accepted = near_tie(self._reference.dtype, self._differences.largest)
        if self._behind_tie(index, position):  # other experts may move each logit by as much as that
            accepted = max(accepted, 2 * self._differences.largest_excused)
        return self._margin(index, position) < accepted

    def _margin(self, index: int, position: int) -> float:
        second, first = np.partition(self._reference.next_logits(index, position), -2)[-2:]
        return float(first - second)


def _tensor(file: Any, name: str) -> np.ndarray | None:
    return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (it is no dict)


def _first_difference(found: list[int], expected: list[int]) -> int | None:
    return next((step for step, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
