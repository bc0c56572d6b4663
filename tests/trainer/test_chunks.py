"""Documents cut into chunks: at sentence ends, with context, and every token learned exactly once."""

import numpy as np
import pytest

from launch import config_file
from trainer import chunks
from trainer.config import CausalLM, FileData, MaskedLM, RunConfig
from trainer.objectives import OBJECTIVES
from trainer.packing import IGNORED

COLUMNS = FileData(type="files", train="data.jsonl")
TEXT = "The quick fox. It has read a list!\nIn every file? " * 12 + "After lunch of lines"


def sentences_at(*stops: int) -> chunks.Sentences:
    return chunks.Sentences(np.array(stops), np.array(stops))


def test_without_sentences_and_overlap_chunks_are_full_rows():
    assert chunks.cut(10, 4) == [chunks.Chunk(0, 4, 0), chunks.Chunk(4, 8, 4), chunks.Chunk(8, 10, 8)]
    assert chunks.cut(0, 4) == []


def test_chunks_worked_by_hand():
    assert chunks.cut(10, 4, overlap=1) == [chunks.Chunk(0, 4, 0), chunks.Chunk(3, 7, 4), chunks.Chunk(6, 10, 7)]
    # The first ends at the sentence end 7, since 5 is no longer in the last quarter of 8; the second has none there.
    assert chunks.cut(20, 8, sentences=sentences_at(5, 7, 12)) == [
        chunks.Chunk(0, 7, 0), chunks.Chunk(7, 15, 7), chunks.Chunk(15, 20, 15)
    ]  # fmt: skip
    # The context of 4 positions starts at the sentence that begins at 6, so more of the rest fits.
    assert chunks.cut(16, 8, overlap=4, sentences=sentences_at(6, 8)) == [
        chunks.Chunk(0, 8, 0), chunks.Chunk(6, 14, 8), chunks.Chunk(10, 16, 14)
    ]  # fmt: skip


def test_every_position_is_learned_once_and_no_chunk_is_too_long():
    random = np.random.default_rng(0)
    for _ in range(300):
        length, max_length = int(random.integers(1, 200)), int(random.integers(2, 40))
        overlap = int(random.integers(0, max_length))
        ends = np.unique(random.integers(0, length + 1, random.integers(0, 40)))
        found = chunks.cut(length, max_length, overlap=overlap, sentences=sentences_at(*ends.tolist()))
        learned = [position for chunk in found for position in range(chunk.learned_from, chunk.stop)]
        assert learned == list(range(length))
        for chunk in found:
            assert 0 <= chunk.start <= chunk.learned_from < chunk.stop <= chunk.start + max_length
            assert chunk.learned_from - chunk.start <= overlap


def test_an_overlap_that_leaves_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="chunks of 4 positions cannot begin with 4 of before"):
        chunks.cut(10, 4, overlap=4)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("One two. Three", ["."]),
        ('He said "no." Then left!\nEnd', ['"', "!", "\n"]),
        ("3.14 is a number", []),
        ("好。是吗?不", ["。"]),
        ("Why?! So… yes", ["!", "…"]),
        ("", []),
    ],
)
def test_a_sentence_ends_before_a_space_or_a_line_end_and_not_inside_a_number(text, last):
    offsets = [(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)]  # a token a character, between special ones
    assert [text[i - 1] for i in chunks.last_tokens(text, offsets)] == last


# --- in the objectives -----------------------------------------------------------------------------------------------


def causal(tokenizer, text: str, max_length: int, **section):
    objective = OBJECTIVES["causal_lm"](CausalLM(type="causal_lm", **section), COLUMNS, [])
    return objective.encode([{"text": text}], tokenizer, max_length)


@pytest.mark.parametrize("overlap", [0, 7])
@pytest.mark.parametrize("split_at", ["tokens", "sentences"])
def test_causal_lm_predicts_every_token_of_a_cut_document_once(tokenizer, split_at, overlap):
    pieces = causal(tokenizer, TEXT, 40, split_at=split_at, overlap_tokens=overlap)
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    learned = np.concatenate([piece.targets[piece.targets != IGNORED] for piece in pieces])
    assert learned.tolist() == ids[1:]
    assert all(len(piece.input_ids) <= 40 for piece in pieces)
    at = 0
    for piece in pieces:
        context = int((piece.targets == IGNORED).sum())
        assert (piece.targets[:context] == IGNORED).all()
        assert context <= overlap
        assert piece.input_ids.tolist() == ids[at - context : at - context + len(piece.input_ids)]
        at += len(piece.input_ids) - context
    assert (max(int((piece.targets == IGNORED).sum()) for piece in pieces) > 0) == (overlap > 0)


def test_sentences_stay_whole_where_rows_have_room_for_them(tokenizer):
    def whole(split_at: str) -> list[bool]:
        pieces = causal(tokenizer, TEXT, 60, split_at=split_at)
        said = [tokenizer.decode(piece.targets).rstrip(" ") for piece in pieces]
        return [text[-1] in ".!?\n" for text in said[:-1]]

    assert all(whole("sentences"))
    assert not all(whole("tokens"))


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize("split_at", ["tokens", "sentences"])
def test_masked_lm_may_mask_every_token_of_a_cut_document_in_one_chunk(wordpiece, split_at, overlap):
    section = MaskedLM(type="masked_lm", split_at=split_at, overlap_tokens=overlap)
    text = "the quick brown fox returns a list of lines in every file " * 6
    pieces = OBJECTIVES["masked_lm"](section, COLUMNS, []).encode([{"text": text}], wordpiece, 20)
    ids = wordpiece(text, add_special_tokens=False)["input_ids"]
    maskable = np.concatenate([piece.targets[piece.targets != IGNORED] for piece in pieces])
    assert maskable.tolist() == [each for each in ids if each not in wordpiece.all_special_ids]
    assert all(len(piece.input_ids) <= 20 for piece in pieces)
    assert {(piece.input_ids[0], piece.input_ids[-1]) for piece in pieces} == {
        (wordpiece.cls_token_id, wordpiece.sep_token_id)
    }
    assert sum(len(piece.input_ids) - 2 for piece in pieces) > len(ids) if overlap else len(ids)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.overlap_tokens=25"], "objective.overlap_tokens 25 is more than half of batch.max_length 48"),
        (["objective.overlap_tokens=-1"], "greater than or equal to 0"),
        (["objective.split_at=words"], "'tokens' or 'sentences'"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(make_config, tmp_path, overrides, said):
    path = tmp_path / "run.yaml"
    path.write_text(config_file.to_yaml(make_config("causal_lm", "scratch")))
    with pytest.raises(config_file.ConfigError, match=said):
        config_file.load(path, overrides, RunConfig)
