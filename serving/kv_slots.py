"""Who sits in which row of the preallocated KV cache, and the cache's memory. numpy and plain Python.

One row per request, each at its own length. Taking and leaving a row moves no data: what an earlier request left
there lies beyond the new one's length, and attention never reads past a row's length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.request import Request

# Of the manifest's dtype. numpy has no bfloat16, but zeros are zeros in every format of that size.
_NUMPY_TYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


class KvSlots:
    """Rows [0:num_slots) of the cache and their occupants; a new request gets the lowest free row."""

    def __init__(self, num_slots: int) -> None:
        self.occupants: list[Request | None] = [None] * num_slots
        self.slot_of: dict[Request, int] = {}  # in the order of admission

    @property
    def has_free(self) -> bool:
        """True when another request can be seated."""
        return len(self.slot_of) < len(self.occupants)

    def take(self, request: Request) -> int:
        """Seat `request` in the lowest free row and return that row."""
        slot = self.occupants.index(None)
        self.occupants[slot] = request
        self.slot_of[request] = slot
        return slot

    def release(self, request: Request) -> None:
        """Free the request's row at once."""
        self.occupants[self.slot_of.pop(request)] = None


def cache_arrays(manifest: Mapping[str, Any], num_slots: int, max_length: int) -> dict[str, np.ndarray]:
    """Return the zeroed cache, one [slots, kv heads, max_length, head size] array per layer and kind, by graph name.

    Untouched pages of a zeroed array cost no memory, so on CPU a long `max_length` is paid only when it is used.
    """
    shape = (num_slots, manifest["num_kv_heads"], max_length, manifest["head_dim"])
    names = [f"{kind}.{layer}" for layer in range(manifest["num_layers"]) for kind in ("keys", "values")]
    return {name: np.zeros(shape, dtype=_NUMPY_TYPES[manifest["dtype"]]) for name in names}
