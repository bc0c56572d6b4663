"""Sizes of new models by name. A name is about the number of weights at the vocabulary of VOCABULARY."""

from typing import Literal, get_args

Architecture = Literal["decoder", "encoder"]
Preset = Literal["1m", "3m", "10m", "30m", "100m", "300m", "1b"]

# The embedding is up to half of a small model, so a name holds at one vocabulary only; tests hold it there to 15 %.
VOCABULARY: dict[str, int] = {
    "1m": 4096, "3m": 4096, "10m": 8192, "30m": 16384, "100m": 32768, "300m": 32768, "1b": 32768,
}  # fmt: skip

_KEYS = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "context_length")
_DECODERS: dict[str, tuple[int, ...]] = {
    "1m": (128, 344, 3, 4, 2, 512),
    "3m": (192, 512, 6, 6, 2, 512),
    "10m": (320, 864, 6, 10, 5, 512),
    "30m": (512, 1376, 8, 8, 4, 1024),
    "100m": (768, 2048, 12, 12, 4, 2048),
    "300m": (1024, 2816, 24, 16, 4, 2048),
    "1b": (2048, 5632, 20, 32, 8, 2048),
}
_ENCODERS: dict[str, tuple[int, ...]] = {
    "1m": (128, 512, 2, 4, 4, 512),
    "3m": (192, 768, 5, 6, 6, 512),
    "10m": (320, 1280, 6, 10, 10, 512),
    "30m": (512, 2048, 7, 8, 8, 512),
    "100m": (768, 2560, 12, 12, 12, 512),
    "300m": (1024, 4096, 21, 16, 16, 512),
    "1b": (1792, 7168, 24, 28, 28, 512),
}
ARCHITECTURES, PRESETS = get_args(Architecture), get_args(Preset)


def sizes_of(architecture: str, preset: str) -> dict[str, int]:
    """Return the keys of the model section that the preset stands for."""
    table = _DECODERS if architecture == "decoder" else _ENCODERS
    return dict(zip(_KEYS, table[preset], strict=True))
