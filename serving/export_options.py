"""What is asked of an export beside the model: its number format, quantisation, provider and adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from serving.export_paths import ExportError

Dtype = Literal["fp32", "fp16", "bf16"]
Quantization = Literal["int8", "int8-weights", "int4"]
Target = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Options:
    """How a model is exported.

    `dtype`: of weights and activations. `quantization`: None leaves the weights in `dtype`. `optimize_for`: the
    provider whose operators are used. `loras`: adapters that are kept beside the base, chosen per row.
    """

    dtype: Dtype = "fp32"
    quantization: Quantization | None = None
    optimize_for: Target = "cpu"
    loras: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raise ExportError for a value that is none of those accepted."""
        for name, kind in (("dtype", Dtype), ("quantization", Quantization), ("optimize_for", Target)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                flag = {"quantization": "--quantize"}.get(name, f"--{name.replace('_', '-')}")
                raise ExportError(f"{flag}: {value!r} is unknown; accepted: {', '.join(get_args(kind))}")
        if self.quantization is not None and (self.dtype, self.optimize_for, self.loras) != ("fp32", "cpu", ()):
            raise ExportError(
                f"--quantize {self.quantization}: is for the CPU, with everything else in fp32; leave out --dtype, "
                "--optimize-for and --loras"
            )
