"""Everything that a checkpoint of an engine holds, by names that do not depend on the layout.

model.{weight}                       see moe_dist.model.names
optimizer.{moment}.{weight}          exp_avg and exp_avg_sq of AdamW, momentum_buffer of SGD
optimizer.updates                    optimiser steps taken (skipped ones are not)
balance.{layer}.{value}              of the balancer: bias, and what else the routing keeps
"""

import torch
from torch import nn

from moe_dist.engines.optimizer import LocalParameter
from moe_dist.model import Transformer
from moe_dist.model.names import global_tensors


def engine_state(
    model: Transformer, parameters: list[LocalParameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The tensors of this rank by global name; writing into them changes the model and the optimiser, but for `updates`."""
    state = {f"model.{name}": tensor for name, tensor in global_tensors(model)}
    local_of = {id(p.parameter): p.local for p in parameters}
    for moment in _moments(optimizer):

        def of(parameter: nn.Parameter, moment: str = moment) -> torch.Tensor:
            return optimizer.state[local_of[id(parameter)]][moment]

        state |= {f"optimizer.{moment}.{name}": tensor for name, tensor in global_tensors(model, of)}
    for number, layer in model.moe_layers.items():
        state |= {f"balance.{number}.{name}": value for name, value in layer.router.balance.values()}
    return state | {"optimizer.updates": get_updates(optimizer)}


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the state it would create in its first step, so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for local in group["params"]:
            state = {moment: torch.zeros_like(local) for moment in _moments(optimizer)}
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


def _moments(optimizer: torch.optim.Optimizer) -> list[str]:
    if isinstance(optimizer, torch.optim.AdamW):
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if optimizer.param_groups[0]["momentum"] else []
