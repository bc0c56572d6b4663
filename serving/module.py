"""A plain module as it is served, from Python: arrays in, arrays out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from serving.directory import BadInput
from serving.manifest import Manifest, proven_manifest
from serving.session import Session

Arrays = dict[str, np.ndarray]


class Module:
    """A verified ONNX directory of a plain module: called with its inputs by name, it returns its outputs by name."""

    def __init__(self, manifest: Manifest, session: Session) -> None:
        self.manifest = manifest
        self._session = session

    @classmethod
    def open(cls, folder: str | Path, *, provider: str = "cpu", threads: int | None = None) -> "Module":
        """Open an ONNX directory for serving. Raises BadInput, like those of the other tasks."""
        folder = Path(folder)
        manifest = proven_manifest(folder, provider, "module")
        return cls(manifest, Session.open(folder, provider=provider, threads=threads))

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """Return the outputs for a batch of rows. Raises BadInput for inputs that are not what the module takes."""
        wanted, types = self.manifest["row_shapes"], self.manifest["row_types"]
        if inputs.keys() != wanted.keys():
            raise BadInput(f"inputs: {', '.join(inputs) or 'none'} found; accepted: {', '.join(wanted)}")
        for name, value in inputs.items():
            if list(np.shape(value)[1:]) != wanted[name] or str(np.asarray(value).dtype) != types[name]:
                found = f"{np.asarray(value).dtype} of shape {list(np.shape(value))}"
                raise BadInput(f"inputs: {name} is {found}; accepted: {types[name]} of shape [rows, *{wanted[name]}]")
        return compute(self._session, self.manifest, inputs)


def compute(session: Session, manifest: Manifest, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """Return the outputs of the graph by name."""
    return dict(zip(manifest["outputs"], session.compute(inputs), strict=True))
