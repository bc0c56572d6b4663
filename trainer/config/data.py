"""What it is learned from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.base import Section

Files = Path | Annotated[tuple[Path, ...], Field(min_length=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

# What of `Columns` names no column.
_NO_COLUMNS = {"system", "skip_bad_rows", "label_separator"}


class Columns(Section):
    """How rows are read: where an objective finds what it needs."""

    text: str = Field("text", description="Column with the text (causal_lm, masked_lm, classification).")
    text_pair: str | None = Field(None, description="Column with a second text to judge with the first.")
    label: str = Field("label", description="Column with the class, the classes or the number (classification).")
    label_separator: str = Field(
        ";", min_length=1, description="What stands between classes written as one text, as in csv (multi_label)."
    )
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

    @property
    def columns(self) -> "Columns":
        """How the rows that objectives see are read."""
        return self

    def names(self) -> dict[str, str]:
        """Return the column that each setting names."""
        settings = [name for name in Columns.model_fields if name not in _NO_COLUMNS]
        return {name: value for name in settings if isinstance(value := getattr(self, name), str)}


class Whole(Section):
    """How the data of a run is read, whatever it is made of."""

    streaming: bool = Field(
        False,
        description="Learn while reading: rows are never counted or all encoded before the run, and are shuffled only "
        "in windows. Labels, class weights and a new tokenizer still take one pass over them.",
    )
    window_rows: int = Field(
        10_000, ge=1, description="Rows of a stream that are encoded, packed and shuffled together."
    )
    leaks: Literal["report", "refuse", "off"] = Field(
        "report",
        description="What is done about held-out rows that are also trained on, word for word or nearly: say how many "
        "(leaks.json in the run folder), end the run, or do not look. Of a stream only the first window is looked at.",
    )


class EmbeddedData(Section):
    """Text, chats or labels made from the source of this machine's Python standard library; nothing is downloaded."""

    type: Literal["embedded"]
    max_rows: int | None = Field(None, ge=16, description="Keep only the first rows of the training split.")

    @property
    def columns(self) -> Columns:
        return Columns()


class Parts(Columns):
    """Which rows are held out where they do not stand in files or splits of their own."""

    validation_fraction: Fraction = Field(
        0.05, description="Part of `train` that is held out by content hash where there is no validation data."
    )
    test_fraction: Fraction | None = Field(
        None, description="Part of `train` that is kept, by content hash, for one evaluation at the end of the run."
    )

    @property
    def validation_source(self) -> object | None:
        """What names the validation data, None where a part of the training data is held out."""
        raise NotImplementedError

    @property
    def test_source(self) -> object | None:
        raise NotImplementedError

    @model_validator(mode="after")
    def _parts_fit(self) -> "Parts":
        if self.test_fraction is None:
            return self
        if self.test_source is not None:
            raise ValueError("test data and test_fraction are both given: leave one of them out")
        if self.validation_source is None and self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} leave nothing "
                f"to train on: lower one of them"
            )
        return self


class FileSource(Parts):
    """Rows from your own files; a column is looked up by the names below."""

    type: Literal["files"]
    train: Files = Field(
        description="A .jsonl, .csv, .txt, .json or .parquet file (the first three also with .gz); a pattern such as "
        "data/*.jsonl, or a list of files; a folder of .txt files; or a folder of such folders, one for each class."
    )
    validation: Files | None = Field(None, description="Held-out file or folder; by default a part of `train`.")
    test: Files | None = Field(None, description="File or folder for one evaluation at the end of the run.")
    split_txt: Literal["lines", "blocks"] = Field(
        "lines", description="A text of a .txt file: each line, or each block between blank lines."
    )

    @property
    def validation_source(self) -> Files | None:
        return self.validation

    @property
    def test_source(self) -> Files | None:
        return self.test


class HubSource(Parts):
    """Rows of a data set on the hub, or of a folder that `datasets.load_dataset` reads; its code is never run."""

    type: Literal["hub"]
    path: str = Field(min_length=1, description="Name of the data set, such as stanfordnlp/imdb, or a folder.")
    subset: str | None = Field(None, description="Which of its configurations, where it has several.")
    revision: str | None = Field(None, description="Branch, tag or commit; a commit never changes.")
    train_split: str = Field("train", description="Split to train on.")
    validation_split: str | None = Field(None, description="Held-out split; by default a part of `train_split`.")
    test_split: str | None = Field(None, description="Split for one evaluation at the end of the run.")

    @property
    def validation_source(self) -> str | None:
        return self.validation_split

    @property
    def test_source(self) -> str | None:
        return self.test_split


class FileData(Whole, FileSource):
    """Rows from your own files; a column is looked up by the names below."""


class HubData(Whole, HubSource):
    """Rows of a data set on the hub, or of a folder that `datasets.load_dataset` reads; its code is never run."""


class MixtureSource(Section):
    """One source of a mixture."""

    weight: float = Field(
        gt=0, description="How much is drawn from it, compared with the others; they need not add up."
    )
    data: Annotated[EmbeddedData | FileSource | HubSource, Field(discriminator="type")] = Field(
        description="Where its rows come from: a data section, without streaming, window_rows and leaks."
    )


class MixtureData(Whole):
    """Several sources, drawn from by weight; the held-out rows of all of them are held out."""

    type: Literal["mixture"]
    sources: Annotated[tuple[MixtureSource, ...], Field(min_length=2)] = Field(
        description="Each {weight, data}: weight > 0, and a data section of type embedded, files or hub with column "
        "names of its own, but without streaming, window_rows and leaks."
    )

    @model_validator(mode="after")
    def _sources_fit(self) -> "MixtureData":
        if len({source.data.columns.text_pair is None for source in self.sources}) > 1:
            raise ValueError("sources: text_pair is set in some of them and not in others: rows are pairs or are not")
        if self.streaming and any(isinstance(source.data, EmbeddedData) for source in self.sources):
            raise ValueError("streaming does not fit a source of type embedded, which is small: leave streaming out")
        return self

    @property
    def columns(self) -> Columns:
        """The usual names: `trainer.mixture` gives every source's rows these."""
        return Columns(text_pair="text_pair" if self.sources[0].data.columns.text_pair else None)


Data = Annotated[EmbeddedData | FileData | HubData | MixtureData, Field(discriminator="type")]
