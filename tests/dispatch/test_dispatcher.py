"""Dispatch and combine against a dense oracle: for each pair, weight times the expert's function of the token.

The functions f_e(x) = cos(x W_e + b_e) are not zero at zero, so that an empty slot that reached a token would show, and
so would a gradient that reached an empty slot, in b_e.

Shape letters: T tokens, H hidden, E experts, P pairs, R rows.
"""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.routing import RoutingConfig
from moe_dist.dispatch import AllToAllDispatcher, Segments
from moe_dist.dispatch.types import Chunk
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing, Tokens, build_router
from moe_dist.routing.router import count_per_expert
from tests.support.distributed import run_ranks
from tests.support.host import HostReads

H, E = 3, 8
MAPS = {
    "contiguous of 1": ExpertMap.contiguous(E, 1),
    "shuffled of 1": ExpertMap(((3, 1, 7, 0, 2, 5, 4, 6),)),
    "contiguous of 2": ExpertMap.contiguous(E, 2),
    "shuffled of 2": ExpertMap.from_owners([1, 0, 0, 1, 1, 0, 1, 0]),
    "unequal of 2": ExpertMap(((6, 2, 0, 5, 1, 7), (4, 3))),
    "contiguous of 4": ExpertMap.contiguous(E, 4),
    "shuffled of 4": ExpertMap.from_owners([3, 0, 2, 1, 0, 3, 1, 2]),
    "unequal of 4": ExpertMap(((5,), (7, 0, 2, 4), (1,), (6, 3))),
    "an idle rank of 4": ExpertMap(((5, 3, 1), (), (7, 0, 2, 4), (6,))),
}


@dataclass(frozen=True)
class Share:
    """What one rank has: tokens, pairs, and the gradient that comes back for its output."""

    hidden_TH: torch.Tensor
    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor
    target_TH: torch.Tensor


@dataclass(frozen=True)
class Result:
    out_TH: torch.Tensor
    d_hidden_TH: torch.Tensor
    d_weight_P: torch.Tensor
    d_expert: dict[int, torch.Tensor]
    sizes: list[int]
    sent: list[int]
    calls: tuple[int, int]


def make_share(tokens_by_experts: list[list[int]], seed: int) -> Share:
    """`tokens_by_experts`: for each token its experts."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(t, e) for t, experts in enumerate(tokens_by_experts) for e in experts]
    draw = {"generator": generator, "dtype": torch.float64}
    return Share(
        hidden_TH=torch.randn(len(tokens_by_experts), H, **draw),
        token_P=torch.tensor([t for t, _ in pairs], dtype=torch.int64),
        expert_P=torch.tensor([e for _, e in pairs], dtype=torch.int64),
        weight_P=torch.rand(len(pairs), **draw),
        target_TH=torch.randn(len(tokens_by_experts), H, **draw),
    )


def random_shares(num_ranks: int, seed: int = 0) -> list[Share]:
    """Another number of tokens on each rank; tokens with 0 to E pairs, as expert choice gives them."""
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for rank in range(num_ranks):
        take = torch.rand(5 + 3 * rank, E, generator=generator) < torch.rand(5 + 3 * rank, 1, generator=generator)
        take[0], take[1] = False, True
        shares.append(make_share([row.nonzero().flatten().tolist() for row in take], seed=rank))
    return shares


def expert_weight(expert: int) -> torch.Tensor:
    """W_e, and b_e as its last row."""
    return torch.randn(H + 1, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + expert))


def expert_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cos(x @ weight[:-1] + weight[-1])


def routing_of(share: Share, weight_on: Any, slots: int | None) -> Routing:
    return Routing(
        token_P=share.token_P,
        expert_P=share.expert_P,
        weight_P=share.weight_P.clone().requires_grad_(),
        load_E=count_per_expert(share.expert_P, E),
        weight_on=weight_on,
        pairs_per_expert=slots,
    )


def compute(rows_RH: torch.Tensor, segments: Segments, weights: list[torch.Tensor]) -> torch.Tensor:
    assert sum(segments.sizes) == len(rows_RH)
    blocks = rows_RH.split(segments.sizes)
    done = [expert_of(x, weights[e]) for x, e in zip(blocks, segments.experts, strict=True)]
    return torch.cat([*done, rows_RH[:0]])


def journey(share: Share, expert_map: ExpertMap, weight_on: str, slots: int | None, num_chunks: int = 1) -> Result:
    """Dispatch, compute, combine, and back, on this rank."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank = dist.get_rank() if group else 0
    own = expert_map.experts_of_rank[rank]
    weights = [expert_weight(e).requires_grad_() for e in own]
    dispatcher = AllToAllDispatcher(expert_map, group, num_chunks)
    hidden, routing = share.hidden_TH.clone().requires_grad_(), routing_of(share, weight_on, slots)
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        rows, segments, ticket = dispatcher.dispatch(hidden, routing)
        out = dispatcher.combine(compute(rows, segments, weights), ticket)
        forward = exchange.call_count
        out.backward(share.target_TH)
    grads = {e: w.grad if w.grad is not None else torch.zeros(H + 1, H) for e, w in zip(own, weights, strict=True)}
    backward = exchange.call_count - forward
    return Result(
        out.detach(),
        hidden.grad,
        routing.weight_P.grad,
        grads,
        segments.sizes,
        ticket.journey.send,
        (forward, backward),
    )


