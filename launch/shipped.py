"""Where what ships with Trivet lies: in a clone, or in an installed wheel."""

from pathlib import Path


def example_configs() -> Path:
    """Return the folder of the example configs: in a clone at the top, in an installed wheel inside the package."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"
