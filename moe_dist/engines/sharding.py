"""Data parallelism of the native engine: FSDP2, or its replicating sibling.

Dense parameters are shared by all data ranks, experts by the ranks of the expert-data group. The loss of each rank is
already divided by the targets of the whole step, so gradients are summed, not averaged: over the data ranks for dense
parameters, over the expert-data ranks for experts, whose tokens of the expert-parallel group have reached them by
all-to-all.
"""

from functools import partial

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from moe_dist.config.schema import EngineConfig
from moe_dist.model import Transformer
from moe_dist.parallel.groups import ParallelGroups


def distribute(model: Transformer, groups: ParallelGroups, engine: EngineConfig) -> list[FSDPModule]:
    """Shard or replicate the model in place; gradients are then reduced as backward runs. Returns the wrapped modules."""
    if groups.data.size() == 1:
        return []
    full = engine.sharding == "full"
    wrap = partial(fully_shard, reshard_after_forward=True) if full else replicate
    for block in model.layers:
        alone: set[nn.Parameter] = set()  # experts that no other rank holds
        if block.moe is not None and groups.expert_data.size() == 1:
            alone = set(block.moe.experts.parameters())
        elif block.moe is not None and full:
            # Dimension 0 is the expert, of which a rank may have only one.
            wrap(block.moe.experts, mesh=groups.expert_data, shard_placement_fn=lambda _: Shard(1))
        elif block.moe is not None:
            wrap(block.moe.experts, mesh=groups.expert_data)
        wrap(block, mesh=groups.data, ignored_params=alone)
    wrap(model, mesh=groups.data, ignored_params={p for b in model.layers if b.moe for p in b.moe.experts.parameters()})
    wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can sum only
    return wrapped
