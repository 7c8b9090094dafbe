"""Data parallelism of the native engine: FSDP2, or its replicating sibling.

Dense parameters are shared by all data ranks, experts by the ranks of the expert-data group. The loss of each rank is
already divided by the targets of the whole step, so gradients are summed, not averaged: over the data ranks for dense
parameters, over the expert-data ranks for experts (or slices of them), whose tokens of the expert-parallel group have reached
them by all-to-all.
"""

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from moe_dist.config.schema import EngineConfig
from moe_dist.model import Transformer
from moe_dist.parallel.groups import ParallelGroups


def distribute(model: Transformer, groups: ParallelGroups, engine: EngineConfig) -> list[FSDPModule]:
    """Shard or replicate the model in place; gradients are then reduced as backward runs. Returns the wrapped modules."""
    model.same_experts = groups.same_experts
    if groups.data.size() == 1:
        return []
    wrap = _shard if engine.sharding == "full" else replicate
    alone: set[nn.Parameter] = set()  # experts that no other rank holds
    for block in model.blocks():
        if block.moe is not None and groups.expert_data.size() == 1:
            alone.update(block.moe.experts.parameters())
        elif block.moe is not None:
            wrap(block.moe.experts, mesh=groups.expert_data)
        wrap(block, mesh=groups.data, ignored_params=alone)
    wrap(model, mesh=groups.data, ignored_params=alone)
    wrapped: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can sum only
    return wrapped


def _shard(module: nn.Module, mesh: DeviceMesh, ignored_params: set[nn.Parameter] | None = None) -> None:
    """FSDP2 on dimension 0; on dimension 1 for stacks of experts, of which a rank may have only one."""

    def dimension(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 3 else 0)

    fully_shard(
        module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=dimension, ignored_params=ignored_params
    )
