"""Which kernels training really runs on this machine: each is started once, on small tensors of our shapes."""

import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

from launch.doctor import accelerators, repair
from launch.doctor.findings import Finding, collect

# B rows, H heads, T tokens, D head size
B, H, T, D = 1, 4, 64, 32
# A part of the operator's name in torch's own profile -> what we call it. The first that matches counts.
ATTENTION = {"flash": "flash", "efficient": "memory-efficient", "cudnn": "cuDNN", "overrideable": "device's own"}
MATRIX_DIM = 768
COMPILERS = ("c++", "g++", "clang++")


def training(gpus: list[str]) -> list[Finding]:
    """Return what was found by running: device, attention, bf16, optimizer, collectives; and the compiler."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks = [
        lambda: accelerators.torch_devices(gpus),
        lambda: attention(device, "float32"),
        lambda: attention(device, "bfloat16"),
        lambda: bf16_speed(device),
        lambda: fused_adamw(device),
        lambda: collectives(device),
        compiler,
    ]
    return collect(checks, repair.reinstall())


def attention(device: str, dtype: str) -> list[Finding]:
    """The kernel that attention takes with the mask of packed rows, forward and backward, and whether it is right."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, device=device, dtype=getattr(torch, dtype), requires_grad=True) for _ in "qkv")
    segment = torch.arange(T, device=device) < T // 2
    mask_11TT = ((segment[:, None] == segment) & torch.ones(T, T, device=device).tril().bool())[None, None]
    with profile(activities=[ProfilerActivity.CPU]) as ran:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_11TT)
        out.float().sum().backward()
    scores = (q.double() @ k.double().transpose(-1, -2) / D**0.5).masked_fill(~mask_11TT, float("-inf"))
    error = (out.double() - scores.softmax(-1) @ v.double()).abs().max().item()
    return [_attention_finding(dtype, {event.key for event in ran.key_averages()}, error)]


def _attention_finding(dtype: str, operators: set[str], error: float) -> Finding:
    names = " ".join(name for name in operators if "_scaled_dot_product_" in name)
    kernel = next((shown for part, shown in ATTENTION.items() if part in names), "math (unfused)")
    subject, found = f"attention {dtype}", f"{kernel}, with the mask of packed rows"
    if error > (0.05 if dtype == "bfloat16" else 0.01):  # room for TF32 and bf16; a wrong mask is off by about 1
        return Finding(
            subject, f"{found}: wrong by {error:.2g}", "problem", repair.reinstall(), value=error, unit="largest error"
        )
    if kernel.startswith("math"):
        found = f"{found}: memory grows with the square of the row length"
        return Finding(subject, found, "note", "trivet train CONFIG batch.max_length=512")
    return Finding(subject, found)


def bf16_speed(device: str) -> list[Finding]:
    """How much faster a matrix product is in bf16 than in fp32; slower means that this processor emulates it."""
    rates = {dtype: _gflops(device, dtype) for dtype in ("float32", "bfloat16")}
    ratio = rates["bfloat16"] / rates["float32"]
    found = f"{ratio:.1f} x the speed of fp32 ({rates['bfloat16']:,.0f} against {rates['float32']:,.0f} GFLOP/s)"
    if ratio < 1:
        fix = "trivet train CONFIG precision.type=fp32"
        return [Finding("bf16", f"{found}: no gain here", "note", fix, value=round(ratio, 2), unit="x")]
    return [Finding("bf16", found, value=round(ratio, 2), unit="x")]


def _gflops(device: str, dtype: str) -> float:
    """The best of five products of two square matrices."""
    import torch

    matrix = torch.randn(MATRIX_DIM, MATRIX_DIM, device=device).to(getattr(torch, dtype))
    best_s = float("inf")
    for _ in range(6):  # the first warms up, and is never the best
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * MATRIX_DIM**3 / best_s / 1e9


def fused_adamw(device: str) -> list[Finding]:
    """Whether the fused AdamW, which training uses, steps as the plain one does."""
    import torch

    def stepped(fused: bool) -> Any:
        weight = torch.nn.Parameter(torch.ones(8, device=device))
        weight.grad = torch.linspace(-1, 1, 8, device=device)
        torch.optim.AdamW([weight], lr=0.1, fused=fused).step()
        return weight.detach()

    if not torch.allclose(stepped(True), stepped(False), atol=1e-5):
        return [Finding("optimizer", "fused AdamW steps otherwise than the plain one", "problem", repair.reinstall())]
    return [Finding("optimizer", f"fused AdamW on {device}, equal to the plain one")]


def collectives(device: str) -> list[Finding]:
    """Which backends really start a process group, of one process, and add up a tensor."""
    import torch
    import torch.distributed as dist

    findings = []
    for backend, where in (("nccl", "cuda"), ("gloo", "cpu")):
        if where == "cuda" and device != "cuda":
            continue
        try:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            dist.all_reduce(torch.ones(1, device=where))
            findings.append(Finding(f"collectives ({backend})", "a group of one starts"))
        except Exception as error:
            reason = str(error).splitlines()[0]
            fix = f"export {backend.upper()}_SOCKET_IFNAME=lo  # many machines: their common network interface"
            findings.append(Finding(f"collectives ({backend})", f"no group starts: {reason}", "problem", fix))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return findings


def compiler() -> list[Finding]:
    """A compiler with Python's headers. torch.compile and DeepSpeed's own kernels need it, Trivet's training not."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if found and headers:
        return [Finding("C++ compiler", f"{found}, with Python's headers")]
    missing = " and ".join(filter(None, ["" if found else "no compiler", "" if headers else "no Python.h"]))
    fix = repair.system_package("g++ python3-dev", "gcc-c++ python3-devel")
    return [Finding("C++ compiler", f"{missing}; only torch.compile and DeepSpeed's own kernels need it", "note", fix)]