def journey_of_rank(shares: list[Share], *args: Any) -> Result:
    return journey(shares[dist.get_rank()], *args)


def run(shares: list[Share], *args: Any) -> list[Result]:
    return [journey(shares[0], *args)] if len(shares) == 1 else run_ranks(len(shares), journey_of_rank, shares, *args)


def check_against_the_dense_sum(
    shares: list[Share], expert_map: ExpertMap, weight_on: str = "output", slots: int | None = None
) -> list[Result]:
    results = run(shares, expert_map, weight_on, slots)
    check_results(results, shares, weight_on)
    return results


def check_results(results: list[Result], shares: list[Share], weight_on: str) -> None:
    """Outputs and gradients of all ranks; an expert's gradient is complete on its owner."""
    weights = [expert_weight(e).requires_grad_() for e in range(E)]
    total = torch.zeros((), dtype=torch.float64)
    for share, result in zip(shares, results, strict=True):
        hidden, pair_weights = share.hidden_TH.clone().requires_grad_(), share.weight_P.clone().requires_grad_()
        rows = [0 * x for x in hidden]
        for p, (t, e) in enumerate(zip(share.token_P.tolist(), share.expert_P.tolist(), strict=True)):
            if weight_on == "output":
                rows[t] = rows[t] + pair_weights[p] * expert_of(hidden[t], weights[e])
            else:
                rows[t] = rows[t] + expert_of(pair_weights[p] * hidden[t], weights[e])
        out = torch.stack(rows) if rows else hidden
        loss = (out * share.target_TH).sum()
        expected = torch.autograd.grad(loss, [hidden, pair_weights], retain_graph=True, materialize_grads=True)
        close(result.out_TH, out)
        close(result.d_hidden_TH, expected[0])
        close(result.d_weight_P, expected[1])
        total = total + loss
    grads = torch.autograd.grad(total, weights, materialize_grads=True)
    owned = {e: grad for result in results for e, grad in result.d_expert.items()}
    assert sorted(owned) == list(range(E))
    for expert, grad in owned.items():
        close(grad.double(), grads[expert])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def num_ranks_of(name: str) -> int:
    return int(name.split()[-1])


def enough_slots(shares: list[Share]) -> int:
    return max(int(count_per_expert(share.expert_P, E).max()) for share in shares) + 1


