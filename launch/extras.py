"""Which extra brings a package that a command could not import."""

EXTRA_OF = {
    **dict.fromkeys(["torch", "transformers", "accelerate", "peft", "deepspeed", "matplotlib", "tensorboard"], "train"),
    **dict.fromkeys(["onnx", "onnx_ir", "onnxscript"], "export"),
    **dict.fromkeys(["onnxruntime", "tokenizers", "numpy", "safetensors", "jinja2"], "serve-cpu"),
    **dict.fromkeys(["fastapi", "uvicorn", "prometheus_client"], "serve-cpu"),
    **dict.fromkeys(["gguf", "huggingface_hub"], "train"),
    "ray": "sweep",
    "wandb": "track",
    "mlflow": "track",
    "openai": "dev",
}


def missing_extra(error: Exception) -> str:
    """Return what is missing and the command that installs it; nothing if `error` is no missing package of an extra."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in EXTRA_OF:
        return ""
    fix = f"pip install 'trivet[{EXTRA_OF[error.name]}]'"
    return f"{error.name} is not installed, and this command needs it: {fix}"
