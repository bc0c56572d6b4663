"""What quantisation costs: held-out text in reference.safetensors, and how well the graph does on it beside its source.

Shape letters: P predicted tokens, T tokens of a text, V vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from serving.checks import PERPLEXITY_LIMITS, Check
from serving.directory import REFERENCE, DirectoryError
from serving.forward import whole_texts
from serving.manifest import Manifest
from serving.session import Session

PREFIX = "held_out."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class HeldOut:
    """Held-out texts as token ids, where they are from, and what the source said of them (by name, see export)."""

    origin: str
    ids: list[list[int]]
    said: Tensors

    @classmethod
    def load(cls, folder: Path) -> "HeldOut":
        """Read the directory's reference.safetensors. Raises DirectoryError where it holds no such text."""
        with safe_open(folder / REFERENCE, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 (it is no dict)
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
            about = json.loads((file.metadata() or {}).get("held_out", "{}"))
        if "ids" not in tensors or "origin" not in about:
            raise DirectoryError(f"{folder / REFERENCE}: holds no held-out text; export the model again")
        ends = np.cumsum(tensors.pop("lengths"))
        ids = [row.tolist() for row in np.split(tensors.pop("ids"), ends[:-1])]
        return cls(about["origin"], ids, tensors)


def log_likelihoods(logits_TV: np.ndarray, ids: list[int]) -> np.ndarray:
    """Return the log-probability of each token but the first, given those before it; NaN where logits are not finite.

    `logits_TV` are those after each token.
    """
    logits_PV = logits_TV[: len(ids) - 1].astype(np.float64)
    logits_PV -= logits_PV.max(axis=-1, keepdims=True)
    return logits_PV[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits_PV).sum(axis=-1))


def check_perplexity(session: Session, manifest: Manifest, held_out: HeldOut) -> Check:
    """Compare the perplexity of held-out text with the source's; see checks.PERPLEXITY_LIMITS."""
    found_P, top_P = _predictions(session, manifest, held_out)
    expected_P = held_out.said["log_likelihoods"]
    ratio = float(np.exp(expected_P.mean() - found_P.mean()))
    same = float((top_P == held_out.said["top"]).mean())
    limit = PERPLEXITY_LIMITS[manifest["quantization"]]
    passed = ratio <= limit  # not where it is NaN
    mine, theirs = (float(np.exp(-each.mean())) for each in (found_P, expected_P))
    found = (
        f"perplexity {mine:.2f}, the source's {theirs:.2f}: x{ratio:.3f}, accepted x{limit:.2f}; the likeliest token "
        f"is the same at {same:.1%} of {held_out.origin}"
    )
    facts = {"perplexity": mine, "source_perplexity": theirs, "ratio": ratio, "limit": limit, "same_top": same}
    return {"passed": passed, "found": found, **facts, "rows": len(held_out.ids), "tokens": len(found_P)}


def _predictions(session: Session, manifest: Manifest, held_out: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-likelihood of every token but the first ones, and the likeliest token in its place."""
    pairs = [
        (log_likelihoods(logits_TV, ids), logits_TV[:-1].argmax(-1))
        for ids, logits_TV in _runs(session, manifest, held_out)
    ]
    found, top = zip(*pairs, strict=True)
    return np.concatenate(found), np.concatenate(top)


def _runs(session: Session, manifest: Manifest, held_out: HeldOut) -> Iterator[tuple[list[int], np.ndarray]]:
    for ids in held_out.ids:
        [logits_TV] = whole_texts(session, manifest, [ids])
        yield ids, logits_TV


def about(check: dict[str, Any]) -> str:
    """Return the figure of a quality check in a few words."""
    return f"x{check['ratio']:.3f}"
