"""What this rank holds of the weights and the optimizer's state under DeepSpeed, ZeRO-1 to ZeRO-3, offloaded or not.

The one file that touches private names of DeepSpeed (0.19). Stages 1 and 2: `_hp_mapping`,
`_hp_optimizer_states_linked`, `_lazy_init_hp_params_optimizer_state`, `single_partition_of_fp32_groups`. Stage 3:
`ds_shape`, `ds_tensor`, `_get_fp32_opt_state_partition`, `_partition_all_parameters`,
`_reassign_or_swap_out_partitioned_parameters`, `fp32_partitioned_groups_flat`.
"""

import math

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from trainer.held import Held
from trainer.optim import initial_state


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of the whole weight: under ZeRO-3 nothing of it is there outside a forward pass."""
    return getattr(parameter, "ds_shape", parameter.shape)


def flats(zero) -> list[torch.Tensor]:
    """Return the flat fp32 tensors, a part of several weights each, that the torch optimizer inside was given."""
    is_stage_3 = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
    return zero.fp32_partitioned_groups_flat if is_stage_3 else zero.single_partition_of_fp32_groups


def held(zero, parameters: dict[str, torch.nn.Parameter], *, rank: int) -> list[Held]:
    """Return this rank's part of each weight: views of its fp32 copy and of what the optimizer keeps for it."""
    roles = link(zero)
    part_of = _of_stage_3 if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) else _of_stage_1_or_2
    parts = (part_of(zero, name, parameter, roles, rank) for name, parameter in parameters.items())
    return [part for part in parts if part is not None]


def link(zero) -> list[str]:
    """Create (zeros) what the optimizer keeps, where no step was made yet; return its names but for the count."""
    keys: list[str] = []
    for flat in flats(zero):
        fresh = initial_state(zero.optimizer, flat)
        keys = [key for key in fresh if key != "step"]
        if not zero.optimizer.state[flat]:
            zero.optimizer.state[flat] = fresh
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        # Linking happens once, during the first group's step, when later groups have no state yet: link again.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    return keys


def refresh_weights(zero) -> None:
    """After writing into the views: let the forward pass, which has copies of its own, use the new weights."""
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # those too that are kept whole: the next forward pass gathers them anew
    for group in range(len(flats(zero))):
        zero._reassign_or_swap_out_partitioned_parameters(group)


def _of_stage_1_or_2(zero, name: str, parameter: torch.nn.Parameter, roles: list[str], rank: int) -> Held | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None  # another rank holds all of it
    address = mapping.lp_fragment_address
    views = {"weight": mapping.get_hp_fragment(), **{key: mapping.get_hp_fragment(key) for key in roles}}
    start, stop = address.start, address.start + address.numel
    assert stop <= parameter.numel(), f"{name}: fragment [{start}, {stop}) of {list(parameter.shape)}"
    return Held(name, list(parameter.shape), start, stop, views, replicated=False)


def _of_stage_3(zero, name: str, parameter: torch.nn.Parameter, roles: list[str], rank: int) -> Held | None:
    shape, share = shape_of(parameter), parameter.ds_tensor.numel()
    numel = math.prod(shape)
    start, stop = min(rank * share, numel), min((rank + 1) * share, numel)
    if start == stop:
        return None  # the last ranks' parts are padding
    whole = {role: zero._get_fp32_opt_state_partition(parameter, True, role)[0] for role in roles}
    whole["weight"] = zero._get_fp32_opt_state_partition(parameter, True, None)[0]
    views = {role: view.detach()[: stop - start] for role, view in whole.items()}
    return Held(name, list(shape), start, stop, views, replicated=False)
