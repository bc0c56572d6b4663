"""What the server refuses, and how it says so: bad fields, bodies, paths and keys; the page that needs no key."""

import json

import httpx2 as httpx
import pytest
from tokenizers import Tokenizer, models

from serving.driver import Driver
from serving.server.app import PUBLIC_PATHS, build_app
from serving.text import Text

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": "Hi", "max_tokens": 100}
ENDPOINTS = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]


def post(served, path, body, **options):
    return httpx.post(f"{served.url}{path}", json=body, timeout=10, **options)


BAD_FIELDS = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"temprature": 1}, "temprature"),
    ({"n": 2}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"echo": True}, "echo"),
    ({"logprobs": 5}, "logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{}]}, "tools"),
    ({"user": "x" * 1000}, "user"),
    ({"model": ["fake"]}, "model"),
]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name(shared, path, body, fields, param):
    content = json.dumps({**body, **fields})
    response = httpx.post(f"{shared.url}{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{param}: ")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", {"promt": "x"}, "promt: unknown field; did you mean prompt?"),
        ("/v1/completions", {}, "prompt: Field required"),
        ("/v1/completions", {"prompt": ""}, "prompt: "),
        ("/v1/completions", {"prompt": []}, "prompt: "),
        ("/v1/completions", {"prompt": [1, -1]}, "prompt.1: "),
        ("/v1/completions", {"prompt": [1, 2**31]}, "prompt.1: "),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt: 2 prompts in one request"),
        ("/v1/completions", {"prompt": "x" * 200}, "prompt: has 200 tokens; accepted: up to 199"),
        ("/v1/chat/completions", {"messages": []}, "messages: "),
        ("/v1/chat/completions", {"messages": "hi"}, "messages: "),
        ("/v1/chat/completions", {"messages": [{"role": "root", "content": "x"}]}, "messages.0.role: "),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content: "),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0.content: "),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens: "),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type: ",
        ),
        ("/v1/completions", [], "body: "),
        ("/v1/completions", "x", "body: "),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(shared, path, body, expected):
    response = post(shared, path, body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(expected)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"prompt": "\\ud800"}', "\x00", '{"prompt": "a"} x'])
def test_a_body_that_is_not_json_is_refused(shared, content):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{shared.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_accepted(shared, reply):
    harmless = {"n": 1, "logprobs": None, "logit_bias": {}, "presence_penalty": 0.0, "tools": [], "user": "me"}
    for path, body in ENDPOINTS:
        assert post(shared, path, {**body, **harmless, "model": "fake"}).status_code == 200


def test_only_json_is_read_and_not_too_much_of_it(engine, serve_with):
    with serve_with(engine, max_body_bytes=1000) as served:
        url = f"{served.url}/v1/completions"
        assert (
            httpx.post(url, content=json.dumps(COMPLETION), headers={"content-type": "text/plain"}).status_code == 415
        )
        large = post(served, "/v1/completions", {"prompt": "x" * 2000})
        assert large.status_code == 413
        assert "1000 bytes" in large.json()["error"]["message"]
        chunks = (b" " * 100 for _ in range(20))  # chunked: no length is announced
        headers = {"content-type": "application/json"}
        assert httpx.post(url, content=chunks, headers=headers).status_code == 413
        assert post(served, "/v1/completions", COMPLETION).status_code == 200


def test_a_model_without_a_chat_template_says_so(engine, serve_with):
    with serve_with(engine, Text(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).to_str(), {}, None)) as served:
        refused = post(served, "/v1/chat/completions", CHAT)
        assert refused.status_code == 400
        assert "no chat template" in refused.json()["error"]["message"]
        assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["has_chat_template"] is False


@pytest.mark.parametrize(("path", "status"), [("/nothing/../here", 404), ("/v1/completions", 405)])
def test_unknown_paths_and_methods_answer_in_the_same_shape(shared, path, status):
    response = httpx.get(f"{shared.url}{path}")
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# --- keys and the page -----------------------------------------------------------------------------------------------

KEYS = ["first-key-123", "second-key-456"]


def test_every_route_but_the_public_ones_needs_a_key(engine, text, serve_with):
    app = build_app(Driver(engine), text, {"end_token_ids": []}, name="fake")
    paths = {(method, route.path) for route in app.routes for method in route.methods}
    assert {path for _, path in paths} > PUBLIC_PATHS
    with serve_with(engine, api_keys=KEYS) as served:
        for method, path in [*paths, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "//health"), ("PUT", "/x")]:
            status = httpx.request(method, f"{served.url}{path}").status_code
            assert (status == 401) == (path not in PUBLIC_PATHS), (method, path, status)


def test_a_wrong_key_is_401_and_a_right_one_is_not(engine, serve_with):
    headers = ["", "Bearer", "Bearer wrong", "first-key-123", "Basic first-key-123", "Bearer first-key-12"]
    with serve_with(engine, api_keys=KEYS) as served:
        for header in [*headers, "Bearer first-key-123x", "Bearer first-key-123 second-key-456", "Bearer \xe9"]:
            refused = post(served, "/v1/completions", COMPLETION, headers={b"Authorization": header.encode("latin-1")})
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "key-" not in refused.text
        for key in KEYS:
            allowed = post(served, "/v1/completions", COMPLETION, headers={"Authorization": f"Bearer {key}"})
            assert allowed.status_code == 200


def test_a_local_server_answers_to_its_own_names_only(engine, serve_with):
    with serve_with(engine, local_only=True) as served:

        def status(host: str) -> int:
            return httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code

        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
            assert status(host) == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "::1"):
            assert status(host) == 403, host


def test_the_page_needs_nothing_from_elsewhere(shared):
    page = httpx.get(shared.url)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    content = "".join(httpx.get(f"{shared.url}{path}").text for path in ("/", "/page.js", "/page.css"))
    assert "://" not in content
    assert "innerHTML =" not in content
    assert "<style" not in page.text
    assert "onclick" not in page.text
    assert "style=" not in page.text
