"""Which model the quickstart fine-tunes, and how much of everything that model's size allows in a few minutes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch import config_file, pretrained
from launch.pretrained import Unavailable
from launch.shipped import example_configs
from serving.directory import BadInput
from trainer.config import PretrainedModel, PretrainedTokenizer, RunConfig

__all__ = ["Tuned", "Unavailable", "config", "of", "smollm2", "tiny"]

MAX_LENGTH = 256
MIN_CONTEXT_LENGTH = 128  # for a question with its answer


@dataclass(frozen=True)
class Tuned:
    """The fine-tuning of a quickstart, and how many prompts, tokens and answers it shows."""

    what: str
    config: RunConfig
    onnx_dir: Path
    num_prompts: int = 8
    num_new_tokens: int = 24
    num_answers: int = 3
    warm_up: bool = False

    @property
    def base(self) -> str:
        """The folder or hub name of the model before."""
        assert isinstance(self.config.model, PretrainedModel)
        return self.config.model.path

    @property
    def chat_template(self) -> Path | None:
        """The template of a base that has none itself."""
        assert isinstance(self.config.tokenizer, PretrainedTokenizer)
        return self.config.tokenizer.chat_template

    @property
    def model_dir(self) -> Path:
        """The model after."""
        return self.config.run.folder / "model"


def config(name: str, folder: Path, run: str, *overrides: str) -> RunConfig:
    """Return an example config as a run of the quickstart."""
    return config_file.load(example_configs() / name, [f"run.name={run}", f"run.dir={folder}", *overrides], RunConfig)


def tiny(folder: Path) -> Tuned:
    """Fine-tune the model that the quickstart has just trained from scratch."""
    overrides = f"model.path={folder}/pretrain/model", "model.made_by=null"
    sft = config("sft_lora.yaml", folder, "sft", *overrides)
    return Tuned(
        "that small model", sft, folder / "onnx", num_prompts=16, num_new_tokens=32, num_answers=0, warm_up=True
    )


def smollm2(folder: Path, progress: Callable[[str], None]) -> Tuned:
    """Fine-tune SmolLM2-135M-Instruct, fetched first where it is missing. Raises Unavailable if it cannot be had."""
    path = pretrained.fetch(progress=progress)
    sft = config("sft_smollm2.yaml", folder, f"sft-{path.name}", f"model.path={path}")
    return Tuned(path.name, sft, folder / f"onnx-{path.name}")


def of(base: str, folder: Path) -> Tuned:
    """Fine-tune any causal language model. Raises BadInput for one that cannot be trained, or exported afterwards."""
    from transformers import AutoConfig, AutoTokenizer

    from serving.export.source import open_source
    from trainer import hub
    from trainer.build import build

    hub.check_reachable(base, "--base")
    name = _name(base)
    try:
        settings = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--base: no model and tokenizer can be loaded from {base} ({reason}); check the path") from None
    context_length = getattr(settings, "max_position_embeddings", MAX_LENGTH)
    if context_length < MIN_CONTEXT_LENGTH:
        raise BadInput(f"--base: {base} reads {context_length} tokens; accepted: {MIN_CONTEXT_LENGTH} or more")
    overrides = [f"model.path={base}", "model.made_by=null", f"batch.max_length={min(MAX_LENGTH, context_length)}"]
    if not tokenizer.chat_template:
        overrides += ["tokenizer.type=pretrained", f"tokenizer.chat_template={example_configs() / 'plain_chat.jinja'}"]
    sft = config("sft_smollm2.yaml", folder, f"sft-{name}", *overrides)
    _check_folder(sft)
    build(sft)  # whatever is wrong with it shows now, not after the pre-training
    open_source(_folder_of(base))
    return Tuned(name, sft, folder / f"onnx-{name}")


def _name(base: str) -> str:
    """A name for the folders of a base model; what every run calls `model` is called as its run."""
    path = Path(base).resolve()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.parent.name if path.name == "model" else path.name).lstrip("._-")


def _check_folder(sft: RunConfig) -> None:
    """Raise BadInput if the fine-tuning of another base of that name lies there."""
    from launch.train import is_finished

    try:
        is_finished(sft)
    except config_file.ConfigError as error:
        raise BadInput(f"--dir: {sft.run.dir} is another quickstart's; choose another ({error})") from None


def _folder_of(base: str) -> Path:
    """The folder of a model that was loaded: for a hub name, in the hub's cache."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, local_files_only=True))
