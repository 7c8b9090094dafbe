"""Capacity: a pure function Routing -> Routing that drops what an expert has no room for.

Pairs compete in buckets: those of one expert (or of one group of experts) in one routing group. A bucket keeps the pairs of
highest priority up to its room, and among equals the earliest.

Shape letters: T tokens, E experts, P pairs, X pairs of all ranks.
"""

import dataclasses
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from moe_dist.config.routing import CapacityConfig, RoutingConfig
from moe_dist.parallel.collectives import all_gather_rows
from moe_dist.routing.groups import index_of, num_groups, tokens_per_group
from moe_dist.routing.random import uniform
from moe_dist.routing.types import Routing, Tokens, keep_pairs


def apply_capacity(
    routing: Routing,
    config: RoutingConfig,
    tokens: Tokens,
    best_score_T: torch.Tensor,
    random_key: int,
    training: bool,
    group: dist.ProcessGroup | None,
) -> Routing:
    """Keep at most `room_of_bucket` pairs in each bucket, by the policy of the config.

    Args:
        routing: all pairs, none dropped yet, no (token, expert) twice; there may be vacant ones.
        best_score_T: highest score of each token, padding included, for batch_priority.
        random_key: of the random policy.
        training: whether `factor` or `evaluation_factor` holds.
        group: the ranks of routing.group: global, and those that must agree on padded slots; they must hold equally many
            tokens. None: this rank alone.

    Returns:
        The kept pairs, still in token order, with `dropped_E`; if the config pads, with `pairs_per_expert` and vacant pairs.

    Raises:
        ValueError: if routing.group.sequences does not divide the sequences of the batch.
    """
    assert config.capacity is not None
    num_tokens, num_experts = len(best_score_T), len(routing.load_E)
    group_tokens = tokens_per_group(config.group, tokens, num_tokens, group)
    room = room_of_bucket(config, group_tokens, num_experts, training)
    # With one routing group, even if it is spread over ranks, all tokens of this rank are in group 0.
    bucket_P = routing.token_P // max(1, group_tokens) * num_experts
    bucket_P = bucket_P + routing.expert_P // experts_per_bucket(config, num_experts)
    priority_P = _priority(routing, config.capacity, tokens, best_score_T, random_key)
    # Vacant pairs stand behind the last group, or behind its last expert.
    num_buckets = (num_groups(config.group, tokens) + 1) * num_experts
    if config.group == "global" and group is not None:
        place_P = _place_over_ranks(bucket_P, num_buckets, priority_P, group)
    else:
        place_P = place_in_bucket(bucket_P, num_buckets, priority_P)
    real_P = routing.expert_P < num_experts
    kept_P = (place_P < room) & real_P
    if config.capacity.renormalise:
        routing = dataclasses.replace(routing, weight_P=_renormalise(routing, kept_P, num_tokens))
    zero_E1 = routing.load_E.new_zeros(num_experts + 1)
    kept_E = zero_E1.scatter_add(0, routing.expert_P, kept_P.to(torch.int64))[:-1]
    dropped_E = zero_E1.scatter_add(0, routing.expert_P, (real_P & ~kept_P).to(torch.int64))[:-1]
    slots = _slots(config, tokens, room, num_tokens, kept_E, training, group)
    places = None if slots is None else min(len(kept_P), slots * num_experts)
    routing = keep_pairs(routing, kept_P, num_tokens, places)
    return dataclasses.replace(routing, dropped_E=dropped_E, pairs_per_expert=slots)


def factor_now(capacity: CapacityConfig, training: bool) -> float | Literal["auto"] | None:
    """The factor in training or in evaluation; None: no limit."""
    return capacity.factor if training else capacity.evaluation_factor


