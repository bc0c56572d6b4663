"""Which trained models `trivet export` takes, told by the files of a model directory before anything is loaded.

Standard library only, as serving.directory, which says it where an ONNX directory was wanted.
"""

import json
from pathlib import Path
from typing import Any

# The objectives whose models can be exported, and the task that each is exported for.
TASK_OF = {
    "causal_lm": "causal_lm",
    "sft": "causal_lm",
    "classification": "classification",
    "token_classification": "token_classification",
    "masked_lm": "masked_lm",
}


def refusal(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Return why the model directory with this manifest cannot be exported, and what to do instead; None if it can.

    What else config.json and the weights may rule out is not asked here.
    """
    objective = manifest.get("objective")
    if isinstance(objective, str) and objective in TASK_OF:
        return None
    return f"objective {objective} cannot be exported; accepted: {', '.join(TASK_OF)}" + how_to_ask(folder)


def how_to_ask(folder: Path) -> str:
    """Return a clause that names the model card, where it has Python that asks the model."""
    card = folder / "README.md"
    try:
        has_python = "```python" in card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    return f"; the Python in {card} asks this one" if has_python else ""


def instead_of_onnx(folder: Path) -> str:
    """Return a clause on how to get an ONNX directory where `folder` is none: it may be a run, or a trained model."""
    for model in (folder, folder / "model"):
        try:
            manifest = json.loads((model / "trivet.json").read_text(encoding="utf-8"))
            if manifest.get("kind") == "model" and (why := refusal(model, manifest)):
                return f"; trivet export cannot make one of {model}: {why}"
        except (OSError, ValueError, AttributeError):
            continue
    return "; make one with: trivet export"
