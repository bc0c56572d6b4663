"""Tiny random models, saved as plain model directories, and their ONNX directories, each made once a session."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

VOCAB_SIZE = 320
RAGGED_LENGTHS = (1, 60, 2, 17, 5, 33, 9, 1, 40, 3, 16, 24)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tiny_config(kind: str, **changes):
    """Return a config of two layers and 32 wide: grouped heads and RoPE (llama), learned positions (gpt2, opt)."""
    import transformers

    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    match kind:
        case "llama" | "mistral" | "gpt_oss":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            sizes |= {"intermediate_size": 64, "max_position_embeddings": 256, "head_dim": 8}
            name = {"llama": "LlamaConfig", "mistral": "MistralConfig", "gpt_oss": "GptOssConfig"}[kind]
        case "gpt2":
            sizes, name = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, "GPT2Config"
        case "opt":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
            sizes |= {"max_position_embeddings": 256, "word_embed_proj_dim": 32}
            name = "OPTConfig"
        case "bloom":
            sizes, name = {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "BloomConfig"
        case _:
            raise ValueError(kind)
    return getattr(transformers, name)(**{**tokens, **sizes, **changes})


def _make_tokenizer(vocab_size: int = VOCAB_SIZE, text: str | None = None):
    """Return a byte-level BPE tokenizer trained on `text`, with end, turn and pad tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text or "the quick brown fox returns the list of the lines in the file"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _save_model(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """Save a random model of `kind` and its tokenizer to `folder` and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_tiny_config(kind, **changes)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # wide enough that the tokens depend on the context
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """The function that makes a config of a kind of model."""
    return _tiny_config


@pytest.fixture(scope="session")
def make_tokenizer():
    """The function that trains a small tokenizer."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def save_model():
    """The function that saves a random model with its tokenizer."""
    return _save_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a kind of model to its directory, to be read only."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = _save_model(tmp_path_factory.mktemp("models") / kind, kind)
        return folders[kind]

    return of


@pytest.fixture(scope="session")
def exported(model_dir, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a kind of model to its ONNX directory, to be read only."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            from serving.export import export_model

            folders[kind] = tmp_path_factory.mktemp("onnx") / kind
            export_model(model_dir(kind), folders[kind])
        return folders[kind]

    return of


@pytest.fixture(scope="session")
def onnx_dir(exported) -> Path:
    """The ONNX directory of the tiny Llama, to be read only."""
    return exported("llama")


@pytest.fixture
def onnx_copy(onnx_dir, tmp_path) -> Path:
    """A copy of the tiny Llama's ONNX directory that a test may spoil."""
    return Path(shutil.copytree(onnx_dir, tmp_path / "onnx"))


@pytest.fixture(scope="session")
def source_tokens(model_dir) -> Callable[..., list[list[int]]]:
    """Return a function from (kind, prompts, num_new_tokens) to transformers' greedy tokens, the end token ignored."""

    def of(kind: str, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        model = AutoModelForCausalLM.from_pretrained(model_dir(kind)).eval()
        model.generation_config = GenerationConfig(max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0)
        rows = [torch.tensor([prompt]) for prompt in prompts]
        return [model.generate(row, attention_mask=torch.ones_like(row))[0, row.shape[1] :].tolist() for row in rows]

    return of


@pytest.fixture
def prompts() -> list[list[int]]:
    """Twelve ragged prompts of 1 to 60 tokens, none of which is a special token."""
    random = Random(7)
    return [[random.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in RAGGED_LENGTHS]
