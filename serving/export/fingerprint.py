"""Which model this is: one hash for its config and its weights, what its answers depend on."""

import hashlib
from pathlib import Path

from serving.directory import sha256


def fingerprint(folder: Path) -> str:
    """Return the hash of the model in `folder`."""
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()
