"""What a user points at -> the folder that a command needs."""

import json
from pathlib import Path

from serving.directory import BadInput


def model_folder(path: Path) -> Path:
    """Return the model directory behind a model directory, a run folder or a sweep folder (its winner's).

    Raises BadInput where there is none.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    result = path / "result.json"
    ranking = json.loads(result.read_text(encoding="utf-8")).get("ranking") if result.is_file() else None
    if ranking:
        return model_folder(_beside(path, Path(ranking[0]["run"])))
    if not path.exists():
        raise BadInput(f"{path}: no such folder; expected a model directory, a run folder or a sweep folder")
    raise BadInput(f"{path}: holds no finished model (no config.json, no model/, no ranking); finish the run first")


def _beside(sweep: Path, run: Path) -> Path:
    """A sweep names its runs as seen from where it was started; after a move they still lie within it."""
    return run if run.exists() else sweep / "trials" / run.name


def example_configs() -> Path:
    """Return the folder of the example configs: in a clone at the top, in an installed wheel inside the package."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"
