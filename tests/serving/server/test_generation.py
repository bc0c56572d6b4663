"""Stop strings and the settings that a request leads to, against hand-worked cases."""

import itertools
import json

import pytest

from serving.directory import BadInput
from serving.generation_config import not_served, sampling_defaults
from serving.request import MAX_NEW_TOKENS, Sampling
from serving.server.generation import StopMatcher, build_sampling
from serving.server.schemas import ChatRequest, CompletionRequest


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.found:
            break
    return out + matcher.finish(), matcher.found


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", "abc"),
        (["x"], "abc", "abc"),
        (["c"], "abcabc", "ab"),
        (["bca"], "abcabc", "a"),
        (["abcabcd"], "abcabc", "abcabc"),
        (["aab"], "aaaab!", "aa"),
        (["abcd", "bc"], "abcd", "a"),
        (["bc", "ab"], "abc", ""),
        (["\n\n"], "a\n\nb", "a"),
        (["🙂!"], "x🙂🙂!y", "x🙂"),
    ],
)
def test_text_ends_before_the_stop_string_that_is_complete_first_however_it_is_cut(stops, text, expected):
    for splits in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for character, is_new in zip(text[1:], splits, strict=True):
            if is_new:
                pieces.append(character)
            else:
                pieces[-1] += character
        assert cut(stops, pieces) == (expected, any(stop in text for stop in stops))


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ["a E", "N", "!", "EN"]] == ["a ", "", "EN!", ""]
    assert matcher.finish() == "EN"


def completion(**fields) -> CompletionRequest:
    return CompletionRequest(prompt="p", **fields)


def test_a_request_that_says_nothing_is_greedy_unless_the_model_asks_for_sampling():
    assert build_sampling(completion(), {}) == Sampling(max_new_tokens=16, temperature=0)
    defaults = {"temperature": 0.7, "top_k": 20}
    assert build_sampling(completion(), defaults) == Sampling(max_new_tokens=16, temperature=0.7, top_k=20)
    asked = completion(temperature=0.0, seed=5, top_p=0.5, max_tokens=3, ignore_eos=True)
    expected = Sampling(max_new_tokens=3, temperature=0, top_k=20, top_p=0.5, seed=5, ignore_end=True)
    assert build_sampling(asked, defaults) == expected


def test_a_chat_may_fill_the_context_and_takes_both_names_of_the_limit():
    messages = [{"role": "user", "content": "hi"}]
    assert build_sampling(ChatRequest(messages=messages), {}).max_new_tokens == MAX_NEW_TOKENS
    assert build_sampling(ChatRequest(messages=messages, max_tokens=7), {}).max_new_tokens == 7
    assert build_sampling(ChatRequest(messages=messages, max_completion_tokens=8), {}).max_new_tokens == 8


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, {}),
        ({"temperature": 0.5}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "top_k": None, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
    ],
)
def test_sampling_defaults_come_from_generation_config_only_when_it_samples(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sampling_defaults(tmp_path) == expected


def test_defaults_that_would_pick_another_token_and_are_not_served_are_named(tmp_path):
    assert not_served(tmp_path) == []
    content = {"repetition_penalty": 1.1, "min_p": 0.0, "num_beams": 1, "no_repeat_ngram_size": 3, "typical_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert not_served(tmp_path) == ["repetition_penalty 1.1", "no_repeat_ngram_size 3"]


def test_sampling_defaults_out_of_range_are_bad_input(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "temperature": -1}')
    with pytest.raises(BadInput, match="temperature"):
        sampling_defaults(tmp_path)
