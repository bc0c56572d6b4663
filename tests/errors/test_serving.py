"""What a user of generate, verify and serve sees: proof, ports, providers, prompts that are too long."""

import json
import shutil
import socket

import pytest


@pytest.fixture
def onnx_copy(work):
    """A copy of the export that a test may spoil, as ./spoiled."""
    return shutil.copytree((work / "onnx").resolve(), work / "spoiled")


COMMANDS = {"generate": ["--prompt", "x"], "serve": ["--port", "0"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unverified_directory_is_refused_with_the_command_that_verifies_it(refused, onnx_copy, command):
    (onnx_copy / "verification.json").unlink()
    assert refused(command, "spoiled", *COMMANDS[command]) == (
        "spoiled: never verified; run: trivet verify spoiled --provider cpu"
    )


@pytest.mark.parametrize("command", [*COMMANDS, "verify"])
def test_an_altered_file_is_named(refused, onnx_copy, command):
    path = onnx_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("cat", "dog"))
    message = refused(command, "spoiled", *COMMANDS.get(command, []))
    assert message.startswith("spoiled/tokenizer.json: altered since it was written (sha256 differs);")
    assert "again" in message


def test_a_model_directory_is_no_onnx_directory(refused, work):
    assert refused("generate", "model", "--prompt", "x") == (
        "model: its trivet.json says 'model'; expected 'onnx'; make one with: trivet export"
    )


def test_a_port_that_is_taken_is_named_before_the_model_loads(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused("serve", "onnx", "--port", port)
    assert message == (f"port: cannot listen on 127.0.0.1:{port} (Address already in use); choose another with --port")


@pytest.mark.parametrize("command", [*COMMANDS, "verify"])
def test_cuda_that_is_not_there_is_named(refused, command):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    message = refused(command, "onnx", "--provider", "cuda", *COMMANDS.get(command, []))
    assert message.startswith("provider: cuda was asked for, but the installed onnxruntime")
    assert "use provider cpu, or: pip" in message


def test_an_unknown_provider_names_those_that_are_known(refused):
    assert refused("verify", "onnx", "--provider", "gpu") == "provider: 'gpu' is unknown; accepted: cpu, cuda, tensorrt"


@pytest.mark.parametrize("as_file", [False, True])
def test_a_prompt_longer_than_the_context_says_both_lengths(refused, work, as_file, write_rows):
    write_rows(work / "in.jsonl", [{"prompt": "short"}, {"prompt": "long " * 200}])
    arguments = ["--input", "in.jsonl", "--output", "out.jsonl"] if as_file else ["--prompt", "long " * 200]
    message = refused("generate", "onnx", *arguments)
    assert message.startswith("row 2: " if as_file else "")
    assert "tokens; accepted: at most 127" in message
    assert message.endswith("shorten it")


def test_the_server_says_so_too_with_status_400(work):
    from fastapi.testclient import TestClient

    from serving.driver import Driver
    from serving.engine import Engine
    from serving.server.app import build_app
    from serving.text import Text

    engine = Engine.open(work / "onnx", slots=2)
    driver = Driver(engine)
    driver.start()
    try:
        client = TestClient(build_app(driver, Text.open(work / "onnx"), engine.manifest, name="tiny"))
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "long " * 200})
    finally:
        driver.stop()
    assert answer.status_code == 400
    error = json.loads(answer.text)["error"]
    assert "tokens; accepted: at most 127" in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "prompt")
