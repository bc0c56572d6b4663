"""What every export says of what it was made with."""

from importlib.metadata import version

from serving.session import onnxruntime_version


def versions() -> dict[str, str]:
    """Return the versions of what made the graph and of what ran it."""
    # The distribution may be onnxruntime or onnxruntime-gpu; the module is the same.
    makers = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    return {**makers, "onnxruntime": onnxruntime_version()}
