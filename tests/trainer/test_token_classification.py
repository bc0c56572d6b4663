"""A tag for every word: aligned with its first token, learned and answered once, whatever the tokenizer."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from seqeval import metrics as seqeval

from serving.directory import BadInput
from trainer.config import FileData, TokenClassification
from trainer.objectives import OBJECTIVES
from trainer.packing import IGNORED, Example
from trainer.sources import DataError
from trainer.token_model import TokenModel

COLUMNS = FileData(type="files", train="data.jsonl")
ROWS = [
    {"tokens": ["the", "quick", "brown", "fox", "returns"], "tags": ["O", "B-PER", "I-PER", "I-PER", "O"]},
    {"tokens": ["lunch"], "tags": ["B-LOC"]},
    {
        "tokens": ["Zürich", "has", "a", "FILE", "(", "x.y", ")"],
        "tags": ["B-LOC", "O", "O", "B-PER", "O", "I-PER", "O"],
    },
]


def build(rows=ROWS, data=COLUMNS, **settings):
    return OBJECTIVES["token_classification"](TokenClassification(type="token_classification", **settings), data, rows)


def words_of(example, objective, tokenizer) -> list[tuple[str, str]]:
    """The first token of each word that is answered for, and its tag."""
    return [
        (tokenizer.decode([token]).strip(), objective.labels[target])
        for token, target in zip(example.input_ids.tolist(), example.targets.tolist(), strict=True)
        if 0 <= target < len(objective.labels)
    ]


# --- alignment -------------------------------------------------------------------------------------------------------


def test_a_word_s_tag_stands_on_its_first_token(wordpiece):
    objective = build()
    [example] = objective.encode(
        [{"tokens": ["the", "foxes", "eat", "."], "tags": ["O", "B-PER", "O", "O"]}], wordpiece, 32
    )
    tokens = wordpiece.convert_ids_to_tokens(example.input_ids)
    assert tokens == ["[CLS]", "the", "fox", "##e", "##s", "e", "##a", "##t", "[UNK]", "[SEP]"]
    o, per = objective.labels.index("O"), objective.labels.index("B-PER")
    assert example.targets.tolist() == [IGNORED, o, per, IGNORED, IGNORED, o, IGNORED, IGNORED, o, IGNORED]


def test_with_all_pieces_every_token_learns_but_only_the_first_answers(wordpiece):
    objective = build(tag_all_pieces=True)
    [example] = objective.encode([{"tokens": ["the", "foxes"], "tags": ["O", "B-PER"]}], wordpiece, 32)
    o, per = objective.labels.index("O"), objective.labels.index("B-PER")
    more = per + len(objective.labels)
    assert example.targets.tolist() == [IGNORED, o, per, more, more, IGNORED]
    assert objective.count([example], 0) == 4


def test_a_token_of_white_space_alone_belongs_to_no_word(tokenizer):
    [example] = build(tag_all_pieces=True).encode(
        [{"tokens": ["a", "", "fox"], "tags": ["O", "O", "O"]}], tokenizer, 32
    )
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert pieces[:2] == ["a", "Ġ"]
    assert (example.targets == IGNORED).tolist() == [piece == "Ġ" and at == 1 for at, piece in enumerate(pieces)]


def test_the_tokens_are_those_of_transformers_for_words_split_before(wordpiece):
    objective = build()
    examples = objective.encode(ROWS, wordpiece, 64)
    for row, example in zip(ROWS, examples, strict=True):
        expected = wordpiece(row["tokens"], is_split_into_words=True)
        assert example.input_ids.tolist() == expected["input_ids"]
        seen: list[int | None] = []
        for word, target in zip(expected.word_ids(), example.targets.tolist(), strict=True):
            is_first = word is not None and word not in seen
            assert target == (objective.labels.index(row["tags"][word]) if is_first else IGNORED)
            seen.append(word)


@pytest.fixture
def with_prefix_space(tokenizer):
    """A byte-level BPE as GPT-2 has it, which transformers takes words from only with add_prefix_space."""
    from transformers import GPT2TokenizerFast

    vocab = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    return GPT2TokenizerFast(vocab=vocab, merges=merges, eos_token="<|end|>", pad_token="<|pad|>", unk_token=None)


@pytest.mark.parametrize("name", ["tokenizer", "with_prefix_space", "wordpiece", "metaspace"])
def test_every_word_gets_its_tag_once_whatever_the_tokenizer(request, name):
    tokenizer, objective = request.getfixturevalue(name), build()
    for row, example in zip(ROWS, objective.encode(ROWS, tokenizer, 64), strict=True):
        text = " ".join(row["tokens"])
        assert example.input_ids.tolist() == tokenizer(text)["input_ids"], "the text is tokenized as it stands"
        found = words_of(example, objective, tokenizer)
        assert [tag for _, tag in found] == row["tags"]
        for (piece, _), word in zip(found, row["tokens"], strict=True):
            assert word.lower().replace("ü", "u").startswith(piece.lower().replace("\ufffd", "")) or piece == "[UNK]"


@pytest.fixture
def metaspace():
    """A Unigram model that writes the space before a word into its token, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.Unigram())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = [" ".join(row["tokens"]) for row in ROWS] * 3
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("length", range(3, 12))
def test_a_long_row_goes_on_in_further_examples_and_no_word_is_lost_or_doubled(wordpiece, length):
    objective = build()
    examples = objective.encode(ROWS, wordpiece, length)
    assert all(len(example.input_ids) <= length for example in examples)
    tags = [tag for example in examples for _, tag in words_of(example, objective, wordpiece)]
    assert tags == [tag for row in ROWS for tag in row["tags"]]


