"""A base that changed since an adapter was trained on it: told by the merged weights that lie beside the adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from serving.export.attention import ExportError

_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest weight of a tensor


def check_unchanged(
    merged: Path, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: Path, *, is_transposed: bool
) -> None:
    """Raise ExportError where the weights in `merged` are not those in `base` with the updates added.

    `is_transposed`: linear layers hold [out, in], as all do but GPT-2's.
    """
    expected = dict(_weights(base))
    for name, found in _weights(merged):
        if (weight := expected.get(name)) is None:
            continue  # a head that is tied in one of the two
        update = next((each for layer, each in updates.items() if f"{layer}.weight".endswith(name)), None)
        weight, kind = weight().float(), found().dtype
        if update is not None:
            added = update[0] @ update[1]
            weight = weight + (added.T if is_transposed else added)
        whole = found().float()
        rounding = _ROUNDING.get(kind, 1e-2) * float(weight.abs().max())
        if weight.shape != whole.shape or float((weight - whole).abs().max()) > rounding:
            raise ExportError(
                f"--loras: {merged} was trained on another base than {base} is now: {name} differs by more than "
                "what was learned; take the base as it was then"
            )


def _weights(folder: Path) -> Iterator[tuple[str, "_Reader"]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            yield name, _Reader(path, name)


class _Reader:
    """A weight that is read when it is asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __call__(self) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(self._name)
