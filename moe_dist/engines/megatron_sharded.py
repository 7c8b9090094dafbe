"""What Megatron-Core's distributed checkpoints hold of our layer: every expert by its global number, whatever rank holds it.

The weights of an expert are saved by their unpacked names, each as one tensor with an axis of experts before its own two, so
that a checkpoint can be read with any number of expert-parallel ranks, any expert map and any slices of the experts. Moments
and main weights of Megatron's optimizers are cut up in the same way.

Shape letters: L experts on this rank, H hidden, E experts, F FFN width.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import nn

from moe_dist.layer import MoELayer
from moe_dist.placement import WIDTH_DIMENSION

Offsets = tuple[tuple[int, int, int], ...]
"""Of Megatron's: (axis, place of this rank's part on it, number of parts)."""


def sharded_layer(
    moe: MoELayer,
    prefix: str,
    offsets: Offsets,
    tensor_group: dist.ProcessGroup,
    expert_data_group: dist.ProcessGroup,
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """The layer's part of a `sharded_state_dict`.

    Args:
        offsets: of the axes that stand before all others: of layers, where the model has one tensor for all of them.
        tensor_group: ranks that hold the router, its balancer and the shared experts alike, beside the data ranks.
        expert_data_group: ranks that hold the same slices of the same experts.
        metadata: Megatron's.
    """
    found = make_sharded_tensors_for_checkpoint(
        {name: value for name, value in moe.state_dict(keep_vars=True).items() if not name.startswith("experts.")},
        prefix,
        {},
        offsets,
        tp_group=tensor_group,
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
    replica = (0, 0, expert_data_group.rank())  # pipeline, tensor and data place among those that hold the same
    for name, parameter in moe.experts.named_parameters():
        found[f"{prefix}experts.{name}"] = _stack(moe, f"{prefix}experts.{name}", name, parameter, offsets, replica)
    return found


def _stack(
    moe: MoELayer, key: str, name: str, parameter: nn.Parameter, offsets: Offsets, replica: ReplicaId
) -> ShardedTensorFactory:
    """A stack of experts' weights, [L, H, 2F] or [L, F, H]. Megatron uses it on the parameter and on its moments."""
    axis_E = len(offsets)

    def weights_of(place: int, stack: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of one expert that are in the stack."""
        views = moe.experts.weights_of(place, lambda p: stack if p is parameter else p)
        return {kind: view for kind, view in views.items() if (kind == "w_down") == (name == "w_down")}

    @torch.no_grad()
    def cut(key: str, stack: torch.Tensor, replica: ReplicaId, flat: slice | None) -> list[dict[str, ShardedTensor]]:
        assert flat is None
        return [
            {
                kind: ShardedTensor.from_rank_offsets(
                    key.removesuffix(name) + kind,
                    weight.contiguous(),
                    *offsets,
                    (axis_E, expert, moe.expert_map.num_experts),
                    (axis_E + 1 + WIDTH_DIMENSION[kind], moe.own_slice, moe.num_slices),
                    replica_id=replica,
                    prepend_axis_num=axis_E + 1,
                )
                for kind, weight in weights_of(place, stack).items()
            }
            for place, expert in enumerate(moe.own_experts)
        ]

    @torch.no_grad()
    def join(weights: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        stack = next(iter(weights[0].values())).new_empty(parameter.shape)
        for place, of_expert in enumerate(weights):
            for kind, view in weights_of(place, stack).items():
                view.copy_(of_expert[kind])
        return stack

    return ShardedTensorFactory(key, parameter, cut, join, replica)
