"""POST /v1/classify over real HTTP, before a model that labels a text by its length; and a real one as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest

from serving.task_engine import TaskEngine

LABELS = ["short", "long"]
MANIFEST = {
    "task": "classification", "labels": LABELS, "max_length": 20, "empty_text_ids": [0],
    "inputs": ["input_ids", "attention_mask"],
}  # fmt: skip
REPOSITORY = Path(__file__).parents[3]
SERVE = """
import sys
from serving.server import serve
serve(sys.argv[1], port=0, name="tiny", slots=3)
heavy = {"torch", "transformers", "ray", "pandas"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


class ByLength:
    """A classifier for which ten bytes and more are long; it fails on rows that begin with the byte "!"."""

    def __init__(self) -> None:
        self.manifest = MANIFEST
        self.row_s = 0.0

    def logits(self, ids: list[int]) -> np.ndarray:
        time.sleep(self.row_s)
        if ids[0] == 4:  # of the test's tokenizer: four special tokens, then bytes in order, from "!"
            raise RuntimeError("/secret/path/model.onnx: bad node")
        return np.array([0, 1 if len(ids) >= 10 else -1], np.float32)


@pytest.fixture
def model() -> ByLength:
    return ByLength()


@pytest.fixture
def served(model, serve_with):
    with serve_with(TaskEngine(model, slots=2, max_waiting=2), manifest=MANIFEST) as running:
        yield running


def post(served, body, path="/v1/classify", **options):
    return httpx.post(f"{served.url}{path}", json=body, timeout=10, **options)


def test_each_text_has_its_label_and_scores_in_order(served):
    high = 1 / (1 + np.exp(-1))
    texts = ["short", "rather a long one", "", "long beyond any measure"]
    answer = post(served, {"input": texts, "model": "fake"}).json()
    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert [item["label"] for item in answer["data"]] == ["short", "long", "short", "long"]
    assert [item["score"] for item in answer["data"]] == pytest.approx([high] * 4)
    assert answer["data"][1]["scores"] == pytest.approx({"short": 1 - high, "long": high})
    assert [item["truncated"] for item in answer["data"]] == [False, False, False, True]
    assert answer["usage"] == {"prompt_tokens": 5 + 17 + 1 + 20, "total_tokens": 43}
    assert post(served, {"input": texts[1]}).json()["data"] == [answer["data"][1] | {"index": 0}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "input: Field required"),
        ({"input": []}, "input: "),
        ({"input": None}, "input: "),
        ({"input": 5}, "input: "),
        ({"input": float("nan")}, "input: "),
        ({"input": {"text": "x"}}, "input: "),
        ({"input": ["x", 5]}, "input.1: "),
        ({"input": ["x", ["y"]]}, "input.1: "),
        ({"input": ["x"] * 257}, "input: "),
        ({"input": "x" * 2_000_001}, "input: "),
        ({"inputs": "x"}, "inputs: unknown field; did you mean input?"),
        ({"text": "x"}, "text: unknown field; did you mean input?"),
        ({"input": "x", "temperature": 1}, "temperature: unknown field"),
        ({"input": "x", "model": ["fake"]}, "model: "),
        ([], "body: "),
        ("x", "body: "),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(served, body, expected):
    response = httpx.post(
        f"{served.url}/v1/classify", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(expected)
    assert "\n" not in response.json()["error"]["message"]


def test_other_refusals_have_their_own_status(served, serve_with, model):
    assert post(served, {"input": "x", "model": "gpt-4"}).status_code == 404
    assert httpx.get(f"{served.url}/v1/classify").status_code == 405
    assert httpx.post(f"{served.url}/v1/classify", content='{"input": "x"}').status_code == 415
    headers = {"content-type": "application/json"}
    half = httpx.post(f"{served.url}/v1/classify", content='{"input": "\\ud800"}', headers=headers)
    assert half.status_code == 400
    with serve_with(TaskEngine(model), manifest=MANIFEST, max_body_bytes=1000) as small:
        assert post(small, {"input": "x" * 2000}).status_code == 413


def test_the_endpoints_of_another_task_name_the_right_one(served, shared):
    for path in ("/v1/completions", "/v1/chat/completions"):
        refused = post(served, {"prompt": "x"}, path)
        assert refused.status_code == 404
        expected = f"{path}: fake is a classification model and has no such endpoint; use POST /v1/classify"
        assert refused.json()["error"]["message"] == expected
    refused = post(shared, {"input": "x"})
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].endswith("use POST /v1/completions or POST /v1/chat/completions")


def test_a_client_that_leaves_frees_its_place(served, model, eventually):
    model.row_s = 0.05
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/classify", json={"input": ["x"] * 250}, timeout=0.5)
    eventually(lambda: served.engine.idle and served.driver.num_live == 0)


def test_a_full_line_is_429_with_retry_after(served, model, eventually):
    model.row_s = 0.02
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(post, served, {"input": ["x"] * 60}) for _ in range(4)]
        eventually(lambda: (served.engine.running, served.engine.waiting) == (2, 2))
        refused = post(served, {"input": "x"})
        assert (refused.status_code, refused.headers["retry-after"].isdigit()) == (429, True)
        model.row_s = 0.0
        assert [future.result().status_code for future in waiting] == [200] * 4


def test_a_text_that_the_model_fails_on_is_a_plain_500_and_counted(served):
    refused = post(served, {"input": ["fine", "!"]})
    assert refused.status_code == 500
    assert "secret" not in refused.text
    assert post(served, {"input": "fine"}).status_code == 200
    post(served, {"input": []})
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    counts = {line for line in lines if line.startswith("trivet_requests_total")}
    assert counts == {
        f'trivet_requests_total{{endpoint="classify",status="{status}"}} 1.0' for status in (200, 400, 500)
    }


def test_a_draining_server_finishes_what_it_has_and_takes_nothing_new(served, model, eventually):
    model.row_s = 0.02
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, served, {"input": ["x"] * 20})
        eventually(lambda: served.engine.running == 1)
        served.driver.draining = True
        assert post(served, {"input": "x"}).status_code == 503
        assert len(running.result().json()["data"]) == 20


def test_the_page_learns_the_task_and_the_labels(served):
    [model] = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert (model["task"], model["labels"], model["context_length"]) == ("classification", LABELS, 20)
    script = httpx.get(f"{served.url}/page.js").text
    assert 'post("/v1/classify"' in script
    assert 'model.task === "classification"' in script


def test_a_real_model_as_a_process_gives_the_labels_of_transformers(classifier, source_logits):
    model_dir, onnx_dir = classifier("llama")
    texts = ["", "the quick brown fox", "ends in <|endoftext|>", "Grüße 🙂", "the lines of the file " * 60]
    logits_NL = np.array(source_logits(model_dir, texts, 256))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(onnx_dir)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        url = next(line for line in process.stderr if line.startswith("serving tiny at ")).split()[-1]
        data = httpx.post(f"{url}/v1/classify", json={"input": texts}, timeout=30).json()["data"]
        assert [item["label"] for item in data] == [["bad", "so-so", "good"][i] for i in logits_NL.argmax(1)]
        expected_NL = np.exp(logits_NL) / np.exp(logits_NL).sum(1, keepdims=True)
        np.testing.assert_allclose([list(item["scores"].values()) for item in data], expected_NL, atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
