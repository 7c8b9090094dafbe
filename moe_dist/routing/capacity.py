"""Capacity: a pure function Routing -> Routing that drops what an expert has no room for.

Shape letters: T tokens, E experts, P pairs before, Q pairs kept, G routing groups on this rank.
"""

import dataclasses
import math

import torch

from moe_dist.config.schema import CapacityConfig
from moe_dist.routing.types import Routing, Tokens


def apply_capacity(
    routing: Routing, capacity: CapacityConfig, top_k: int, tokens: Tokens, num_tokens: int, group_sequences: int
) -> Routing:
    """Keep at most `capacity_of_group` pairs of each expert in each routing group, in token order or by weight.

    Args:
        routing: all pairs, none dropped yet.
        tokens: for the number of sequences.
        num_tokens: T, padding included: capacity depends on shapes only, never on data.
        group_sequences: sequences of one routing group.

    Returns:
        The kept pairs, still in token order, with `dropped_E`, and `pairs_per_expert` if the config pads.
    """
    if tokens.num_sequences % group_sequences:
        raise ValueError(
            f"routing.group.sequences: {group_sequences} does not divide the {tokens.num_sequences} sequences of the batch"
        )
    num_experts, num_groups = routing.load_E.shape[0], max(1, tokens.num_sequences // group_sequences)
    room = capacity_of_group(num_tokens // num_groups, num_experts, top_k, capacity.factor)
    # One bucket for each (group, expert); a pair's rank within its bucket decides.
    group_P = routing.token_P // max(1, num_tokens // num_groups)
    bucket_P = group_P * num_experts + routing.expert_P
    rank_P = _rank_in_bucket(bucket_P, routing.weight_P if capacity.policy == "weight" else None)
    kept_P = rank_P < room
    kept_Q = kept_P.nonzero().squeeze(1)
    weight_Q = routing.weight_P[kept_Q]
    if capacity.renormalise:
        weight_Q = _renormalise(routing, kept_P, num_tokens)[kept_Q]
    lost_E = torch.zeros_like(routing.load_E).scatter_add_(0, routing.expert_P, (~kept_P).to(torch.int64))
    return dataclasses.replace(
        routing,
        token_P=routing.token_P[kept_Q],
        expert_P=routing.expert_P[kept_Q],
        weight_P=weight_Q,
        dropped_E=lost_E,
        pairs_per_expert=room * num_groups if capacity.pad else None,
    )


def capacity_of_group(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """ceil(factor * k * T / E), at least 1 and at most T: a token uses an expert once."""
    exact = factor * top_k * num_tokens / num_experts
    return max(1, min(num_tokens, math.ceil(exact - 1e-9)))  # 1.1 * 2 * 10 / 4 is 5.5000000000000004


def _rank_in_bucket(bucket_P: torch.Tensor, weight_P: torch.Tensor | None) -> torch.Tensor:
    """int64 [P]: place of each pair in its bucket, by position, or by falling weight (ties by position)."""
    order_P = torch.arange(bucket_P.shape[0], device=bucket_P.device)
    if weight_P is not None:
        order_P = weight_P.detach().argsort(descending=True, stable=True)
    order_P = order_P[bucket_P[order_P].argsort(stable=True)]
    sorted_P = bucket_P[order_P]
    first_P = torch.searchsorted(sorted_P, sorted_P)  # where the pair's bucket begins
    place_P = torch.arange(bucket_P.shape[0], device=bucket_P.device) - first_P
    return torch.empty_like(place_P).scatter_(0, order_P, place_P)


def _renormalise(routing: Routing, kept_P: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[P] weights scaled so that a token's kept weights sum to what all its weights summed to."""
    zero_T = routing.weight_P.new_zeros(num_tokens)
    all_T = zero_T.index_add(0, routing.token_P, routing.weight_P)
    kept_T = zero_T.index_add(0, routing.token_P, routing.weight_P * kept_P)
    scale_T = all_T / torch.where(kept_T > 0, kept_T, 1)
    return routing.weight_P * scale_T[routing.token_P]
