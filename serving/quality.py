"""What quantisation costs: held-out text in reference.safetensors, and how well the graph does on it beside its source.

Shape letters: P predicted tokens, T tokens of a text, V vocabulary, R answers of all texts, L numbers an answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.checks import (
    ACCURACY_DROP_LIMIT,
    COSINE_LIMIT,
    PERPLEXITY_LIMITS,
    SAME_LABEL_FLOOR,
    SAME_TOKEN_FLOORS,
    Check,
)
from serving.directory import REFERENCE, DirectoryError
from serving.forward import whole_texts
from serving.manifest import Manifest
from serving.reference_file import metadata, opened
from serving.session import Session
from serving.tasks import Row, run_rows
from serving.tasks.classifier import SEVERAL
from serving.tasks.rows import masks

PREFIX = "held_out."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts as token ids, where they are from, and what the source said of them (by name, see export)."""

    origin: str
    ids: list[list[int]]
    types: list[list[int]] | None  # which text of a pair each token is of, where the graph asks
    said: Tensors

    @classmethod
    def load(cls, folder: Path) -> "HeldOut":
        """Read the directory's reference.safetensors. Raises DirectoryError where it holds no such text."""
        with opened(folder) as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 (it is no dict)
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
            about = metadata(file).get("held_out", {})
        if "ids" not in tensors or "origin" not in about:
            raise DirectoryError(f"{folder / REFERENCE}: holds no held-out text; export the model again")
        ends = np.cumsum(tensors.pop("lengths"))
        rows = {
            name: [row.tolist() for row in np.split(tensors.pop(name), ends[:-1])]
            for name in ("ids", "types")
            if name in tensors
        }
        return cls(about["origin"], rows["ids"], rows.get("types"), tensors)

    @property
    def rows(self) -> list[Row]:
        """The texts as rows of tokens."""
        types = self.types
        return [Row(ids, False, None if types is None else types[place]) for place, ids in enumerate(self.ids)]


