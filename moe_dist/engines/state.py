"""Everything that a checkpoint of an engine holds, by names that do not depend on the layout.

model.{weight}                       see moe_dist.model.names
optimizer.{moment}.{weight}          exp_avg and exp_avg_sq of AdamW, momentum_buffer of SGD
optimizer.updates                    optimiser steps taken (skipped ones are not)
balance.{layer}.{value}              of the balancer: bias, and what else the routing keeps
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from moe_dist.engines.optimizer import LocalParameter
from moe_dist.model import Transformer
from moe_dist.model.names import global_tensors, local_tensor

Source = Callable[[nn.Parameter], torch.Tensor]


def engine_state(
    model: Transformer, parameters: list[LocalParameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The tensors of this rank by global name; writing into them changes the model and the optimiser, but for `updates`."""
    local_of = {id(p.parameter): p.local for p in parameters}

    def source_of(moment: str) -> Source:
        return lambda parameter: optimizer.state[local_of[id(parameter)]][moment]

    sources = {f"optimizer.{moment}": source_of(moment) for moment in moments_of(optimizer)}
    return named_state(model, {"model": local_tensor, **sources}, optimizer)


def named_state(
    model: Transformer, sources: Mapping[str, Source], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The tensors of this rank by global name.

    Args:
        sources: for each prefix of names, `model` and `optimizer.{moment}`, what gives the tensor of a parameter.
    """
    state = {
        f"{kind}.{name}": tensor for kind, source in sources.items() for name, tensor in global_tensors(model, source)
    }
    for number, layer in model.moe_layers.items():
        state |= {f"balance.{number}.{name}": value for name, value in layer.router.balance.values()}
    return state | {"optimizer.updates": get_updates(optimizer)}


def create_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[torch.Tensor]) -> None:
    """Give the optimiser the state it would create in its first step, so that a checkpoint can be read into it.

    Args:
        tensors: what it updates.
    """
    for local in tensors:
        state = {moment: torch.zeros_like(local) for moment in moments_of(optimizer)}
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
        optimizer.state[local] = state


def get_updates(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Optimiser steps taken, float32 []; 0 for SGD, whose step does not depend on it."""
    for state in optimizer.state.values():
        if "step" in state:
            return state["step"].cpu().clone()
    return torch.zeros(())


def set_updates(optimizer: torch.optim.Optimizer, updates: torch.Tensor) -> None:
    """Set the count of optimiser steps, which AdamW's bias correction needs."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].copy_(updates)


def moments_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the moments that it keeps of each parameter."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if optimizer.param_groups[0]["momentum"] else []
