"""A real server process over a real exported model, asked by the openai client."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from serving.engine import Engine
from serving.request import Sampling
from serving.text import Text

REPOSITORY = Path(__file__).parents[3]
SERVE = """
import sys
from serving.server import serve
serve(sys.argv[1], port=0, name="tiny", slots=3, api_keys=["a-key-for-tests"])
heavy = {"torch", "transformers", "ray", "pandas"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
CHATS = [[{"role": "user", "content": f"What does fold {index} do?"}] for index in range(8)]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def server(onnx_dir):
    """(process, address) of `serve` on the tiny Llama."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(onnx_dir)], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        ready = next(line for line in process.stderr if line.startswith("serving tiny at "))
        yield process, ready.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="a-key-for-tests", max_retries=0) as client:
        yield client


def expected_texts(onnx_dir, sampling: Sampling) -> list[str]:
    """What the engine gives in this process, one request at a time."""
    engine, text = Engine.open(onnx_dir, slots=1), Text.open(onnx_dir)
    finished = [engine.generate([text.chat(messages)], sampling)[0] for messages in CHATS]
    end_ids = set(engine.manifest["end_token_ids"])
    return [text.decode([token for token in request.output_ids if token not in end_ids]) for request in finished]


@pytest.mark.parametrize("sampling", [Sampling(NUM_TOKENS), Sampling(NUM_TOKENS, temperature=1.0, top_p=0.9, seed=7)])
def test_a_crowd_of_clients_streaming_or_not_gets_what_the_engine_gives_alone(onnx_dir, client, sampling):
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    settings = {name: openai.omit if value is None else value for name, value in settings.items()}

    def whole(messages) -> str:
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=NUM_TOKENS, **settings)
        return answer.choices[0].message.content

    def streamed(messages) -> str:
        chunks = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=NUM_TOKENS, stream=True, **settings
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda job: job[0](job[1]), [(ask, chat) for ask in (whole, streamed) for chat in CHATS])
        )
    expected = expected_texts(onnx_dir, sampling)
    assert answers == expected + expected
    assert len(set(expected)) > 1


def test_a_prompt_longer_than_the_context_is_refused_with_the_limit(client):
    with pytest.raises(openai.BadRequestError, match="at most 255"):
        client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="99999"):
        client.completions.create(model="tiny", prompt=[99999], max_tokens=1)


def test_without_the_key_only_health_and_the_page_answer(server):
    assert httpx.get(f"{server[1]}/health").json()["provider"] == "cpu"
    assert httpx.get(f"{server[1]}/").status_code == 200
    assert httpx.get(f"{server[1]}/metrics").status_code == 401


def test_the_process_imported_no_torch_and_ends_with_code_0(server):
    process, _ = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, process.stderr.read()
