"""Whole weights, gradients and moments of a DeepSpeed engine, gathered from where its ZeRO stage has them, and set there.

All functions are collective over the ranks that hold the same parameter.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from moe_dist.engines.state import create_moments


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """torch's optimiser, inside ZeRO's where there is one."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def create_all_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give the optimiser the state it would create in its first step, and let DeepSpeed know where it is."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        create_moments(zero, engine.module.parameters())
    elif stage == 3:
        create_moments(zero.optimizer, zero.fp32_partitioned_groups_flat)
    else:
        create_moments(zero.optimizer, zero.single_partition_of_fp32_groups)
        zero._lazy_init_hp_params_optimizer_state()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, though ZeRO 3 has only a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_weight(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> torch.Tensor:
    """float32, the master weight where the model computes in bfloat16."""
    return safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter.detach()


def full_gradient(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> torch.Tensor:
    """After backward and before the step: reduced, not clipped."""
    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient


def full_moment(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, moment: str) -> torch.Tensor:
    """float32, of the name that torch's optimiser gives it."""
    if engine.zero_optimization_stage():
        return safe_get_full_optimizer_state(parameter, moment)
    return engine.optimizer.state[parameter][moment]


def set_weights(engine: deepspeed.DeepSpeedEngine, weights: dict[nn.Parameter, torch.Tensor]) -> None:
    """Set master weights, and those that the model computes with; all ranks give the same values."""
    stage = engine.zero_optimization_stage()
    for parameter, weight in weights.items():
        if stage == 3:
            safe_set_local_fp32_param(parameter, _own_part(parameter, weight))
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
        elif stage:
            safe_set_full_fp32_param(parameter, weight)
        else:
            parameter.data.copy_(weight)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()


def set_moments(engine: deepspeed.DeepSpeedEngine, moment: str, values: dict[nn.Parameter, torch.Tensor]) -> None:
    """Set a moment of the optimiser; all ranks give the same values."""
    stage = engine.zero_optimization_stage()
    for parameter, value in values.items():
        if stage == 3:
            safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)
        elif stage:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            engine.optimizer.state[parameter][moment].copy_(value)


def _own_part(parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
    """What ZeRO 3 has on this rank of a flattened parameter: equal parts, the last one padded by zeros."""
    sharded: Any = parameter
    size, rank = sharded.ds_tensor.numel(), dist.get_rank(sharded.ds_process_group)
    part = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))
