"""Decisions over routing groups: tokens of n sequences, of this rank, or of all ranks, that are decided on together.

Shape letters: T tokens on this rank, N values of a token, G routing groups, L tokens of a routing group.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from moe_dist.config.routing import SequenceGroup
from moe_dist.parallel.collectives import all_gather_rows
from moe_dist.routing.types import Tokens

RoutingGroup = SequenceGroup | Literal["global", "rank"]
"""routing.group of the config."""

Decision = TypeVar("Decision", torch.Tensor, tuple[torch.Tensor, ...])


def solve_in_groups(
    solve: Callable[[torch.Tensor, torch.Tensor | None], Decision],
    values_TN: torch.Tensor,
    real_T: torch.Tensor | None,
    routing_group: RoutingGroup,
    tokens: Tokens,
    group: dist.ProcessGroup | None,
) -> Decision:
    """Apply `solve` to routing groups, all of this rank at once. Not differentiable over ranks.

    A global group is gathered whole, in rank order: every rank solves the same problem and keeps its own tokens' part.

    Args:
        solve: (values [G, L, N], bool [G, L] that is False for padding, or None if nothing is padding) -> [G, L, ...], or
            a tuple of it and of results per group [G, ...].
        real_T: bool, False for padding; None: nothing is. Other ranks may have it where this one has none.
        group: the ranks of `global`, which must hold equally many tokens; None: this one alone.

    Returns:
        What `solve` returns, with the tokens of this rank [T, ...] in place of [G, L, ...].

    Raises:
        ValueError: if routing.group.sequences does not divide the sequences of the batch.
    """
    num_tokens = len(values_TN)
    over_ranks = routing_group == "global" and group is not None
    if over_ranks:  # ranks cannot know whether others have padding, so the mask always travels along
        real_T = torch.ones_like(values_TN[:, 0], dtype=torch.bool) if real_T is None else real_T
        joined = all_gather_rows(torch.cat([values_TN, real_T.to(values_TN.dtype)[:, None]], dim=1), group)
        values_TN, real_T = joined[:, :-1], joined[:, -1].bool()
    shape = (num_groups(routing_group, tokens), tokens_per_group(routing_group, tokens, num_tokens, group))
    result: Decision = solve(values_TN.unflatten(0, shape), None if real_T is None else real_T.unflatten(0, shape))
    per_token = (result if isinstance(result, torch.Tensor) else result[0]).flatten(0, 1)
    if over_ranks:
        per_token = per_token.narrow(0, dist.get_rank(group) * num_tokens, num_tokens)
    return per_token if isinstance(result, torch.Tensor) else (per_token, *result[1:])


def num_groups(routing_group: RoutingGroup, tokens: Tokens) -> int:
    """Routing groups that this rank decides on.

    Raises:
        ValueError: if routing.group.sequences does not divide the sequences of the batch.
    """
    if not isinstance(routing_group, SequenceGroup):
        return 1
    if tokens.num_sequences % routing_group.sequences:
        raise ValueError(
            f"routing.group.sequences: {routing_group.sequences} does not divide the {tokens.num_sequences} sequences "
            "of the batch"
        )
    return max(1, tokens.num_sequences // routing_group.sequences)


def tokens_per_group(
    routing_group: RoutingGroup, tokens: Tokens, num_tokens: int, group: dist.ProcessGroup | None
) -> int:
    """Tokens of each routing group, padding included, where this rank holds `num_tokens`."""
    if routing_group == "global":
        return num_tokens * (1 if group is None else dist.get_world_size(group))
    return num_tokens // num_groups(routing_group, tokens)


def index_of(tokens: Tokens, like_T: torch.Tensor) -> torch.Tensor:
    """int64 [T]: place of each token in the global batch, by default as if this rank held it all."""
    if tokens.global_index_T is not None:
        return tokens.global_index_T
    return torch.arange(len(like_T), device=like_T.device)