def test_a_row_whose_words_give_no_token_is_left_out_and_counted(wordpiece):
    examples = build().encode([ROWS[0], {"tokens": ["\u200b"], "tags": ["O"]}], wordpiece, 32)
    assert (len(examples), examples.left_out) == (1, 1)
    [example] = build().encode([{"tokens": ["a", "\u200b", "fox"], "tags": ["O", "O", "B-PER"]}], wordpiece, 32)
    assert (example.targets != IGNORED).sum() == 2


def test_words_and_tags_may_be_texts_with_spaces_as_in_csv(wordpiece):
    row = {"tokens": "the quick fox", "tags": "O B-PER I-PER"}
    same = {"tokens": ["the", "quick", "fox"], "tags": ["O", "B-PER", "I-PER"]}
    [a], [b] = (build().encode([each], wordpiece, 32) for each in (row, same))
    assert np.array_equal(a.input_ids, b.input_ids)
    assert np.array_equal(a.targets, b.targets)
    assert list(build().texts([row])) == ["the quick fox"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"tokens": ["a", "b"], "tags": ["O"]},
            "data.tags: row 4 has 2 words in 'tokens', but 1 in 'tags'; expected a tag",
        ),
        ({"tokens": [], "tags": []}, "data.tokens: row 4 has an empty list in 'tokens'; expected one entry a word"),
        ({"tokens": ["a"], "tags": []}, "data.tags: row 4 has an empty list in 'tags'"),
        ({"tokens": ["a"], "tags": "  "}, "data.tags: row 4 has an empty list in 'tags'"),
        ({"tokens": ["a"], "tags": 3}, "data.tags: row 4 has no list (3) in 'tags'"),
        ({"tokens": ["a"], "tags": [float("nan")]}, "data.tags: row 4: the tag nan found; expected a name or a whole"),
        ({"tokens": ["a"], "tags": [None]}, "data.tags: row 4: the tag None found"),
        ({"tokens": [1], "tags": ["O"]}, "data.tokens: row 4: the word 1 found; expected text"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "data.tags: row 4 has no 'tags'; it has: tokens, ner_tags; name one"),
        ({"text": "a", "label": "x"}, "data.tokens: row 4 has no 'tokens'; it has: text, label"),
    ],
)
def test_rows_that_hold_no_tagged_words_are_refused_in_one_line(row, said):
    with pytest.raises(DataError) as caught:
        build([*ROWS, row])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_held_out_tag_that_training_never_saw_is_refused(wordpiece):
    row = {"tokens": ["a"], "tags": ["B-ORG"]}
    with pytest.raises(
        DataError, match=r"data\.tags: row 8: 'B-ORG' is in no training row; known: B-LOC, B-PER, I-PER"
    ):
        build().encode([row], wordpiece, 8, first=7)
    listed = build(labels=["O", "B-LOC"])
    with pytest.raises(DataError, match=r"data\.tags: row 1: 'B-PER' is not in objective\.labels; known: O, B-LOC"):
        listed.encode(ROWS, wordpiece, 32)


def test_one_tag_alone_and_a_list_of_one_are_refused():
    with pytest.raises(DataError, match="every training word has the tag 'O'; at least two are needed"):
        build([{"tokens": ["a"], "tags": ["O"]}])
    with pytest.raises(ValidationError, match="labels: 1 found: name at least 2"):
        build(labels=["O"])


def test_a_tokenizer_that_knows_no_offsets_is_refused(wordpiece):
    from types import SimpleNamespace

    with pytest.raises(BadInput, match=r"tokenizer: .* cannot say which letters a token is of; use a fast one"):
        build().use(SimpleNamespace(is_fast=False))


