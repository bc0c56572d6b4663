"""The endpoints over real HTTP, before a fake engine: answers, streams, overload, disconnects, health, metrics."""

import json
import socket
import time

import httpx2 as httpx
import openai
import pytest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": "Hi", "max_tokens": 100}
ENDPOINTS = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]


def post(served, path, body, **options):
    return httpx.post(f"{served.url}{path}", json=body, timeout=10, **options)


def stream_events(served, path, body) -> list:
    with httpx.stream("POST", f"{served.url}{path}", json={**body, "stream": True}, timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_completion_has_text_counts_and_a_finish_reason(shared, reply):
    answer = post(shared, "/v1/completions", COMPLETION).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"
    choice = {"index": 0, "text": reply, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]
    num_tokens = len(reply.encode()) + 1  # one id a byte, and the end token
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": num_tokens, "total_tokens": num_tokens + 2}


def test_a_chat_answers_as_the_assistant_and_a_limit_ends_it_by_length(shared):
    answer = post(shared, "/v1/chat/completions", {**CHAT, "max_tokens": 5}).json()
    message = {"role": "assistant", "content": "Hello"}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["completion_tokens"] == 5
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    same = post(shared, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 5})
    assert same.json()["usage"] == answer["usage"]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("extra", [{}, {"max_tokens": 8}, {"stop": "🙂"}, {"stop": ["ö", "x"]}, {"stop": ", 🙃"}])
