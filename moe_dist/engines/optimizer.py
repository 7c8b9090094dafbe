"""The optimiser step on the parts of the parameters that this rank holds.

AdamW and SGD work on each value alone, so they run on the local part of every parameter as an ordinary tensor: the same
fused kernels whether parameters are sharded, replicated or whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_dist.config.schema import OptimizerConfig
from moe_dist.model.names import local_tensor


@dataclass(frozen=True)
class LocalParameter:
    """A parameter and the part of it on this rank, in shared storage."""

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    replicas: int
    """Ranks that hold this very part: the norm counts it once."""


def local_parameters(model: nn.Module) -> list[LocalParameter]:
    """The parameters of a distributed model, in the order of the model."""
    found = []
    for name, parameter in model.named_parameters():
        replicas = 1
        if isinstance(parameter, DTensor) and not parameter.placements[0].is_shard():
            replicas = parameter.device_mesh.size()
        found.append(LocalParameter(name, parameter, nn.Parameter(local_tensor(parameter)), replicas))
    return found


def build_optimizer(parameters: list[LocalParameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD of the local parts."""
    return optimizer_of(decay_groups([p.local for p in parameters], config.weight_decay), config)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only (expert stacks are matrices, norms and biases are not)."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_of(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD of parameter groups."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def take_gradients(parameters: list[LocalParameter]) -> None:
    """Hand the reduced gradients to the local parts."""
    for p in parameters:
        assert p.parameter.grad is not None, f"{p.name} got no gradient"
        p.local.grad = local_tensor(p.parameter.grad)


def drop_gradients(parameters: list[LocalParameter]) -> None:
    """Forget the gradients of the step."""
    for p in parameters:
        p.parameter.grad = p.local.grad = None


def squared_norm(parameters: list[LocalParameter]) -> torch.Tensor:
    """This rank's part, float64 [], of the squared gradient norm: summed over all ranks it counts every value once."""
    norms = torch._foreach_norm(_gradients(parameters))
    once = torch.tensor([1 / p.replicas for p in parameters], dtype=torch.float64, device=norms[0].device)
    return torch.stack(norms).double().square() @ once


def clip(parameters: list[LocalParameter], norm: float, max_norm: float) -> None:
    """Scale gradients down to `max_norm` if their global norm is above it."""
    if norm > max_norm:
        torch._foreach_mul_(_gradients(parameters), max_norm / norm)


def _gradients(parameters: list[LocalParameter]) -> list[torch.Tensor]:
    return [p.local.grad for p in parameters if p.local.grad is not None]