@pytest.mark.parametrize("slots", ["packed", "padded"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("name", MAPS)
def test_uneven_pairs_on_every_map(name: str, weight_on: str, slots: str) -> None:
    shares = random_shares(num_ranks_of(name))
    padded = enough_slots(shares) if slots == "padded" else None
    check_against_the_dense_sum(shares, MAPS[name], weight_on, padded)


@pytest.mark.parametrize("slots", ["packed", "padded"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_tokens_to_one_expert(num_ranks: int, slots: str) -> None:
    """All other experts, and all ranks but one, get nothing."""
    shares = [make_share([[E - 1]] * (4 + rank), seed=rank) for rank in range(num_ranks)]
    padded = enough_slots(shares) if slots == "padded" else None
    check_against_the_dense_sum(shares, ExpertMap.contiguous(E, num_ranks), slots=padded)


@pytest.mark.parametrize("slots", ["packed", "padded"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("num_chunks", [2, 3, 9])
@pytest.mark.parametrize("name", ["shuffled of 1", "unequal of 2", "an idle rank of 4"])
def test_chunks_change_nothing(name: str, num_chunks: int, weight_on: str, slots: str) -> None:
    shares = random_shares(num_ranks_of(name))
    padded = enough_slots(shares) if slots == "padded" else None
    results = run(shares, MAPS[name], weight_on, padded, num_chunks)
    for result, whole in zip(results, run(shares, MAPS[name], weight_on, padded), strict=True):
        assert torch.equal(result.out_TH, whole.out_TH)
        assert torch.equal(result.d_hidden_TH, whole.d_hidden_TH)
        assert torch.equal(result.d_weight_P, whole.d_weight_P)
        assert all(torch.equal(result.d_expert[e], right) for e, right in whole.d_expert.items())
        assert result.sent == whole.sent


def chunks_of_rank(shares: list[Share], num_chunks: int) -> list[Chunk]:
    share = shares[dist.get_rank()]
    dispatcher = AllToAllDispatcher(MAPS["unequal of 2"], dist.group.WORLD, num_chunks)
    return dispatcher.plan(routing_of(share, "output", None), len(share.hidden_TH)).chunks


def test_chunks_are_some_experts_of_every_rank() -> None:
    """Rank 0 has experts 6, 2, 0, 5, 1, 7 and rank 1 has 4, 3; of 4 chunks two have nothing for rank 1."""
    shares = random_shares(2)
    experts_of = [[[6], [2, 0], [5], [1, 7]], [[], [4], [], [3]]]
    for rank, chunks in enumerate(run_ranks(2, chunks_of_rank, shares, 4)):
        first = 0
        for chunk, *of_rank in zip(chunks, *experts_of, strict=True):
            count = [[int((share.expert_P == e).sum()) for e in of_rank[rank]] for share in shares]
            places = list(range(first, first + len(of_rank[rank])))
            assert chunk.segments == Segments([n for counts in count for n in counts], places * 2)
            assert chunk.receive == [sum(counts) for counts in count]
            assert chunk.send == [sum(int((shares[rank].expert_P == e).sum()) for e in experts) for experts in of_rank]
            first += len(places)


def test_there_are_no_more_chunks_than_experts_of_a_rank() -> None:
    assert [len(chunks) for chunks in run_ranks(2, chunks_of_rank, random_shares(2), 99)] == [6, 6]


def test_an_expert_without_pairs() -> None:
    shares = [make_share([[0, 1, 2], [5, 6, 7], [4]], seed=rank) for rank in range(2)]  # none for 3
    check_against_the_dense_sum(shares, MAPS["contiguous of 2"])


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_without_pairs(num_ranks: int, weight_on: str, num_tokens: int) -> None:
    """Without tokens, or with none but padding."""
    empty = make_share([[]] * num_tokens, seed=0)
    check_against_the_dense_sum([empty, *random_shares(2)[1:num_ranks]], ExpertMap.contiguous(E, num_ranks), weight_on)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_rank_without_pairs_still_sends_its_padded_slots(num_tokens: int) -> None:
    shares = [make_share([[]] * num_tokens, seed=0), random_shares(2)[1]]
    results = check_against_the_dense_sum(shares, MAPS["contiguous of 2"], slots=enough_slots(shares))
    assert results[0].sent == results[1].sent


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_packed_costs_one_exchange_of_counts_and_padded_none(num_ranks: int) -> None:
    shares = random_shares(num_ranks)
    for slots, forward in ((None, 3), (enough_slots(shares), 2)):
        results = run(shares, ExpertMap.contiguous(E, num_ranks), "output", slots)
        assert [result.calls for result in results] == [(forward, 2)] * num_ranks


@pytest.mark.parametrize("name", [name for name in MAPS if num_ranks_of(name) > 1])
def test_packed_segments_are_the_pairs_by_source_and_expert(name: str) -> None:
    shares = random_shares(num_ranks_of(name))
    for rank, result in enumerate(run(shares, MAPS[name], "output", None)):
        own = MAPS[name].experts_of_rank[rank]
        assert result.sizes == [int((share.expert_P == e).sum()) for share in shares for e in own]
        sent = [sum(int((shares[rank].expert_P == e).sum()) for e in experts) for experts in MAPS[name].experts_of_rank]
        assert result.sent == sent


def test_padded_segments_are_all_alike() -> None:
    for rank, result in enumerate(run(random_shares(2), MAPS["unequal of 2"], "output", 16)):
        own = len(MAPS["unequal of 2"].experts_of_rank[rank])
        assert result.sizes == [16] * (2 * own)
        assert result.sent == [16 * 6, 16 * 2]


def test_rows_stand_by_expert_in_token_order() -> None:
    share = random_shares(1)[0]
    rows, segments, _ = AllToAllDispatcher(MAPS["shuffled of 1"], None).dispatch(
        share.hidden_TH, routing_of(share, "output", None)
    )
    own = MAPS["shuffled of 1"].experts_of_rank[0]
    for block, place in zip(rows.split(segments.sizes), segments.experts, strict=True):
        assert torch.equal(block, share.hidden_TH[share.token_P[share.expert_P == own[place]]])


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_empty_slots_are_zero(weight_on: str) -> None:
    share = make_share([[0, 1], [1]], seed=0)
    routing = routing_of(share, weight_on, 3)
    rows, _, _ = AllToAllDispatcher(MAPS["contiguous of 1"], None).dispatch(share.hidden_TH, routing)
    assert rows.any(1).tolist() == [True, False, False, True, True, False] + [False] * 3 * (E - 2)


def test_a_ticket_outlives_other_calls() -> None:
    """The dispatcher keeps no state: two micro-batches may be under way at once."""
    dispatcher = AllToAllDispatcher(MAPS["contiguous of 1"], None)
    first, second = random_shares(2)
    trips = [dispatcher.dispatch(share.hidden_TH, routing_of(share, "output", None)) for share in (first, second)]
    together = [dispatcher.combine(rows, ticket) for rows, _, ticket in trips]
    alone = []
    for share in (first, second):
        rows, _, ticket = dispatcher.dispatch(share.hidden_TH, routing_of(share, "output", None))
        alone.append(dispatcher.combine(rows, ticket))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_bfloat16_rows_are_added_up_in_the_format_of_the_weights() -> None:
    """256 + 1 is 256 in bfloat16, however often it is done."""
    share = make_share([list(range(E))], seed=0)
    routing = routing_of(share, "output", None)
    hidden = torch.ones(1, H, dtype=torch.bfloat16)
    rows, segments, ticket = AllToAllDispatcher(MAPS["contiguous of 1"], None).dispatch(hidden, routing)
    assert segments.sizes == [1] * E
    values = torch.tensor([256.0] + [1.0] * (E - 1), dtype=torch.bfloat16)[:, None].expand(E, H)
    ones = torch.ones(E)
    out = AllToAllDispatcher(MAPS["contiguous of 1"], None).combine(
        values.contiguous(), type(ticket)(ticket.journey, ones)
    )
    assert out.dtype == rows.dtype == torch.bfloat16
    assert out.tolist() == [[264.0] * H]  # 263, rounded once


@pytest.mark.parametrize(("slots", "reads"), [(None, ["tolist"]), (50, [])])
def test_the_host_reads_once_packed_and_never_padded(slots: int | None, reads: list[str]) -> None:
    share = random_shares(1)[0]
    dispatcher, routing = AllToAllDispatcher(MAPS["contiguous of 1"], None), routing_of(share, "output", slots)
    with HostReads() as host:
        rows, _, ticket = dispatcher.dispatch(share.hidden_TH, routing)
        dispatcher.combine(rows, ticket)
    assert host.seen == reads


def test_dropless_top_k_reads_nothing_before_the_dispatch() -> None:
    losses = {"load_balance": {"coefficient": 1.0}, "z": {"coefficient": 1.0}}
    config = RoutingConfig.model_validate({"top_k": 2, "bias": {"rule": "sign"}, "losses": losses})
    router = build_router(H, E, config)
    router.tolerates_nonfinite = True  # as the engine does
    with HostReads() as host:
        router(torch.randn(6, H), Tokens(num_sequences=2))
    assert host.seen == []
