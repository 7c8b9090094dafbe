"""Decisions over routing groups: who is decided on together, and that all ranks together decide like one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.routing import SequenceGroup
from moe_dist.routing import Tokens
from moe_dist.routing.groups import RoutingGroup, index_of, num_groups, solve_in_groups, tokens_per_group
from tests.support.distributed import run_ranks

T, N, SEQUENCES = 24, 3, 6


def make_values(tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_padding(tokens: int = T) -> torch.Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(1)) < 0.3


def cumulate(values_GLN: torch.Tensor, real_GL: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Depends on all tokens of a group and on their order, and on which are padding."""
    real_GL1 = torch.ones_like(values_GLN[..., :1]) if real_GL is None else real_GL[..., None]
    kept_GLN = values_GLN * real_GL1
    return kept_GLN.cumsum(1) - kept_GLN.sum(1, keepdim=True), kept_GLN.sum(1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sequences", [1, 2, 3, 6])
def test_sequences_that_stand_together_are_decided_together(sequences: int, padded: bool) -> None:
    values, real = make_values(), ~make_padding() if padded else None
    tokens, routing_group = Tokens(num_sequences=SEQUENCES), SequenceGroup(sequences=sequences)
    per_token, per_group = solve_in_groups(cumulate, values, real, routing_group, tokens, None)
    length = T // SEQUENCES * sequences
    assert num_groups(routing_group, tokens) == len(per_group) == SEQUENCES // sequences
    assert tokens_per_group(routing_group, tokens, T, None) == length
    for group in range(len(per_group)):
        own = slice(group * length, (group + 1) * length)
        expected = cumulate(values[None, own], None if real is None else real[None, own])
        assert torch.equal(per_token[own], expected[0][0])
        assert torch.equal(per_group[group], expected[1][0])


@pytest.mark.parametrize("routing_group", ["rank", "global"])
def test_one_group_of_all_tokens_of_the_rank(routing_group: RoutingGroup) -> None:
    values, tokens = make_values(), Tokens(num_sequences=5)
    per_token, per_group = solve_in_groups(cumulate, values, None, routing_group, tokens, None)
    assert torch.equal(per_token, cumulate(values[None], None)[0][0])
    assert torch.equal(per_group[0], values.sum(0))
    assert num_groups(routing_group, tokens) == 1
    assert tokens_per_group(routing_group, tokens, T, None) == T


def test_a_solution_may_be_one_tensor_of_another_shape_and_dtype() -> None:
    best = solve_in_groups(
        lambda v, _: v.argmax(2), make_values(), None, SequenceGroup(), Tokens(num_sequences=4), None
    )
    assert torch.equal(best, make_values().argmax(1))


@pytest.mark.parametrize("routing_group", [SequenceGroup(), SequenceGroup(sequences=2), "rank", "global"])
def test_a_batch_without_tokens(routing_group: RoutingGroup) -> None:
    per_token, per_group = solve_in_groups(
        cumulate, make_values(0), make_padding(0), routing_group, Tokens(num_sequences=4), None
    )
    assert per_token.shape == (0, N)
    assert not per_group.any()


def test_groups_must_divide_the_sequences() -> None:
    with pytest.raises(ValueError, match=r"routing\.group\.sequences: 4 does not divide the 6 sequences of the batch"):
        solve_in_groups(
            cumulate, make_values(), None, SequenceGroup(sequences=4), Tokens(num_sequences=SEQUENCES), None
        )


def test_the_index_of_a_token_is_its_place_in_the_global_batch() -> None:
    assert index_of(Tokens(), make_values(4)).tolist() == [0, 1, 2, 3]
    assert index_of(Tokens(global_index_T=torch.tensor([8, 3])), make_values(2)).tolist() == [8, 3]


def solve_share(tokens: int, padding: str, whole: bool = False) -> Any:
    """This rank's part of a global group, or what one rank finds that holds all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    values, real = make_values(ranks * tokens), ~make_padding(ranks * tokens)
    if padding == "on one rank":
        real[tokens:] = True
    own, mine = (slice(None), None) if whole else (slice(rank * tokens, (rank + 1) * tokens), dist.group.WORLD)
    mask = real[own] if padding == "everywhere" or (padding == "on one rank" and (whole or rank == 0)) else None
    return solve_in_groups(cumulate, values[own], mask, "global", Tokens(), mine)


@pytest.mark.parametrize("padding", ["none", "on one rank", "everywhere"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_all_ranks_together_decide_like_one_that_holds_all_tokens(tokens: int, num_ranks: int, padding: str) -> None:
    expected = run_ranks(num_ranks, solve_share, tokens, padding, True)[0]
    results = run_ranks(num_ranks, solve_share, tokens, padding)
    assert torch.equal(torch.cat([per_token for per_token, _ in results]), expected[0])
    for _, per_group in results:
        assert torch.equal(per_group, expected[1])
