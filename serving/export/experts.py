"""The experts of every exported mixture: com.microsoft.MoE, which runs for each token those that it was routed to.

It is registered in transformers' experts interface, so that routing stays the model's own code, whatever that is. Shape
letters: N tokens, K experts of each token, E experts, H hidden size, I inner size.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from serving.export.patterns import new_weight, nodes_of, weight_of
from serving.export_paths import ExportError

NAME = "trivet_moe"

_NOT_ROUTED = -1e4  # of a logarithm: its exponential is 0 in every number format
_CONCATENATED, _INTERLEAVED = 2, 1  # how rows of gate and up lie in one matrix: com.microsoft.MoE's words


def use_operator(model: PreTrainedModel) -> None:
    """Let the experts of the model, if it has any, answer through `routed_experts`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, routed_experts)
    model.set_experts_implementation(NAME)


def check_experts(folder: Path, model: PreTrainedModel) -> None:
    """Raise ExportError for experts that are more than down(silu(gate(x)) * up(x)), or outside of the interface."""
    whole = f"{folder}: {type(model).__name__} cannot be exported"
    for name, module in model.named_modules():
        if name.endswith(".experts") and not _is_routed(module):
            raise ExportError(
                f"{whole}: it does not put its experts through transformers' experts interface; accepted: mixtures of "
                "experts that do (Mixtral, Qwen 3, OLMoE ...)"
            )
        if _is_routed(module) and (more := _more(module)):
            raise ExportError(
                f"{whole}: its experts have {', '.join(more)}, which the exported ones do not; accepted: experts that "
                "answer down(silu(gate) * up)"
            )


def routed_experts(
    module: torch.nn.Module, hidden_NH: torch.Tensor, experts_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Return [N, H]: for each token what its experts answer, by their weights. See check_experts for which."""
    if hidden_NH.device.type == "meta":
        return torch.empty_like(hidden_NH)
    # The operator routes by itself: the largest of a softmax, made to add up to 1. So it is given logarithms of the
    # weights, nothing of the other experts, and what the weights really add up to comes after it.
    scores_NE = hidden_NH.new_full((hidden_NH.shape[0], module.num_experts), _NOT_ROUTED)
    scores_NE = scores_NE.scatter(1, experts_NK, weights_NK.log().to(hidden_NH.dtype))
    answer_NH = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        (hidden_NH, scores_NE, module.gate_up_proj, None, module.down_proj),
        attrs={
            "k": experts_NK.shape[1],
            "activation_type": "swiglu",
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "swiglu_fusion": _CONCATENATED,
            "normalize_routing_weights": 1,
        },
        dtype=hidden_NH.dtype,
        shape=hidden_NH.shape,
        version=1,
    )
    return answer_NH * weights_NK.sum(-1, keepdim=True).to(hidden_NH.dtype)


def _is_routed(module: torch.nn.Module) -> bool:
    return hasattr(type(module), "_apply_gate")


def _more(module: torch.nn.Module) -> list[str]:
    """Return what these experts have beside a gate, an up and a down."""
    found = {
        "a gate of their own": type(module)._apply_gate is not _default_apply_gate or not module.has_gate,
        "biases": module.has_bias,
        "a norm": module.has_post_expert_norm,
        "transposed weights": module.is_transposed or not module.is_concatenated,
    }
    activation = type(getattr(module, "act_fn", None)).__name__
    found["an activation that is not silu"] = activation not in ("SiLUActivation", "SiLU")
    return [what for what, is_there in found.items() if is_there]


def interleave(model: ir.Model) -> None:
    """Lay the rows of gate and up of each expert in turns, as the CPU's and CUDA's operators want them."""
    graph = model.graph
    for node in nodes_of(graph, "MoE"):
        weight = node.inputs[2]
        assert weight is not None
        assert weight.const_value is not None
        shape = weight.const_value.shape.numpy()

        def in_turns(some: slice, weight: ir.Value = weight) -> np.ndarray:
            rows_ERH = weight_of(weight, some)
            num_experts, num_rows, size = rows_ERH.shape
            return rows_ERH.reshape(num_experts, 2, num_rows // 2, size).swapaxes(1, 2).reshape(rows_ERH.shape)

        node.replace_input_with(2, new_weight(graph, f"{weight.name}.in_turns", weight, shape, in_turns))
        node.attributes["swiglu_fusion"] = ir.AttrInt64("swiglu_fusion", _INTERLEAVED)