def check_quality(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    """Compare how well the graph does on held-out text with its source, as suits the task; see checks.py."""
    return _CHECKS[manifest["task"]](session, manifest, held_out)


def log_likelihoods(logits_PV: np.ndarray, ids_P: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the log-probability of each of these tokens; NaN where its logits are not finite."""
    shifted_PV = logits_PV.astype(np.float64)
    shifted_PV -= shifted_PV.max(axis=-1, keepdims=True)
    return shifted_PV[np.arange(len(ids_P)), ids_P] - np.log(np.exp(shifted_PV).sum(axis=-1))


def _next_tokens(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    return _perplexity(manifest, held_out, ((_whole(session, manifest, ids), ids[1:]) for ids in held_out.ids))


def _whole(session: Session, manifest: Manifest, ids: list[int]) -> np.ndarray:
    return whole_texts(session, manifest, [ids])[0, :-1]


def _masked_tokens(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    logits = (run_rows(session, manifest, [row])[0] for row in held_out.rows)
    counts = [len(masks(manifest, row)) for row in held_out.rows]
    targets = np.split(held_out.said["targets"], np.cumsum(counts)[:-1])
    return _perplexity(manifest, held_out, zip(logits, targets, strict=True))


def _perplexity(
    manifest: Manifest, held_out: HeldOut, runs: Iterable[tuple[np.ndarray, Sequence[int] | np.ndarray]]
) -> Check:
    """Compare the perplexity of tokens, and which is the likeliest, with the source's, given for each text the logits
    [P, V] and what was there.
    """
    pairs = [(log_likelihoods(logits_PV, ids_P), logits_PV.argmax(-1)) for logits_PV, ids_P in runs]
    found_P, top_P = (np.concatenate(each) for each in zip(*pairs, strict=True))
    expected_P = held_out.said["log_likelihoods"]
    ratio = float(np.exp(expected_P.mean() - found_P.mean()))
    same = float((top_P == held_out.said["top"]).mean())
    quantization = manifest["quantization"]
    limit, same_floor = PERPLEXITY_LIMITS[quantization], SAME_TOKEN_FLOORS[quantization]
    mine, theirs = (float(np.exp(-each.mean())) for each in (found_P, expected_P))
    found = (
        f"perplexity {mine:.2f}, the source's {theirs:.2f}: x{ratio:.3f}, accepted x{1 / limit:.2f} to x{limit:.2f}; "
        f"the likeliest token is the same at {same:.1%} of {held_out.origin}, accepted {same_floor:.0%}"
    )
    facts = {"perplexity": mine, "source_perplexity": theirs, "ratio": ratio, "limit": limit}
    facts |= {"same": same, "same_floor": same_floor}
    passed = 1 / limit <= ratio <= limit and same >= same_floor  # not where the ratio is NaN
    return {"passed": passed, "found": found, **facts, "rows": len(held_out.ids), "tokens": len(found_P)}


def _decisions(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    """Compare accuracy with the source's where the right answers are known, and what is decided."""
    found_RL, expected_RL = _outputs(session, manifest, held_out)
    several = manifest.get("problem_type") == SEVERAL
    mine, theirs = (each > 0 if several else each.argmax(-1) for each in (found_RL, expected_RL))
    same = float((mine == theirs).mean())
    drop, what = 1 - same, f"decides otherwise than the source in {1 - same:.2%}"
    facts: dict[str, float] = {"same": same, "same_floor": SAME_LABEL_FLOOR}
    if "labels" in held_out.said:
        right = held_out.said["labels"]
        facts |= {"accuracy": float((mine == right).mean()), "source_accuracy": float((theirs == right).mean())}
        drop = facts["source_accuracy"] - facts["accuracy"]
        what = f"accuracy {facts['accuracy']:.2%}, the source's {facts['source_accuracy']:.2%}"
    found = f"{what} of {held_out.origin}; accepted {ACCURACY_DROP_LIMIT:.0%}"
    if "accuracy" in facts:
        found += f" less; decides as the source in {same:.2%}, accepted {SAME_LABEL_FLOOR:.0%}"
    passed = drop <= ACCURACY_DROP_LIMIT and same >= SAME_LABEL_FLOOR and bool(np.isfinite(found_RL).all())
    facts |= {"drop": drop, "limit": ACCURACY_DROP_LIMIT}
    return {"passed": passed, "found": found, **facts, "rows": len(held_out.ids)}


def _vectors(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    found_RL, expected_RL = _outputs(session, manifest, held_out)
    sizes = np.linalg.norm(found_RL, axis=-1) * np.linalg.norm(expected_RL, axis=-1)
    cosine = float(((found_RL * expected_RL).sum(-1) / sizes).mean())
    found = f"mean cosine {cosine:.4f} with the source's vectors of {held_out.origin}, accepted {COSINE_LIMIT:.2f}"
    facts = {"cosine": cosine, "limit": COSINE_LIMIT}
    return {"passed": cosine >= COSINE_LIMIT, "found": found, **facts, "rows": len(held_out.ids)}


def _outputs(session: Session, manifest: Manifest, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    found = [run_rows(session, manifest, [row])[0] for row in held_out.rows]
    return np.concatenate(found), held_out.said["outputs"]


_CHECKS = {
    "causal_lm": _next_tokens,
    "masked_lm": _masked_tokens,
    "classification": _decisions,
    "token_classification": _decisions,
    "embedding": _vectors,
}


def figure(check: Check) -> str:
    """Return what a quality check found in a word; how often it decides as its source too, where that is too seldom."""
    if "cosine" in check:
        return f"cosine {check['cosine']:.4f}"
    as_source = f"{check.get('same', 1):.2%} as the source"
    if "ratio" not in check and "accuracy" not in check:
        return as_source
    said = f"perplexity x{check['ratio']:.3f}" if "ratio" in check else f"accuracy {check['accuracy']:.2%}"
    return said if check.get("same", 1) >= check.get("same_floor", 0) else f"{said}, {as_source}"
