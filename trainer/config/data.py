"""What it is learned from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Section


class EmbeddedData(Section):
    """Text, chats or labels made from the source of this machine's Python standard library; nothing is downloaded."""

    type: Literal["embedded"]
    max_rows: int | None = Field(None, ge=16, description="Keep only the first rows of the training split.")


class Columns(Section):
    """How rows are read: where an objective finds what it needs."""

    text: str = Field("text", description="Column with the text (causal_lm, masked_lm, classification).")
    text_pair: str | None = Field(None, description="Column with a second text to judge with the first.")
    label: str = Field("label", description="Column with the class, the classes or the number (classification).")
    tokens: str = Field("tokens", description="Column with a list of words (token_classification).")
    tags: str = Field("tags", description="Column with a list of tags, one a word (token_classification).")
    prompt: str = Field("prompt", description="Column with the user's turn (sft, where there is no `messages`).")
    completion: str = Field("completion", description="Column with the assistant's turn (sft).")
    messages: str = Field("messages", description="Column with a whole chat: a list of {role, content}.")
    context: str | None = Field(
        None, description="Column put after the prompt with a blank line between; rows may lack it (sft)."
    )
    system: str | None = Field(None, description="Text of a system turn before every prompt (sft).")
    skip_bad_rows: bool = Field(
        False, description="Leave out, and count, rows that cannot be learned from; by default they end the run."
    )


class FileData(Columns):
    """Rows from your own files; a column is looked up by the names below."""

    type: Literal["files"]
    train: Path = Field(
        description="A .jsonl, .csv or .txt file, each also with .gz; a folder of .txt files; or a folder of such "
        "folders, one for each class."
    )
    validation: Path | None = Field(None, description="Held-out file or folder; by default a part of `train`.")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="Held out by content hash if no validation file.")
    split_txt: Literal["lines", "blocks"] = Field(
        "lines", description="A text of a .txt file: each line, or each block between blank lines."
    )


Data = Annotated[EmbeddedData | FileData, Field(discriminator="type")]
