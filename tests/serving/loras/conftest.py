"""LoRA adapters of the tiny Llama, each made once a session, and exports that must be refused for theirs."""

import json
import shutil
from pathlib import Path

import pytest

from serving.export import ExportError, Options, export_model

# Different ranks, scales and targets.
SETTINGS = {
    "news": {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "poems": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["down_proj", "q_proj", "lm_head"]},
    "laws": {
        "r": 3,
        "lora_alpha": 3,
        "target_modules": "all-linear",
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {"layers.1.mlp.up_proj": 9},
    },
}


def _save_adapter(base: Path, folder: Path, *, seed: int = 0, **settings) -> Path:
    """Save an adapter of random values, as PEFT does after training, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_adapter():
    """The function that saves an adapter of random values."""
    return _save_adapter


@pytest.fixture(scope="session")
def adapters(model_dir, tmp_path_factory) -> dict[str, Path]:
    """The folder of each adapter of the tiny Llama."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: _save_adapter(model_dir("llama"), folder / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }


def _refused(source: Path, folders: tuple[Path, ...], tmp_path: Path, message: str) -> None:
    stages: list[str] = []
    with pytest.raises(ExportError, match=message):
        export_model(source, tmp_path / "onnx", Options(loras=folders), progress=stages.append)
    assert stages == ["reading the model"]
    assert not (tmp_path / "onnx").exists()


@pytest.fixture(scope="session")
def refused():
    """The function that exports with adapters, expects a refusal with that message, and that nothing is left of it."""
    return _refused


def _changed_config(adapter: Path, folder: Path, **changes) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="session")
def changed_config():
    """The function that copies an adapter with another config."""
    return _changed_config