def room_of_bucket(config: RoutingConfig, num_tokens: int, num_experts: int, training: bool) -> int:
    """Pairs that a bucket may keep; for factor: auto those of maximum_factor, as less room would only matter to padding.

    The balanced load that a factor multiplies is that of the routed experts: with zero-computation experts of `target` choices
    a token.

    Args:
        num_tokens: of a routing group, padding included: capacity depends on shapes only, never on data.
        num_experts: E, without zero-computation experts.
    """
    assert config.capacity is not None
    factor = factor_now(config.capacity, training)
    if factor == "auto":
        factor = config.capacity.maximum_factor
    size = experts_per_bucket(config, num_experts)
    if factor is None:
        return num_tokens * size
    choices = config.top_k if config.zero_experts is None else config.zero_experts.target
    return capacity_of_group(num_tokens, num_experts // size, choices, factor, config.capacity.minimum, size)


def capacity_of_group(
    num_tokens: int, num_buckets: int, choices: float, factor: float, minimum: int = 1, experts: int = 1
) -> int:
    """ceil(factor * k * T / buckets), at least `minimum` and at most T * experts of a bucket: a token uses an expert once.

    Args:
        choices: k, the routed experts of a token on average.
    """
    exact = factor * choices * num_tokens / num_buckets
    room = max(minimum, math.ceil(exact - 1e-9))  # 1.1 * 2 * 10 / 4 is 5.5000000000000004
    return max(1, min(num_tokens * experts, room))


def experts_per_bucket(config: RoutingConfig, num_experts: int) -> int:
    """1, or the experts of a group for level: expert_group. Expert i is in bucket i // this."""
    assert config.capacity is not None
    if config.capacity.level == "expert":
        return 1
    assert config.expert_groups is not None
    return num_experts // config.expert_groups.count


def place_in_bucket(bucket_P: torch.Tensor, num_buckets: int, priority_P: torch.Tensor | None) -> torch.Tensor:
    """int64 [P]: place of each pair in its bucket, by falling priority (ties by position), or by position alone."""
    if num_buckets < 2**15:  # 16-bit keys sort several times faster than 64-bit ones
        bucket_P = bucket_P.to(torch.int16)
    order_P = torch.arange(bucket_P.shape[0], device=bucket_P.device)
    if priority_P is not None:
        order_P = priority_P.argsort(descending=True, stable=True)
    order_P = order_P[bucket_P[order_P].argsort(stable=True)]
    sorted_P = bucket_P[order_P]
    first_P = torch.searchsorted(sorted_P, sorted_P)  # where the pair's bucket begins
    place_P = torch.arange(bucket_P.shape[0], device=bucket_P.device) - first_P
    return torch.empty_like(place_P).scatter_(0, order_P, place_P)


def random_priority(random_key: int, tokens: Tokens, pair_index: torch.Tensor) -> torch.Tensor:
    """float64 of the shape of `pair_index`: a pure function of key, step and (place in the global batch) * E + expert."""
    return uniform(random_key, tokens.step, pair_index.flatten()).view(pair_index.shape)


def _priority(
    routing: Routing, capacity: CapacityConfig, tokens: Tokens, best_score_T: torch.Tensor, random_key: int
) -> torch.Tensor | None:
    """[P] by which pairs stay, highest first; None: by position."""
    if capacity.policy == "weight":
        return routing.weight_P.detach()
    if capacity.policy == "choice":  # pairs of a token stand in the order of its preference
        first_P = torch.searchsorted(routing.token_P, routing.token_P)
        return first_P - torch.arange(len(first_P), device=first_P.device)
    token_P = routing.token_P.clamp(max=len(best_score_T) - 1)  # whatever stands for vacant pairs
    if capacity.policy == "batch_priority":
        return best_score_T[token_P]
    if capacity.policy == "random":
        index_T = index_of(tokens, best_score_T)
        return random_priority(random_key, tokens, index_T[token_P] * len(routing.load_E) + routing.expert_P)
    return None


def _place_over_ranks(
    bucket_P: torch.Tensor, num_buckets: int, priority_P: torch.Tensor | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """`place_in_bucket` among the pairs of all ranks, in rank order."""
    most = bucket_P.new_tensor([len(bucket_P)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    rows_P2 = bucket_P.new_full((int(most), 2), -1, dtype=torch.float64)  # the rest competes in a bucket of its own
    rows_P2[: len(bucket_P), 0] = bucket_P.double()  # exact up to 2^53, as are float32 priorities
    rows_P2[: len(bucket_P), 1] = 0 if priority_P is None else priority_P.double()
    rows_X2 = all_gather_rows(rows_P2, group)
    place_X = place_in_bucket(rows_X2[:, 0].long(), num_buckets, rows_X2[:, 1])
    return place_X.narrow(0, dist.get_rank(group) * int(most), len(bucket_P))


def _renormalise(routing: Routing, kept_P: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[P] weights scaled so that a token's kept weights sum to what all its weights summed to."""
    pair_P = torch.arange(len(kept_P), device=kept_P.device)
    first_T1 = torch.searchsorted(routing.token_P, torch.arange(num_tokens + 1, device=kept_P.device))
    # Sums run over a token's pairs in order, which those of index_add need not. The last one is of vacant pairs.
    weight_P2 = torch.stack([routing.weight_P, routing.weight_P * kept_P], 1)
    all_T1, kept_T1 = embedding_bag(pair_P, weight_P2, first_T1, mode="sum").unbind(1)
    scale_T1 = all_T1 / torch.where(kept_T1 > 0, kept_T1, 1)
    return routing.weight_P * scale_T1[routing.token_P]


def _slots(
    config: RoutingConfig,
    tokens: Tokens,
    room: int,
    num_tokens: int,
    kept_E: torch.Tensor,
    training: bool,
    group: dist.ProcessGroup | None,
) -> int | None:
    """Padded slots of each expert, equal on all ranks; None without padding.

    They follow from shapes, but for factor: auto, which costs one small all-reduce of what the fullest expert of any rank
    keeps and makes the host wait for it. Of a global group, a rank may hold all kept pairs of an expert, so that it needs
    the room of the whole group, or a slot for each of its tokens if these are fewer.
    """
    assert config.capacity is not None
    if not config.capacity.pad:
        return None
    if factor_now(config.capacity, training) == "auto":
        most = kept_E.max()
        if group is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return max(config.capacity.minimum, int(most))
    if config.group == "global":
        return min(room, num_tokens)
    return room * num_groups(config.group, tokens)
