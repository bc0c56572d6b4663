"""Tiny random models, saved as plain model directories, and their ONNX directories, each made once a session."""

import json
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


ENCODERS = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "distilbert": "DistilBertConfig",
    "electra": "ElectraConfig",
}


def _named(*labels: str) -> dict:
    """Return what a config says of labels."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _classifier_config(kind: str, **changes):
    """Return the config of a classifier with three labels: a decoder's, or an encoder's."""
    import transformers

    labels = _named("bad", "so-so", "good")
    if kind not in ENCODERS:
        return _tiny_config(kind, **labels | changes)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 130, "pad_token_id": 1 if kind == "roberta" else 0}
    if kind == "distilbert":  # which reads but its own names
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    if kind == "electra":
        sizes |= {"embedding_size": 16}
    return getattr(transformers, ENCODERS[kind])(**{**sizes, **labels, **changes})


def _make_tokenizer(vocab_size: int = VOCAB_SIZE, text: str | None = None, **settings):
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
        **settings,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _save_model(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """Save a random language model of `kind` and its tokenizer to `folder` and return it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_tiny_config(kind, **changes)).eval()
    model.generation_config.eos_token_id = 2
    return _save(folder, model, seed)


def _save_classifier(folder: Path, kind: str, seed: int = 0, **changes) -> Path:
    """Save a random classifier of `kind` and its tokenizer to `folder` and return it."""
    return _save_text_model(folder, kind, "label", seed, **changes)


# What is asked of a model over texts: the class of transformers, and what its config says.
_TEXT_MODELS: dict[str, tuple[str, dict]] = {
    "label": ("AutoModelForSequenceClassification", {}),
    "pair": ("AutoModelForSequenceClassification", {}),
    "labels": ("AutoModelForSequenceClassification", {"problem_type": "multi_label_classification"}),
    "number": ("AutoModelForSequenceClassification", {"problem_type": "regression", **_named("stars")}),
    "tags": ("AutoModelForTokenClassification", _named("B-PER", "I-PER", "O")),
    "masks": ("AutoModelForMaskedLM", {}),
    "vector": ("AutoModel", {}),
}


def _save_text_model(folder: Path, kind: str, asked: str, seed: int = 0, **changes) -> Path:
    """Save a random model of `kind` for what is `asked` of it, and its tokenizer, to `folder` and return it."""
    import transformers

    name, says = _TEXT_MODELS[asked]
    config = _classifier_config(kind, **says | changes)
    _save(folder, getattr(transformers, name).from_config(config), seed)
    if asked == "vector":
        _pool(folder, {"pooling_mode_mean_tokens": True})
    if asked == "pair" and kind not in ENCODERS:  # as the trainer seals it
        from serving.directory import seal

        facts = {"labels": ["bad", "so-so", "good"], "strategy": "full", "base_model": None, "step": 1}
        seal(folder, "model", objective="classification", text_pair=True, max_length=40, **facts)
    return folder


def _pool(folder: Path, says: dict) -> None:
    """Write beside a model what sentence-transformers does: it pools as `says` says, and makes the length 1."""
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    lines = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules.items()]
    (folder / "modules.json").write_text(json.dumps(lines))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(says))


def _save(folder: Path, model, seed: int) -> Path:
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # wide enough that the answers depend on the context
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    types = ["token_type_ids"] if model.config.model_type in ("bert", "electra") else []
    tokenizer = _make_tokenizer(model_input_names=["input_ids", *types, "attention_mask"])
    if model.config.model_type in ENCODERS:
        _add_special_tokens_around(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def _add_special_tokens_around(tokenizer) -> None:
    """Make the tokenizer put a token before and one after every text, as those of encoders do."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    tokenizer.add_special_tokens({"mask_token": "<mask>"})


def _reseal(folder: Path, **changes) -> None:
    """Make the directory's hashes right again after a change, so that only the comparison can find it.

    `changes` go into the manifest.
    """
    from serving.directory import read_manifest, seal

    manifest = read_manifest(folder, "onnx")
    fields = {key: value for key, value in manifest.items() if key not in ("format_version", "kind", "files")}
    seal(folder, "onnx", **fields | changes)


def _change_graph(folder: Path, change: Callable) -> None:
    """Apply `change` to the folder's onnx model, weights included, and seal the folder again."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    change(model.graph)
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).unlink()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    _reseal(folder)


def _failed_checks(folder: Path, opened_by=None) -> list[str]:
    """Verify, expect it to fail and `opened_by` (Engine) to refuse the directory; return the failed checks' names."""
    from serving.directory import BadInput
    from serving.engine import Engine
    from serving.verify import VerificationFailed, verify

    with pytest.raises(VerificationFailed) as caught:
        verify(folder)
    record = json.loads((folder / "verification.json").read_text())["records"][-1]
    assert not record["passed"]
    assert record["reason"] in str(caught.value)
    with pytest.raises(BadInput, match="its verification on cpu failed"):
        (opened_by or Engine).open(folder)
    return [name for name, check in record["checks"].items() if not check["passed"]]


