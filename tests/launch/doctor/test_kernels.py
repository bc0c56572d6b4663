"""What will really run: devices, kernels and providers, on this machine and on made-up ones."""

import sys
import types

import pytest

from launch.doctor import accelerators, kernels, providers

L4 = "NVIDIA L4, 23034 MiB, 550.54.15"


def test_the_gpus_are_the_lines_of_nvidia_smi(program, by_subject):
    program("nvidia-smi", f'echo "{L4}"')
    assert accelerators.nvidia_gpus() == [L4]
    assert accelerators.driver([L4], [])[0].state == "ok"


def test_a_driver_that_does_not_answer_is_no_gpu(program):
    program("nvidia-smi", "echo could not talk to the driver; exit 9")
    assert accelerators.nvidia_gpus() == []


@pytest.mark.parametrize(
    ("cuda", "driver", "needed"),
    [
        ("13.0", "580.65.06", None),
        ("13.0", "570.86.10", 580),
        ("12.8", "525.60.13", None),
        ("12.8", "515.43.04", 525),
        (None, "515.43.04", None),
    ],
)
def test_a_driver_is_too_old_below_the_first_one_of_the_cuda_major_version(cuda, driver, needed):
    assert accelerators.driver_too_old(cuda, [f"NVIDIA L4, 23034 MiB, {driver}"]) == needed


@pytest.mark.parametrize(
    ("cuda", "said", "fix"),
    [(None, "a CPU build that cannot use the GPU", "install"), ("13.0", "needs NVIDIA driver 580", "580")],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem_that_says_why(monkeypatch, cuda, said, fix):
    fake = types.SimpleNamespace(
        __version__="2.13.0",
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(is_available=lambda: False),
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    [finding] = accelerators.torch_devices([L4])
    assert finding.state == "problem"
    assert said in finding.found
    assert fix in finding.fix
    assert "CPU builds" not in finding.fix


def test_attention_runs_a_fused_kernel_here_with_the_mask_of_packed_rows():
    pytest.importorskip("torch")
    [finding] = kernels.attention("cpu", "float32")
    assert finding.state == "ok"
    assert finding.found.startswith("flash")


def test_attention_that_falls_back_to_the_unfused_kernel_is_a_note():
    attention = pytest.importorskip("torch.nn.attention")
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        [finding] = kernels.attention("cpu", "float32")
    assert finding.state == "note"
    assert finding.found.startswith("math")


def test_attention_that_ignores_the_mask_is_a_problem(monkeypatch):
    torch = pytest.importorskip("torch")
    real = torch.nn.functional.scaled_dot_product_attention
    broken = lambda q, k, v, attn_mask: real(q, k, v)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    for dtype in ("float32", "bfloat16"):
        [finding] = kernels.attention("cpu", dtype)
        assert finding.state == "problem"
        assert "wrong by" in finding.found


def test_bf16_that_is_slower_than_fp32_is_a_note(monkeypatch):
    monkeypatch.setattr(kernels, "_gflops", lambda device, dtype: {"float32": 100.0, "bfloat16": 20.0}[dtype])
    [finding] = kernels.bf16_speed("cpu")
    assert (finding.state, finding.value, finding.unit) == ("note", 0.2, "x")
    monkeypatch.undo()
    assert kernels.bf16_speed("cpu")[0].value > 0


def test_the_fused_optimizer_is_compared_with_the_plain_one(monkeypatch):
    torch = pytest.importorskip("torch")
    assert kernels.fused_adamw("cpu")[0].state == "ok"
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, lr, fused: real(params, lr=2 * lr if fused else lr))
    assert kernels.fused_adamw("cpu")[0].state == "problem"


def test_a_group_of_one_starts_and_a_wrong_interface_keeps_it_from_starting(monkeypatch):
    pytest.importorskip("torch")
    [finding] = kernels.collectives("cpu")
    assert (finding.subject, finding.state) == ("collectives (gloo)", "ok")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    [finding] = kernels.collectives("cpu")
    assert finding.state == "problem"
    assert "nowhere0" in finding.found
    assert finding.fix.startswith("export GLOO_SOCKET_IFNAME=lo")


def test_a_machine_without_a_compiler_gets_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [finding] = kernels.compiler()
    monkeypatch.undo()  # the check of commands looks at PATH
    assert finding.state == "note"
    assert "no compiler" in finding.found


def test_cuda_that_is_offered_but_does_not_load_is_a_problem(monkeypatch, by_subject):
    fake = fake_onnxruntime(offered=["CUDAExecutionProvider", "CPUExecutionProvider"], loads=["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    finding = by_subject(providers.serving([L4]))["serving runs on"]
    assert finding.state == "problem"
    assert "does not load" in finding.found


def test_a_gpu_beside_an_onnxruntime_without_cuda_is_a_note(monkeypatch, by_subject):
    fake = fake_onnxruntime(offered=["CPUExecutionProvider"], loads=["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    assert by_subject(providers.serving([L4]))["serving runs on"].state == "note"


def test_an_onnxruntime_whose_files_were_removed_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    [finding] = providers.serving([])
    assert finding.state == "problem"
    assert "--force-reinstall" in finding.fix


def test_the_real_onnxruntime_decodes_on_the_cpu(by_subject):
    pytest.importorskip("onnxruntime")
    findings = by_subject(providers.serving([]))
    assert findings["serving runs on"].found.startswith("CPU")
    assert findings["decoding on cpu"].state == "ok"
    assert findings["serving threads"].value >= 1


def test_decoding_that_is_wrong_is_a_problem(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    scale_1, scale_tiny = bytes.fromhex("0000803f"), bytes.fromhex("00000033")  # 3e-8; 0 would mean the default
    assert providers.ATTENTION_ONNX.count(scale_1) == 1
    monkeypatch.setattr(providers, "ATTENTION_ONNX", providers.ATTENTION_ONNX.replace(scale_1, scale_tiny))
    finding = providers.decoding_attention(onnxruntime, "CPUExecutionProvider")
    assert finding.state == "problem"
    assert finding.value == pytest.approx(1.0)  # the weights are 1/2 and 1/2: attention is 6, not 7


@pytest.mark.parametrize("half", [False, True])
def test_the_attention_graph_is_valid_onnx_of_the_kernel_that_the_export_writes(half):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(providers.ATTENTION_ONNX_HALF if half else providers.ATTENTION_ONNX)
    [node] = model.graph.node
    assert (node.domain, node.op_type) == ("com.microsoft", "GroupQueryAttention")
    types_ = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    element = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    assert types_ == dict.fromkeys(["q", "k", "v", "pk", "pv"], element) | dict.fromkeys("st", onnx.TensorProto.INT32)


def fake_onnxruntime(offered, loads):
    class Session:
        def __init__(self, model, options, providers):
            self.providers = providers

        def get_providers(self):
            return [name for name in self.providers if name in loads] or ["CPUExecutionProvider"]

    return types.SimpleNamespace(
        __version__="1.31.1",
        SessionOptions=types.SimpleNamespace,
        InferenceSession=Session,
        get_available_providers=lambda: offered,
    )