# --- losses and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Llama", "GPT2", "Qwen2"])
@pytest.mark.parametrize("all_pieces", [False, True])
def test_packed_and_padded_the_loss_is_what_transformers_computes_on_each_row_alone(
    wordpiece, tiny_model, family, all_pieces
):
    rows = [{**row, "tags": ["O" if i % 2 else "B-PER" for i in range(len(row["tags"]))]} for row in ROWS]
    objective = build(rows, labels=["B-PER", "I-PER", "O"], tag_all_pieces=all_pieces)
    model = tiny_model(family, "TokenClassification").eval()
    examples = objective.encode(rows, wordpiece, 32)
    expected, predictions = 0.0, []
    for example in examples:
        targets = torch.tensor(example.targets.astype(np.int64))[None]
        labels = torch.where(targets >= 3, targets - 3, targets)
        with torch.no_grad():
            output = model(input_ids=torch.tensor(example.input_ids.astype(np.int64))[None], labels=labels)
        expected += output.loss.item() * int((labels != IGNORED).sum())
        asked = (targets >= 0) & (targets < 3)
        predictions.append([objective.labels[i] for i in output.logits.argmax(-1)[asked].tolist()])
    gold = [row["tags"] for row in rows]
    objective.try_out(model, 32)
    assert objective.packs
    for rows_of_batch in ([list(examples)], [[example] for example in examples]):
        found = sums_of(objective, model, rows_of_batch)
        assert found["loss"].item() == pytest.approx(expected, rel=1e-4)
    objective.token_model = TokenModel(first_position=None)
    padded = sums_of(objective, model, [[example] for example in examples])
    assert padded["loss"].item() == pytest.approx(expected, rel=1e-4)
    for sums in (found, padded):
        assert sums["count"] == sum(objective.count([example], 0) for example in examples)
        totals = {name: value.double().numpy() for name, value in sums.items()}
        assert objective.summarize(totals)["f1"] == pytest.approx(seqeval.f1_score(gold, predictions))


def sums_of(objective, model, rows):
    with torch.no_grad():
        return objective.sums(model, objective.collate(rows, 0, [0] * len(rows)))


class Answers(torch.nn.Module):
    """A model that answers each token with the tag of its id."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.table = torch.eye(num_labels)

    def forward(self, input_ids, **others):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_entity_scores_over_batches_are_those_of_seqeval_on_all_rows(packed):
    """Rows end in entities and begin with their continuation: one that ran over the border would be counted wrongly."""
    random = np.random.default_rng(0)
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    objective = build(labels=labels)
    rows = [random.integers(0, 5, (2, random.integers(1, 8))) for _ in range(60)]
    examples = [Example(answers, np.where(random.random(len(gold)) < 0.6, gold, answers)) for answers, gold in rows]
    objective.token_model = TokenModel(first_position=0 if packed else None)
    totals: dict[str, np.ndarray] = {}
    for start in range(0, len(examples), 7):
        batch = [[example] for example in examples[start : start + 7]]
        for name, value in sums_of(objective, Answers(5).eval(), batch).items():
            totals[name] = totals.get(name, 0) + value.double().numpy()
    gold, predicted = (
        [[labels[i] for i in getattr(example, name)] for example in examples] for name in ("targets", "input_ids")
    )
    found = objective.summarize(totals)
    expected = {
        name: getattr(seqeval, f"{name}_score")(gold, predicted) for name in ("accuracy", "precision", "recall", "f1")
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    by_type = seqeval.f1_score(gold, predicted, average=None)
    assert objective.details(totals) == {"labels": ["LOC", "PER"], "f1": pytest.approx(list(by_type))}


def test_tags_that_mark_no_entities_are_scored_as_classes():
    objective = build([{"tokens": ["a", "b"], "tags": ["NOUN", "VERB"]}])
    assert objective.score == ("accuracy", "max")
    example = Example(np.array([0, 1, 1, 0]), np.array([0, 1, 0, IGNORED]))
    totals = {
        name: value.double().numpy() for name, value in sums_of(objective, Answers(2).eval(), [[example]]).items()
    }
    found = objective.summarize(totals)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(2 / 3)  # NOUN: 1 right of 1 said and 2 gold; VERB: 1 right of 2 and 1
    assert objective.details(totals)["labels"] == ["NOUN", "VERB"]


def test_while_learning_only_the_loss_is_summed():
    objective, example = build(labels=["O", "B-PER"]), Example(np.array([0, 1]), np.array([0, 1]))
    assert sums_of(objective, Answers(2).train(), [[example]]).keys() == {"loss", "count"}


def test_the_baselines_worked_by_hand():
    objective = build(labels=["O", "B-PER", "I-PER"])

    def rows(*pairs):
        return [[Example(np.array([ids for ids, _ in each]), np.array([tag for _, tag in each]))] for each in pairs]

    train = rows([(7, 0), (7, 0), (8, 1), (9, 2)], [(7, 0), (8, 1), (6, IGNORED)])
    held_out = rows([(8, 1), (9, 2), (5, 0), (8, 0)])
    # O is the commonest. By token: 8 is B-PER, 9 is I-PER, 5 is unknown and so O.
    # Said: PER 0-1 and PER 3; gold: PER 0-1. Precision 1/2, recall 1.
    assert objective.baseline(train, held_out, 10) == pytest.approx(
        {"majority_accuracy": 2 / 4, "unigram_accuracy": 3 / 4, "unigram_f1": 2 / 3}
    )
