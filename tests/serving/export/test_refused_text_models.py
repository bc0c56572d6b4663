"""Classifiers and encoders that cannot be exported: each is refused for what it is."""

import json

import pytest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"problem_type": "ranking"},
            "problem_type 'ranking' is unknown; accepted: single_label_classification, multi",
        ),
        ({"problem_type": "regression"}, "id2label has 3 names for 3 outputs, numbered 0, 1, 2; accepted: one, "),
        (
            {"id2label": {"0": "only"}},
            "id2label has 1 names for 1 outputs, numbered 0; accepted: two or more, numbered from 0, each name once; "
            "of one: problem_type regression or multi_label_classification",
        ),
        ({"id2label": {"0": "a", "5": "b"}}, "id2label has 2 names for 2 outputs, numbered 0, 5; accepted"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label has 1 names for 2 outputs"),
        ({"pad_token_id": None}, "has no pad_token_id; set it"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "cannot be exported; accepted here"),
        ({"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "O"}}, "id2label has 1 names"),
    ],
)
def test_a_classifier_that_cannot_be_exported_is_refused(
    tmp_path, classifier_config, changes, message, bare_model, refused
):
    changes = {"architectures": ["LlamaForSequenceClassification"], **changes}
    refused(bare_model(tmp_path / "model", classifier_config("llama"), **changes), tmp_path, message)


def test_an_encoder_decoder_is_refused(tmp_path, bare_model, refused):
    from transformers import BartConfig

    config = BartConfig(d_model=16, max_position_embeddings=64)
    source = bare_model(tmp_path / "model", config, architectures=["BartForSequenceClassification"])
    refused(source, tmp_path, "bart is an encoder-decoder; accepted: encoders and decoders")


def test_rows_that_the_source_itself_cannot_read_are_refused(save_classifier, tmp_path, monkeypatch, refused):
    source = save_classifier(tmp_path / "model", "roberta")  # whose table of 130 positions is for 128 tokens
    monkeypatch.setattr("serving.export.rows._context_length", lambda model, source: 130)
    refused(source, tmp_path, "cannot read rows of up to 130 tokens")


def test_a_model_that_cannot_be_traced_is_refused(save_classifier, tmp_path, monkeypatch, refused):
    from serving.export.rows import Rows

    def by_content(self, input_ids, attention_mask):
        return self.model(input_ids[: int(input_ids.sum())]).logits

    source = save_classifier(tmp_path / "model", "gpt2")
    monkeypatch.setattr(Rows, "forward", by_content)
    refused(source, tmp_path, "GPT2ForSequenceClassification cannot be traced into a graph")


def test_a_model_without_a_token_to_pad_with_is_refused(save_text_model, tmp_path, refused):
    source = save_text_model(tmp_path / "model", "llama", "tags", pad_token_id=None)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    refused(source, tmp_path, r"neither its config.json nor its tokenizer names a pad token; name one")


def test_a_masked_model_whose_tokenizer_has_no_mask_is_refused(save_text_model, tmp_path, refused):
    source = save_text_model(tmp_path / "model", "bert", "masks")
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"mask_token": None}))
    refused(source, tmp_path, "its tokenizer has no mask token; save the one that it was trained with")


POOLED = [{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "m.Pooling", "path": "1_Pooling"}]


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (
            None,
            {},
            "no modules.json says how to pool it; accepted: sentence-transformers' modules.json of a Transformer",
        ),
        ([*POOLED, {"type": "m.Dense", "path": "2"}], {}, "Transformer, Pooling, Dense found; accepted"),
        ({"a": 1}, {}, "modules.json: is no list of modules"),
        ([POOLED[0] | {"path": "0_T"}, POOLED[1]], {}, "its Transformer is in .*0_T; accepted"),
        (POOLED, {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens; accepted: cls, mean, lasttoken"),
        (
            POOLED,
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "pools by cls and mean; accepted: cls, mean, lasttoken",
        ),
        (POOLED, {"pooling_mode": "weightedmean"}, "pools by weightedmean; accepted: cls, mean, lasttoken"),
    ],
)
def test_an_encoder_without_a_head_that_is_pooled_otherwise_is_refused(
    tmp_path, classifier_config, modules, pooling, message, bare_model, refused
):
    source = bare_model(tmp_path / "model", classifier_config("bert"), architectures=["BertModel"])
    if modules is not None:
        (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    refused(source, tmp_path, message)


def test_a_folder_whose_files_of_pooling_were_left_behind_is_refused(tmp_path, classifier_config, bare_model, refused):
    source = bare_model(tmp_path / "model", classifier_config("bert"), architectures=["BertModel"])
    (source / "modules.json").write_text(json.dumps(POOLED))
    refused(source, tmp_path, r"1_Pooling/config\.json: missing, though modules\.json names it; get the model again")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sentence_bert_config.json", '{"do_lower_case": true}', "do_lower_case; put it into the tokenizer instead"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "query"}', "default_prompt_name 'query'"),
        ("sentence_bert_config.json", "{", "sentence_bert_config.json: cannot be read"),
        ("sentence_roberta_config.json", '{"do_lower_case": true}', "sentence_roberta_config.json: do_lower_case"),
        ("sentence_bert_config.json", '{"max_seq_length": "x"}', "max_seq_length 'x'; accepted: a number of tokens"),
        ("sentence_bert_config.json", '{"tokenizer_args": {"a": 1}}', r"tokenizer_args {'a': 1}; save the model and"),
    ],
)
def test_what_sentence_transformers_does_to_texts_before_them_is_refused(
    tmp_path, classifier_config, name, content, message, bare_model, refused
):
    source = bare_model(tmp_path / "model", classifier_config("bert"), architectures=["BertModel"])
    (source / "modules.json").write_text(json.dumps(POOLED))
    (source / name).write_text(content)
    refused(source, tmp_path, message)


@pytest.mark.parametrize("asked", ["tags", "masks", "vector"])
def test_token_types_of_a_text_alone_are_refused_where_only_pairs_have_them(save_text_model, tmp_path, asked, refused):
    source = save_text_model(tmp_path / "model", "bert", asked)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for part in tokenizer["post_processor"]["single"]:
        next(iter(part.values()))["type_id"] = 1
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(source, tmp_path, "its tokenizer gives a text alone other token types than 0")


def test_a_model_that_reads_no_tokens_is_refused(tmp_path, save_with_tokenizer, refused):
    from transformers import CanineConfig, CanineForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = CanineForSequenceClassification(CanineConfig(num_labels=3, max_position_embeddings=130, **sizes)).eval()
    source = save_with_tokenizer(tmp_path / "model", model)
    refused(source, tmp_path, "CanineForSequenceClassification has no table of embeddings")
