"""What is exported for CUDA is proven there, and decodes as the source does. None of it has run on a GPU yet."""

from pathlib import Path

import pytest

from serving.directory import read_manifest
from serving.engine import Engine
from serving.request import Sampling
from serving.session import check_provider
from serving.verify import verify

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def exported(save_model, tmp_path_factory):
    """Return a function that exports the model for CUDA in a format, once; it returns the folder and the record."""
    from serving.export import Options, export_model

    done: dict[str, tuple[Path, dict]] = {}
    source = save_model(tmp_path_factory.mktemp("cuda") / "model", "llama", head_dim=64)  # as CUDA's kernels want it

    def of(dtype: str) -> tuple[Path, dict]:
        if dtype not in done:
            folder = tmp_path_factory.mktemp("onnx") / dtype
            done[dtype] = folder, export_model(source, folder, Options(dtype=dtype, optimize_for="cuda"))
        return done[dtype]

    return of


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_export_for_cuda_is_proven_on_cuda(exported, dtype):
    folder, record = exported(dtype)
    assert (record["provider"], record["passed"]) == ("cuda", True)
    assert read_manifest(folder, "onnx")["dtype"] == dtype


def test_fp32_on_cuda_gives_the_tokens_of_the_cpu(exported):
    folder, _ = exported("fp32")
    verify(folder, "cpu")
    sampling = Sampling(max_new_tokens=24, ignore_end=True)
    prompts = [[5, 6, 7], [8] * 40, [9], [10, 11] * 60]
    tokens = [
        [request.output_ids for request in Engine.open(folder, provider=provider, slots=2).generate(prompts, sampling)]
        for provider in ("cpu", "cuda")
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_on_cuda_gives_the_same_tokens_again(exported, dtype):
    folder, _ = exported(dtype)
    engine = Engine.open(folder, provider="cuda", slots=4)
    runs = [engine.generate([[5, 6, 7], [8] * 40], Sampling(max_new_tokens=16, ignore_end=True)) for _ in range(2)]
    first, second = ([request.output_ids for request in run] for run in runs)
    assert first == second


def test_tensorrt_passes_the_same_proof(exported):
    from serving.directory import BadInput

    try:
        check_provider("tensorrt")
    except BadInput as error:
        pytest.skip(str(error))
    folder, _ = exported("fp16")
    assert verify(folder, "tensorrt")["passed"]