@pytest.fixture(scope="session")
def tiny_config():
    """The function that makes a config of a kind of model."""
    return _tiny_config


@pytest.fixture(scope="session")
def classifier_config():
    """The function that makes the config of a classifier."""
    return _classifier_config


@pytest.fixture(scope="session")
def make_tokenizer():
    """The function that trains a small tokenizer."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def save_model():
    """The function that saves a random model with its tokenizer."""
    return _save_model


@pytest.fixture(scope="session")
def save_with_tokenizer():
    """The function that gives a model random weights and saves it with a small tokenizer."""
    return lambda folder, model: _save(folder, model, seed=0)


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
def save_classifier():
    """The function that saves a random classifier with its tokenizer."""
    return _save_classifier


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function from a kind of classifier to its model directory and its ONNX directory, to be read only."""
    folders: dict[str, tuple[Path, Path]] = {}

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in folders:
            from serving.export import export_model

            folder = tmp_path_factory.mktemp("classifiers")
            folders[kind] = _save_classifier(folder / kind, kind), folder / "onnx"
            export_model(*folders[kind])
        return folders[kind]

    return of


@pytest.fixture(scope="session")
def save_text_model():
    """The function that saves a random model over texts with its tokenizer."""
    return _save_text_model


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Callable[[str, str], tuple[Path, Path]]:
    """Return a function from (kind, what is asked) to a model directory and its ONNX directory, to be read only."""
    folders: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(kind: str, asked: str) -> tuple[Path, Path]:
        if (kind, asked) not in folders:
            from serving.export import export_model

            folder = tmp_path_factory.mktemp("texts")
            folders[kind, asked] = _save_text_model(folder / kind, kind, asked), folder / "onnx"
            export_model(*folders[kind, asked])
        return folders[kind, asked]

    return of


@pytest.fixture(scope="session")
def source_logits() -> Callable[[Path, list[str], int], list[list[float]]]:
    """Return a function from (model directory, texts, max_length) to transformers' logits, as training computes them.

    All texts are one right-padded batch with its attention mask; an empty one is the end token.
    """

    def of(folder: Path, texts: list[str], max_length: int) -> list[list[float]]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        rows = [ids or [tokenizer.eos_token_id] for ids in encoded]
        input_ids = torch.full((len(rows), max(map(len, rows))), model.config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)], attention_mask[index, : len(ids)] = torch.tensor(ids), 1
        with torch.no_grad():
            return model(input_ids=input_ids, attention_mask=attention_mask).logits.tolist()

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


@pytest.fixture(scope="session")
def reseal():
    """The function that makes a directory's hashes right again."""
    return _reseal


@pytest.fixture(scope="session")
def change_graph():
    """The function that changes a directory's graph and seals it again."""
    return _change_graph


@pytest.fixture(scope="session")
def failed_checks():
    """The function that verifies a spoilt directory and names the checks that failed."""
    return _failed_checks


@pytest.fixture
def prompts() -> list[list[int]]:
    """Twelve ragged prompts of 1 to 60 tokens, none of which is a special token."""
    random = Random(7)
    return [[random.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in RAGGED_LENGTHS]


@pytest.fixture(scope="session")
def pool():
    """The function that writes the files of an embedding model beside a model."""
    return _pool


# --- the support table, see benchmarks/support_tables.py

_FORMATS = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"quantization": "int8"},
    "int8-weights": {"quantization": "int8-weights"},
    "int4": {"quantization": "int4"},
}


def _held_out():
    """Return texts of random words of the small tokenizers."""
    from serving.export import HeldOutRows

    random = Random(0)
    words = ["the", "quick", "brown", "fox", "returns", "the", "list", "of", "the", "lines", "in", "the", "file"]
    texts = [" ".join(random.choices(words, k=30)) for _ in range(400)]
    return HeldOutRows([{"text": text} for text in texts], "words at random")


@pytest.fixture
def outcomes(tmp_path, record_property):
    """Return a function that exports a model in every format; it returns what came of each, and records it."""

    def of(model: Path, **given) -> dict[str, str]:
        from serving.directory import BadInput
        from serving.export import Options, export_model

        found = {}
        for name, asked in _FORMATS.items():
            try:
                rows = _held_out() if "quantization" in asked else None
                export_model(model, tmp_path / name, Options(**asked), held_out=rows, **given)
                found[name] = "verified"
            except BadInput as error:
                found[name] = str(error).replace(str(model), "").lstrip(": ")
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            record_property(name, found[name])
        return found

    return of
