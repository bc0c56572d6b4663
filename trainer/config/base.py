"""What every section of a config is made of."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def _beside_the_config(path: Path, info: ValidationInfo) -> Path:
    """Resolve a path that a config names relative to itself; absolute, so that a saved config re-runs anywhere."""
    folder = (info.context or {}).get("folder")
    return (folder / path).resolve() if folder else path


ConfigPath = Annotated[Path, AfterValidator(_beside_the_config)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
