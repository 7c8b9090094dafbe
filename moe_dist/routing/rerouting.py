"""Overflow goes on: a token that a full expert rejects takes its next best expert that has room.

Deferred acceptance (Gale and Shapley 1962, https://doi.org/10.2307/2312726): each token proposes to its most preferred
experts that have not rejected it, each bucket of `moe_dist.routing.capacity` holds the proposals of highest priority up to
its room and rejects the others, until none is rejected. A token prefers the experts that its router chose, in their order,
then the others by falling selection score. With policy: position this is the serial rule that one token after another takes
its most preferred experts that still have room, so it is causal.

Shape letters: T tokens, E experts (zero-computation experts behind the routed ones), K choices of a token, G routing groups,
L tokens of a routing group, B buckets.
"""

import torch
import torch.distributed as dist
from torch.nn import functional

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing.capacity import experts_per_bucket, place_in_bucket, random_priority, room_of_bucket
from moe_dist.routing.groups import index_of, solve_in_groups
from moe_dist.routing.types import Choice, Tokens


def reroute(
    choice: Choice,
    selection_TE: torch.Tensor,
    weight_TE: torch.Tensor,
    best_score_T: torch.Tensor,
    config: RoutingConfig,
    tokens: Tokens,
    random_key: int,
    training: bool,
    group: dist.ProcessGroup | None,
) -> Choice:
    """The choice within capacity. Zero-computation experts always have room.

    Args:
        choice: what is wanted, padding left out by `valid_TK`; the experts of a token are distinct.
        selection_TE: what top-k compares; experts at -inf take nothing but what the choice gives them.
        weight_TE: weights of all experts, for policy: weight (see moe_dist.routing.scores.weights_beside).
        best_score_T: highest score of each token, for batch_priority.
        random_key: of the random policy.
        training: whether `factor` or `evaluation_factor` holds.
        group: the ranks of routing.group: global, which must hold equally many tokens; None: this rank alone.

    Returns:
        Distinct experts of each token in the order of its preference, at most as many as it wanted. Columns without an
        expert come last and are not valid.

    Raises:
        ValueError: if routing.group.sequences does not divide the sequences of the batch.
    """
    num_experts, num_choices = selection_TE.shape[1], choice.expert_TK.shape[1]
    slots_T1 = _valid(choice).sum(1, keepdim=True)
    preference_TE = _preferences(choice, selection_TE)
    priority_TE = _priorities(preference_TE, weight_TE, best_score_T, config, tokens, random_key, group)

    def solve(values_GLN: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        preference_GLE, priority_GLE, slots_GL1 = values_GLN.split([num_experts, num_experts, 1], dim=2)
        return _rejected(preference_GLE, priority_GLE, slots_GL1, num_choices, config, training)

    values_TN = torch.cat([preference_TE, priority_TE, slots_T1], dim=1)
    rejected_TE = solve_in_groups(solve, values_TN, None, config.group, tokens, group)
    return Choice(*_proposals(preference_TE, rejected_TE, slots_T1, num_choices))


def lost(choice: Choice, final: Choice, num_experts: int) -> torch.Tensor:
    """int64 [E]: slots that found no expert, as many of a token as `final` has fewer than `choice`.

    They count at the experts that the token wanted and does not have in the end, the least preferred first.
    """
    valid_TK, final_valid_TK = _valid(choice), _valid(final)
    final_TK = torch.where(final_valid_TK, final.expert_TK, -1)
    missing_TK = valid_TK & (choice.expert_TK[:, :, None] != final_TK[:, None, :]).all(2)
    unplaced_T1 = valid_TK.sum(1, keepdim=True) - final_valid_TK.sum(1, keepdim=True)
    from_last_TK = missing_TK.flip(1).cumsum(1).flip(1)
    lost_TK = missing_TK & (from_last_TK <= unplaced_T1)
    count_E = torch.zeros(num_experts, dtype=torch.int64, device=lost_TK.device)
    # Zero-computation experts reject nothing; they only have to be kept within the range here.
    routed_TK = choice.expert_TK.clamp(max=num_experts - 1)
    return count_E.scatter_add_(0, routed_TK.flatten(), lost_TK.flatten().long())


def _valid(choice: Choice) -> torch.Tensor:
    return torch.ones_like(choice.expert_TK, dtype=torch.bool) if choice.valid_TK is None else choice.valid_TK


def _preferences(choice: Choice, selection_TE: torch.Tensor) -> torch.Tensor:
    """float64 [T, E] of distinct whole numbers, high for what is wanted most; -1 for experts that may not be used."""
    num_experts, num_choices = selection_TE.shape[1], choice.expert_TK.shape[1]
    falling_E = torch.arange(num_experts - 1, -1, -1, device=selection_TE.device)
    order_TE = selection_TE.argsort(dim=1, descending=True, stable=True)
    rank_TE = torch.empty_like(order_TE).scatter_(1, order_TE, falling_E.expand_as(order_TE))
    rank_TE = rank_TE.masked_fill(selection_TE == -torch.inf, -1)
    wanted_K = num_experts + torch.arange(num_choices - 1, -1, -1, device=selection_TE.device)
    wanted_TK = torch.where(_valid(choice), wanted_K, -1)
    return rank_TE.scatter_reduce(1, choice.expert_TK, wanted_TK, "amax").double()


def _priorities(
    preference_TE: torch.Tensor,
    weight_TE: torch.Tensor,
    best_score_T: torch.Tensor,
    config: RoutingConfig,
    tokens: Tokens,
    random_key: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """float64 [T, E] by which a full bucket chooses, highest first; equal ones by position. As where overflow drops."""
    assert config.capacity is not None
    num_tokens, num_experts = weight_TE.shape
    num_routed = num_experts - (config.zero_experts.count if config.zero_experts else 0)
    if config.capacity.policy == "weight":
        return weight_TE.double()
    if config.capacity.policy == "choice":  # among the routed experts: no other has a place to give
        rank_TE = preference_TE[:, :num_routed].argsort(1, descending=True).argsort(1)
        return -functional.pad(rank_TE, (0, num_experts - num_routed)).double()
    if config.capacity.policy == "batch_priority":
        return best_score_T.double()[:, None].expand_as(weight_TE)
    if config.capacity.policy == "random":
        expert_E = torch.arange(num_experts, device=weight_TE.device)
        return random_priority(random_key, tokens, index_of(tokens, weight_TE)[:, None] * num_routed + expert_E)
    first = dist.get_rank(group) * num_tokens if config.group == "global" and group is not None else 0
    position_T = torch.arange(first, first + num_tokens, dtype=torch.float64, device=weight_TE.device)
    return -position_T[:, None].expand_as(weight_TE)


def _rejected(
    preference_GLE: torch.Tensor,
    priority_GLE: torch.Tensor,
    slots_GL1: torch.Tensor,
    num_choices: int,
    config: RoutingConfig,
    training: bool,
) -> torch.Tensor:
    """bool [G, L, E]: which experts rejected which tokens, when no proposal is rejected any more.

    It ends: a rejection is never taken back, each round but the last adds one, and there are at most G L E of them. A token
    stays with its proposals until they are rejected, so what a full bucket holds only gets better: it also rejects at once
    whoever comes after its last one but has not proposed yet, which saves most of the rounds.
    """
    num_groups, num_tokens, num_experts = preference_GLE.shape
    num_routed = num_experts - (config.zero_experts.count if config.zero_experts else 0)
    room = room_of_bucket(config, num_tokens, num_routed, training)
    expert_E = torch.arange(num_experts, device=preference_GLE.device)
    unlimited = num_groups * num_experts  # the bucket of zero-computation experts, and of what is no proposal
    bucket_GE = torch.arange(0, unlimited, num_experts, device=expert_E.device)[:, None] + (
        expert_E // experts_per_bucket(config, num_routed)
    )
    bucket_GLE = bucket_GE.masked_fill(expert_E >= num_routed, unlimited)[:, None].expand_as(preference_GLE)
    rejected_GLE = torch.zeros_like(preference_GLE, dtype=torch.bool)
    while True:
        expert_GLK, valid_GLK = _proposals(preference_GLE, rejected_GLE, slots_GL1, num_choices)
        bucket_GLK = bucket_GLE.gather(2, expert_GLK).masked_fill(~valid_GLK, unlimited)
        priority_GLK = priority_GLE.gather(2, expert_GLK)
        place_GLK = place_in_bucket(bucket_GLK.flatten(), unlimited + 1, priority_GLK.flatten()).view_as(bucket_GLK)
        refused_GLK = (place_GLK >= room) & (bucket_GLK < unlimited)
        if not refused_GLK.any():
            return rejected_GLE
        is_last_GLK = (place_GLK == room - 1) & (bucket_GLK < unlimited)
        last_GLK = priority_GLK.masked_fill(~is_last_GLK, -torch.inf)
        lowest_B = priority_GLE.new_full((unlimited + 1,), -torch.inf)
        lowest_B = lowest_B.scatter_reduce(0, bucket_GLK.flatten(), last_GLK.flatten(), "amax")
        rejected_GLE = rejected_GLE | (priority_GLE < lowest_B[bucket_GLE])
        rejected_GLE = rejected_GLE.scatter(2, expert_GLK, rejected_GLE.gather(2, expert_GLK) | refused_GLK)


def _proposals(
    preference_TE: torch.Tensor, rejected_TE: torch.Tensor, slots_T1: torch.Tensor, num_choices: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and bool [..., K]: the most preferred experts that have not rejected the token, as many as it has slots."""
    value_TK, expert_TK = preference_TE.masked_fill(rejected_TE, -1).topk(num_choices, dim=-1)
    slot_K = torch.arange(num_choices, device=expert_TK.device)
    return expert_TK, (value_TK >= 0) & (slot_K < slots_T1)
