"""The MoE layer as DeepSpeed knows one, for the deepspeed engine and for training scripts of one's own.

DeepSpeed takes a module for an MoE layer if it is a deepspeed.moe.layer.MoE; it takes parameters with `allreduce = False` for
experts, and reduces their gradients and shards their moments over the ranks that hold the same ones.

Shape letters: L experts on this rank.
"""

import re
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.engines.optimizer import decay_groups
from moe_dist.layer import MoELayer

PLACE_OF_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
"""DeepSpeed's checkpoints hold one file for each expert: keys with this prefix and the number of the expert."""


def moe_layer(
    hidden_size: int, moe: MoEConfig, routing: RoutingConfig, expert_parallel: int = 1, **options: Any
) -> MoELayer:
    """An MoE layer for a model that deepspeed.initialize will get; collective over all ranks.

    With gradient accumulation, give its forward `Tokens(share=1 / accumulation steps)`: DeepSpeed divides the loss by that
    number, but not the auxiliary losses, which add their gradients by themselves.

    Args:
        hidden_size, moe, routing: see MoELayer.
        expert_parallel: ranks over which the experts are spread, consecutive ones. With ZeRO 3 it must be 1.
        options: of MoELayer, such as vocab_size or num_chunks.

    Raises:
        ValueError: see MoELayer; or expert_parallel does not divide the ranks or the experts.
    """
    join_process_group()
    num_ranks = dist.get_world_size()
    if num_ranks % expert_parallel or moe.num_experts % expert_parallel:
        raise ValueError(
            f"expert_parallel: {expert_parallel} must divide the {num_ranks} ranks and moe.num_experts = {moe.num_experts}"
        )
    if expert_parallel == 1:  # every rank holds all experts: they are weights like all others
        return MoELayer(hidden_size, moe, routing, None, all_ranks(), **options)
    return DeepSpeedMoELayer(hidden_size, moe, routing, expert_group(expert_parallel), all_ranks(), **options)


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for the optimiser that deepspeed.initialize gets: experts apart from the rest, decay on matrices only."""
    return split_params_into_different_moe_groups_for_optimizer(decay_groups(model.parameters(), weight_decay))


def join_process_group() -> None:
    """Let DeepSpeed use the default process group, or make one where there is none; collective."""
    # On a CPU it would first compile C++ for a collective of its inference, and wait for ever for a build that was killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of names that torch has changed and DeepSpeed still uses, in every step.
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    deepspeed.init_distributed()


def expert_group(expert_parallel: int) -> dist.ProcessGroup | None:
    """DeepSpeed's expert-parallel group of this rank, made if need be; None where one rank holds all experts. Collective."""
    name = _group_name(expert_parallel)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    return groups._get_expert_parallel_group(name) if expert_parallel > 1 else None


def all_ranks() -> dist.ProcessGroup | None:
    """All ranks, which hold different tokens; None if there is one."""
    return dist.group.WORLD if dist.get_world_size() > 1 else None


class _SeenByDeepSpeed(MoE):
    """An MoE to DeepSpeed, with nothing that it would build."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by deepspeed.initialize to make groups; they are there already, as the layer is built with them."""
        assert not use_data_before_expert_parallel_, "the layer's ranks are consecutive"


class DeepSpeedMoELayer(MoELayer, _SeenByDeepSpeed):
    """MoELayer, whose experts DeepSpeed takes for such, in the groups that `expert_group` has made."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """See MoELayer."""
        super().__init__(*args, **options)
        group = self.expert_parallel_group
        self.num_experts = self.expert_map.num_experts
        self.num_local_experts = len(self.own_experts)
        self.ep_size = 1 if group is None else dist.get_world_size(group)
        self.expert_group_name = _group_name(self.ep_size)
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_unstack_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)


def _group_name(expert_parallel: int) -> str:
    return f"ep_size_{expert_parallel}"


def _unstack_experts(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Replace each stack [L, ...] of a state dict by its experts, under the names that DeepSpeed looks for."""
    for key in [key for key in state if key.startswith(f"{prefix}experts.")]:
        name = key.removeprefix(f"{prefix}experts.")
        for place, weight in enumerate(state.pop(key)):
            state[f"{prefix}{PLACE_OF_EXPERTS}{place}.{name}"] = weight


def _stack_experts(layer: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Undo `_unstack_experts`."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for key in [key for key in state if key.startswith(prefix + PLACE_OF_EXPERTS)]:
        found = re.fullmatch(r"(\d+)\.(.+)", key.removeprefix(prefix + PLACE_OF_EXPERTS))
        assert found is not None, key
        experts.setdefault(found[2], {})[int(found[1])] = state.pop(key)
    for name, weights in experts.items():
        state[f"{prefix}experts.{name}"] = torch.stack([weights[place] for place in sorted(weights)])
