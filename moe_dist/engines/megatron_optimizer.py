"""Megatron-Core's optimizers, whole or distributed over the data ranks, as values by parameter.

Its distributed optimizer gives each data rank a flat range of every parameter that falls into its share of the buffers.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from moe_dist.config import Config


def build_optimizer(config: Config, chunks: list[Any]) -> Any:
    """AdamW or SGD over the chunks of this rank, with all of its state. Weight decay on matrices only, as Megatron's is."""
    ours = config.training.optimizer
    theirs = OptimizerConfig(
        optimizer="adam" if ours.name == "adamw" else "sgd",
        lr=ours.learning_rate,
        min_lr=0.0,
        weight_decay=ours.weight_decay,
        adam_beta1=ours.betas[0],
        adam_beta2=ours.betas[1],
        adam_eps=ours.epsilon,
        sgd_momentum=ours.momentum,
        params_dtype=torch.float32,
        clip_grad=0.0,  # the engine clips by the norm that it has found
        use_distributed_optimizer=config.engine.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(theirs, chunks, use_gloo_process_groups=False)
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            group["weight_decay"] = ours.weight_decay * group["wd_mult"]
            for parameter in group["params"]:
                state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in moments(part)}
                if isinstance(part.optimizer, torch.optim.AdamW):
                    state["step"] = torch.zeros((), dtype=torch.float32)
                part.optimizer.state[parameter] = state
    return optimizer


def parts(optimizer: Any) -> list[Any]:
    """Of dense and expert weights, those that this rank has."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not part.is_stub_optimizer]


def moments(part: Any) -> list[str]:
    """Names of the moments that it keeps."""
    group = part.optimizer.param_groups[0]
    if "betas" in group:
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if group["momentum"] else []


def values(optimizer: Any, key: str) -> dict[nn.Parameter, torch.Tensor]:
    """For each parameter of this rank a moment, or with "grad" the reduced gradient; in its shape. Collective."""
    found: dict[nn.Parameter, torch.Tensor] = {}
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            found |= _gathered(part, key)
        else:
            found |= {p: _value(part, p, key) for p in part.get_parameters()}
    return found


def set_values(optimizer: Any, key: str, new: dict[nn.Parameter, torch.Tensor]) -> None:
    """Set a moment of every parameter."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter, share, shard in _shards(part):
                _value(part, shard, key).copy_(new[parameter].view(-1)[share])
        else:
            for parameter in part.get_parameters():
                _value(part, parameter, key).copy_(new[parameter])


def clip(optimizer: Any, norm: float, max_norm: float) -> None:
    """Scale gradients down to `max_norm`."""
    for part in parts(optimizer):
        clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm, norm)


def get_updates(optimizer: Any) -> torch.Tensor:
    """Optimiser steps taken, float32 []; 0 for SGD."""
    for part in parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:  # fused optimizers count once for a group
                return torch.tensor(float(group["step"]))
            for parameter in group["params"]:
                if "step" in part.optimizer.state[parameter]:
                    return part.optimizer.state[parameter]["step"].cpu().clone()
    return torch.zeros(())


def set_updates(optimizer: Any, updates: torch.Tensor) -> None:
    """Set the count of optimiser steps, which AdamW's bias correction needs."""
    for part in parts(optimizer):
        if "betas" not in part.optimizer.param_groups[0]:
            continue
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = int(updates)
                continue
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"].copy_(updates)


def _value(part: Any, parameter: torch.Tensor, key: str) -> torch.Tensor:
    value = parameter.grad if key == "grad" else part.optimizer.state[parameter][key]
    assert value is not None
    return value


def _shards(part: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, slice, torch.Tensor]]:
    """Parameters of which this rank has a share: the range of the flat parameter, and what the optimizer has of it."""
    for parameter, (group, place) in part.model_param_group_index_map.items():
        share = part._get_model_param_range_map(parameter)["param"]
        yield parameter, slice(share.start, share.end), part.optimizer.param_groups[group]["params"][place]


def _gathered(part: DistributedOptimizer, key: str) -> dict[nn.Parameter, torch.Tensor]:
    parameters = [parameter for buffer in part.buffers for parameter in buffer.params]
    if not parameters:  # the experts' part, on a stage that has none
        return {}
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    pieces = {p: piece.view_as(p) for p, piece in zip(parameters, flat.split(sizes), strict=True)}
    for parameter, share, shard in _shards(part):
        pieces[parameter].view(-1)[share] = _value(part, shard, key)
    dist.all_reduce(flat, group=part.data_parallel_group)
    return pieces
