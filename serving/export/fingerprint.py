"""Which model this is: one hash for its config and its weights, what its answers depend on."""

import hashlib
from pathlib import Path

from serving.directory import sha256


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """Return the hash of the model in `folder`, and of the adapter over it that lies somewhere in `adapter`."""
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    if adapter is not None:
        named = {"adapter_config.json", "adapter_model.safetensors"}  # a bottleneck's files are called as PEFT's own
        paths += sorted(path for path in adapter.rglob("adapter_*") if path.name in named)
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in paths)
    return hashlib.sha256(lines.encode()).hexdigest()