def test_a_stream_adds_up_to_the_answer_without_one(shared, path, body, extra):
    whole = post(shared, path, {**body, **extra}).json()
    events = stream_events(shared, path, {**body, **extra, "stream_options": {"include_usage": True}})
    assert events.pop() == "data: [DONE]"
    usage_event = events.pop()
    assert usage_event["choices"] == []
    assert usage_event["usage"] == whole["usage"]
    assert {event["id"] for event in events} == {usage_event["id"]}
    choices = [event["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)
    expected = whole["choices"][0]
    assert text == (expected["message"]["content"] if "message" in expected else expected["text"])
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == expected["finish_reason"]


def test_a_stop_string_over_token_boundaries_ends_the_text_and_frees_the_slot(served, reply, eventually):
    answer = post(served, "/v1/completions", {**COMPLETION, "stop": ["ld, 🙂", "never"]}).json()
    assert answer["choices"][0]["text"] == "Hello wör"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("Hello wörld, 🙂".encode())
    eventually(lambda: served.engine.idle)


def test_text_arrives_while_the_engine_still_works(served):
    served.engine.step_s = 0.05
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**COMPLETION, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert not served.engine.idle


def test_the_openai_client_gets_answers_and_streams(shared, reply):
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        completion = client.completions.create(model="fake", prompt="Hi", max_tokens=100)
        assert completion.choices[0].text == reply
        chat = client.chat.completions.create(model="fake", **CHAT)
        assert chat.choices[0].message.content == reply
        again = [*CHAT["messages"], chat.choices[0].message, {"role": "user", "content": "More"}]
        stream = client.chat.completions.create(
            model="fake", messages=again, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == reply
        assert chunks[-1].usage.completion_tokens == len(reply.encode()) + 1
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="fake", temperature=-1, **CHAT)
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.chat.completions.create(model="gpt-4", **CHAT)


def test_a_full_queue_is_429_with_retry_after_and_health_stays_quick(served):
    served.engine.step_s = 0.02
    endless = {"prompt": "x", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    with httpx.Client(limits=httpx.Limits(max_connections=50), timeout=10) as client:
        open_streams = []
        try:
            for _ in range(6):  # two run, four wait
                request = client.build_request("POST", f"{served.url}/v1/completions", json=endless)
                open_streams.append(client.send(request, stream=True))
            refused = client.post(f"{served.url}/v1/completions", json=COMPLETION)
            assert refused.status_code == 429
            assert refused.headers["retry-after"].isdigit()
            assert refused.json()["error"]["type"] == "rate_limit_error"
            started = time.monotonic()
            health = client.get(f"{served.url}/health")
            assert time.monotonic() - started < 1
            assert health.json()["running"] == 2
            assert health.json()["waiting"] == 4
        finally:
            for stream in open_streams:
                stream.close()


def raw_post(served, path: str, body: dict) -> socket.socket:
    content = json.dumps(body).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(served, eventually, stream, is_waiting):
    served.engine.step_s = 0.01
    endless = {"prompt": "x", "max_tokens": 1_000_000, "ignore_eos": True, "stream": stream}
    others = [raw_post(served, "/v1/completions", endless) for _ in range(2)] if is_waiting else []
    eventually(lambda: served.engine.running == len(others))
    connection = raw_post(served, "/v1/completions", endless)
    eventually(lambda: (served.engine.waiting if is_waiting else served.engine.running) == 1)
    connection.close()
    eventually(lambda: len(served.engine.cancelled) == 1)
    assert served.engine.running == len(others)
    assert served.engine.waiting == 0
    for other in others:
        other.close()
    eventually(lambda: served.engine.idle and served.driver.num_live == 0)


def test_an_engine_failure_is_a_plain_500_and_the_next_request_is_served(served, reply):
    served.engine.step_errors = [RuntimeError("/secret/path/model.onnx: bad node")]
    response = post(served, "/v1/completions", COMPLETION)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    served.engine.step_errors = [RuntimeError("/secret/path/model.onnx: bad node")]
    events = stream_events(served, "/v1/chat/completions", CHAT)
    assert "secret" not in str(events)
    assert events[-2]["error"]["type"] == "server_error"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        served.engine.step_errors = [RuntimeError("again")]
        with pytest.raises(openai.APIError, match="engine failed"):
            list(client.chat.completions.create(model="fake", stream=True, **CHAT))
    assert post(served, "/v1/completions", COMPLETION).json()["choices"][0]["text"] == reply


def test_an_unexpected_error_shows_nothing_of_the_machine(served, monkeypatch):
    def explode(request):
        raise OSError(13, "Permission denied", "/home/someone/model")

    monkeypatch.setattr(served.engine, "add", explode)
    response = post(served, "/v1/completions", COMPLETION)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error; the server's log has the reason"


# --- health and metrics ----------------------------------------------------------------------------------------------


def test_health_tells_the_truth(served):
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 200
    assert health.json() | {"uptime_s": 0} == {
        "status": "ok",
        "model": "fake",
        "provider": "cpu",
        "slots": 2,
        "running": 0,
        "waiting": 0,
        "context_length": 200,
        "uptime_s": 0,
    }
    served.driver.draining = True
    draining = httpx.get(f"{served.url}/health")
    assert draining.status_code == 503
    assert draining.json()["status"] == "draining"
    refused = post(served, "/v1/completions", COMPLETION)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    served.driver.draining = False
    served.engine.step_errors = [RuntimeError("broken")] * 3
    for _ in range(3):
        post(served, "/v1/completions", COMPLETION)
    assert httpx.get(f"{served.url}/health").json()["status"] == "unhealthy"
    assert post(served, "/v1/completions", COMPLETION).status_code == 200
    assert httpx.get(f"{served.url}/health").status_code == 200
    served.driver.stop()
    assert httpx.get(f"{served.url}/health").status_code == 503


def test_metrics_count_requests_and_tokens(served, eventually, reply):
    post(served, "/v1/completions", COMPLETION)
    post(served, "/v1/chat/completions", {**CHAT, "n": 2})
    connection = raw_post(served, "/v1/completions", {**COMPLETION, "ignore_eos": True, "max_tokens": 1_000_000})
    eventually(lambda: served.engine.running == 1)
    connection.close()
    eventually(lambda: served.engine.idle)

    def scrape() -> list[str]:
        return httpx.get(f"{served.url}/metrics").text.splitlines()

    assert 'trivet_requests_total{endpoint="completions",status="200"} 1.0' in scrape()
    assert 'trivet_requests_total{endpoint="chat",status="400"} 1.0' in scrape()
    eventually(lambda: 'trivet_requests_total{endpoint="completions",status="499"} 1.0' in scrape())
    assert 'trivet_tokens_total{kind="prompt"} 4.0' in scrape()
    assert "trivet_slots 2.0" in scrape()
    assert "trivet_running 0.0" in scrape()
    assert "trivet_healthy 1.0" in scrape()
    assert 'trivet_first_token_seconds_count{endpoint="completions"} 2.0' in scrape()


def test_a_failed_request_is_counted_once(served):
    served.engine.step_errors = [RuntimeError("broken")]
    post(served, "/v1/completions", COMPLETION)
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    assert [line for line in lines if line.startswith("trivet_requests_total")] == [
        'trivet_requests_total{endpoint="completions",status="500"} 1.0'
    ]
