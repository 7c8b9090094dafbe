"""Hierarchical dispatch against the dense oracle of test_dispatcher, and what it costs between nodes.

Shape letters: T tokens, H hidden, E experts, P pairs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist import MoELayer
from moe_dist.config import build_config
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import AllToAllDispatcher
from moe_dist.dispatch.exchange import build_exchange
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.parallel.collectives import all_to_all
from moe_dist.parallel.groups import build_node_groups
from moe_dist.parallel.traffic import Traffic, counting
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing
from moe_dist.telemetry.recorder import LayerRecorder
from tests.dispatch.test_dispatcher import (
    MAPS,
    E,
    H,
    HostReads,
    Result,
    Share,
    check_results,
    compute,
    enough_slots,
    expert_weight,
    make_share,
    random_shares,
    routing_of,
)
from tests.support.distributed import run_ranks
from tests.support.stand_ins import installed_stand_ins

ROW_BYTES = 8 * H
"""float64."""
NODE_SIZES = [("2 nodes x 1", 2, 1), ("4 nodes x 1", 4, 1), ("2 nodes x 2", 4, 2)]
LAYOUTS = [
    (name, ranks, size, maps) for name, ranks, size in NODE_SIZES for maps in MAPS if maps.endswith(f"of {ranks}")
]
IDS = [f"{name}, {maps}" for name, _, _, maps in LAYOUTS]


@dataclass(frozen=True)
class Trip:
    result: Result
    forward: Traffic
    backward: Traffic
    calls: list[Counter[str]]
    """Of forward and backward: all-to-alls by group."""
    reads: list[str]


@cache
def node_groups(ranks_per_node: int) -> Any:
    """One for all tests of a rank: each group has threads that stay."""
    return build_node_groups(dist.group.WORLD, ranks_per_node)


def trip_of_rank(shares: list[Share], expert_map: ExpertMap, size: int, weight_on: str, slots: int | None) -> Trip:
    """Between nodes, inside the node, experts, and back. `size`: ranks of a node; of all ranks: flat."""
    share, rank = shares[dist.get_rank()], dist.get_rank()
    own = expert_map.experts_of_rank[rank]
    weights = [expert_weight(e).requires_grad_() for e in own]
    hidden, routing = share.hidden_TH.clone().requires_grad_(), routing_of(share, weight_on, slots)
    exchange, dispatcher = None, AllToAllDispatcher(expert_map, dist.group.WORLD)
    if size < len(shares):
        exchange = HierarchicalExchange(expert_map, node_groups(size))
        dispatcher = AllToAllDispatcher(exchange.inner_map, exchange.inner_group)
    nodes = 2  # as the network is, in every test of traffic
    with watch_calls(exchange) as calls, HostReads() as host, counting(nodes) as forward:
        inner_hidden, inner_routing = hidden, routing
        if exchange is not None:
            inner_hidden, inner_routing, between = exchange.send(hidden, routing)
        rows, segments, ticket = dispatcher.dispatch(inner_hidden, inner_routing)
        reads = list(host.seen)
        out = dispatcher.combine(compute(rows, segments, weights), ticket)
        if exchange is not None:
            out = exchange.bring_back(out, between)
    with watch_calls(exchange) as back, counting(nodes) as backward:
        out.backward(share.target_TH)
    grads = {e: w.grad if w.grad is not None else torch.zeros(H + 1, H) for e, w in zip(own, weights, strict=True)}
    result = Result(out.detach(), hidden.grad, routing.weight_P.grad, grads, segments.sizes, [], (0, 0))
    return Trip(result, forward, backward, [calls, back], reads)


@contextmanager
def watch_calls(exchange: HierarchicalExchange | None) -> Iterator[Counter[str]]:
    """Counts all-to-alls by whether they are between nodes or inside one."""
    calls: Counter[str] = Counter()
    real = dist.all_to_all_single

    def call(*args: Any, **kwargs: Any) -> Any:
        calls["between" if exchange and kwargs["group"] is exchange.group else "inside"] += 1
        return real(*args, **kwargs)

    with patch.object(dist, "all_to_all_single", call):
        yield calls


def check(
    shares: list[Share], expert_map: ExpertMap, size: int, weight_on: str = "output", slots: Any = None
) -> list[Trip]:
    trips = run_ranks(len(shares), trip_of_rank, shares, expert_map, size, weight_on, slots)
    check_results([trip.result for trip in trips], shares, weight_on)
    return trips


@pytest.mark.parametrize("slots", ["packed", "padded"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("name", "num_ranks", "size", "maps"), LAYOUTS, ids=IDS)
def test_uneven_pairs_on_every_map(name: str, num_ranks: int, size: int, maps: str, weight_on: str, slots: str) -> None:
    shares = random_shares(num_ranks)
    padded = enough_slots(shares) if slots == "padded" else None
    check(shares, MAPS[maps], size, weight_on, padded)


def test_all_tokens_to_one_expert() -> None:
    """The other node gets no row, and of this node only one rank."""
    shares = [make_share([[E - 1]] * (4 + rank), seed=rank) for rank in range(4)]
    for slots in (None, enough_slots(shares)):
        check(shares, MAPS["contiguous of 4"], 2, slots=slots)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_ranks_without_pairs(num_tokens: int, weight_on: str, size: int) -> None:
    """Without tokens, or with none but padding; on one rank, and on all."""
    empty, full = make_share([[]] * num_tokens, seed=0), random_shares(4)
    for shares in ([empty, *full[1:]], [empty] * 4):
        for slots in (None, enough_slots(shares)):
            check(shares, MAPS["shuffled of 4"], size, weight_on, slots)
    check([empty] * 4, MAPS["shuffled of 4"], size, weight_on, slots=0)


@pytest.mark.parametrize("slots", [None, 20])
def test_a_node_without_experts(slots: int | None) -> None:
    check(random_shares(4), ExpertMap((tuple(range(5)), (6, 7, 5), (), ())), 2, slots=slots)


def test_repeated_runs_are_bitwise_equal() -> None:
    shares = random_shares(4)
    first, second = (check(shares, MAPS["unequal of 4"], 2) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in ("out_TH", "d_hidden_TH", "d_weight_P"):
            assert torch.equal(getattr(one.result, name), getattr(other.result, name))


@pytest.mark.parametrize(
    ("slots", "size", "forward", "backward", "reads"),
    [
        # between: counts, pairs, rows; rows back. inside: counts, rows; rows back.
        (None, 2, {"between": 4, "inside": 3}, {"between": 3, "inside": 2}, ["tolist"] * 2),
        (None, 1, {"between": 4}, {"between": 3}, ["tolist"] * 2),
        (50, 2, {"between": 2, "inside": 2}, {"between": 2, "inside": 2}, []),
        (50, 1, {"between": 2}, {"between": 2}, []),
    ],
)
def test_collectives_and_waits_for_the_device(
    slots: int | None, size: int, forward: dict[str, int], backward: dict[str, int], reads: list[str]
) -> None:
    for trip in check(random_shares(4), MAPS["contiguous of 4"], size, slots=slots):
        assert trip.calls == [forward, backward]
        assert trip.reads == reads


# Bytes between nodes, from the definition: of each token the nodes of its experts, of each expert the rank that owns it.


def owner(expert_map: ExpertMap, expert: int) -> int:
    return next(rank for rank, experts in enumerate(expert_map.experts_of_rank) if expert in experts)


def pairs_abroad(share: Share, rank: int, expert_map: ExpertMap) -> list[tuple[int, int]]:
    """(token, node) of each pair whose expert is on the other node; nodes are of 2 ranks."""
    nodes = [owner(expert_map, expert) // 2 for expert in share.expert_P.tolist()]
    return [(t, node) for t, node in zip(share.token_P.tolist(), nodes, strict=True) if node != rank // 2]


MAPS_OF_FOUR = [name for name in MAPS if name.endswith("of 4")]


@pytest.mark.parametrize("maps", MAPS_OF_FOUR)
def test_a_token_crosses_once_for_each_node_that_needs_it(maps: str) -> None:
    shares, expert_map = random_shares(4), MAPS[maps]
    rows = [len(set(pairs_abroad(share, rank, expert_map))) for rank, share in enumerate(shares)]
    trips = check(shares, expert_map, 2)
    for rank, trip in enumerate(trips):
        # The rank of the same place on the other node sends back what it took.
        returned = rows[(rank + 2) % 4]
        pairs, pairs_returned = (len(pairs_abroad(shares[r], r, expert_map)) for r in (rank, (rank + 2) % 4))
        assert trip.forward.between_nodes["rows"] == ROW_BYTES * (rows[rank] + returned)
        assert trip.backward.between_nodes["rows"] == ROW_BYTES * (rows[rank] + returned)
        # Two counts for the other node; of each pair weight and expert, and back the weight's gradient, as float64.
        assert trip.forward.between_nodes["headers"] == 16 + 16 * pairs
        assert trip.backward.between_nodes["headers"] == 8 * pairs_returned
    # Inside the node, every pair whose expert another rank of it owns, whichever node the token is from.
    inside = sum(
        owner(expert_map, expert) % 2 != rank % 2
        for rank, share in enumerate(shares)
        for expert in share.expert_P.tolist()
    )
    assert sum(trip.forward.inside_node["rows"] for trip in trips) == ROW_BYTES * 2 * inside


@pytest.mark.parametrize("maps", MAPS_OF_FOUR)
def test_flat_sends_a_row_for_each_pair_abroad(maps: str) -> None:
    shares, expert_map = random_shares(4), MAPS[maps]
    trips = check(shares, expert_map, 4)
    pairs = sum(len(pairs_abroad(share, rank, expert_map)) for rank, share in enumerate(shares))
    rows = sum(len(set(pairs_abroad(share, rank, expert_map))) for rank, share in enumerate(shares))
    assert sum(trip.forward.between_nodes["rows"] for trip in trips) == ROW_BYTES * 2 * pairs
    assert sum(trip.backward.between_nodes["rows"] for trip in trips) == ROW_BYTES * 2 * pairs
    assert pairs > 1.5 * rows
    abroad = [
        sum(len(experts) for r, experts in enumerate(expert_map.experts_of_rank) if r // 2 != n) for n in range(2)
    ]
    assert [trip.forward.between_nodes["headers"] for trip in trips] == [8 * abroad[rank // 2] for rank in range(4)]


def test_padded_slots_all_cross_and_nothing_else() -> None:
    expert_map = MAPS["unequal of 4"]
    for rank, trip in enumerate(check(random_shares(4), expert_map, 2, slots=20)):
        own, other = (sum(expert_map.num_experts_of_rank[2 * n : 2 * n + 2]) for n in (rank // 2, 1 - rank // 2))
        assert trip.forward.between_nodes == {"rows": ROW_BYTES * 20 * (own + other)}
        assert trip.backward.between_nodes == {"rows": ROW_BYTES * 20 * (own + other)}


# In a layer.


def recorded(flat: bool) -> tuple[int, list[tuple[int, int]]]:
    """What the recorder of a layer says, and (token, expert) of this rank's pairs."""
    group = dist.group.WORLD
    exchange = None if flat else HierarchicalExchange(ExpertMap.contiguous(E, 4), node_groups(2))
    routing = RoutingConfig(top_k=5)
    layer = MoELayer(H, MoEConfig(num_experts=E, ffn_size=4), routing, group, exchange=exchange).double()
    layer.recorder = LayerRecorder(torch.device("cpu"), E, len(layer.own_experts), ranks_per_node=2)
    pairs: list[tuple[int, int]] = []

    def note(router: Any, arguments: Any, made: Routing) -> None:
        pairs.extend(zip(made.token_P.tolist(), made.expert_P.tolist(), strict=True))

    layer.router.register_forward_hook(note)
    share = random_shares(4)[dist.get_rank()]
    layer(share.hidden_TH).sum().backward()  # only the forward pass is recorded
    return layer.recorder.counts.bytes_between_nodes, pairs


@pytest.mark.parametrize("flat", [True, False])
def test_the_recorder_shows_the_bytes_between_nodes(flat: bool) -> None:
    results = run_ranks(4, recorded, flat)
    # Experts 0 to 3 are on the first node.
    abroad = [[t for t, e in pairs if e // 4 != rank // 2] for rank, (_, pairs) in enumerate(results)]
    for rank, (recorded_bytes, _) in enumerate(results):
        peer = (rank + 2) % 4
        if flat:
            counts = 8 * 4
            assert sum(r for r, _ in results) == sum(counts + ROW_BYTES * 2 * len(tokens) for tokens in abroad)
        else:
            rows = len(set(abroad[rank])) + len(set(abroad[peer]))
            assert recorded_bytes == ROW_BYTES * rows + 16 + 16 * len(abroad[rank])


def built(**parallel: Any) -> tuple[str, int]:
    config = build_config({"parallel": {"expert": 4, **parallel}, "training": {"precision": "bfloat16"}}, 4)
    with installed_stand_ins(), patch("torch.cuda.is_available", return_value=True):
        exchange = build_exchange(config, ExpertMap.contiguous(E, 4), dist.group.WORLD)
    return type(exchange).__name__, len(exchange.inner_map.experts_of_rank) if exchange else 4


def built_under_a_launcher(local_num_ranks: int) -> tuple[str, int]:
    rank = str(dist.get_rank())
    variables = {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local_num_ranks)}
    with patch.dict("os.environ", {**variables, "MASTER_ADDR": "localhost"}):
        return built(dispatch="hierarchical")


def test_the_config_names_the_exchange_and_the_launcher_the_node() -> None:
    assert run_ranks(4, partial(built, dispatch="flat")) == [("NoneType", 4)] * 4
    assert run_ranks(4, partial(built, dispatch="hierarchical", ranks_per_node=2)) == [("HierarchicalExchange", 2)] * 4
    assert run_ranks(4, partial(built, dispatch="deepep")) == [("DeepEPExchange", 1)] * 4
    for size in (1, 2):
        assert run_ranks(4, built_under_a_launcher, size) == [("HierarchicalExchange", size)] * 4


# Groups.


def groups_of_rank(expert_parallel: int, ranks_per_node: int) -> tuple[int, list[int] | None, list[int]]:
    starts = range(0, dist.get_world_size(), expert_parallel)
    groups = [list(range(start, start + expert_parallel)) for start in starts]
    group, _ = dist.new_subgroups_by_enumeration(groups)
    found = build_node_groups(group, ranks_per_node)
    inside = None if found.inside is None else dist.get_process_group_ranks(found.inside)
    return found.node, inside, dist.get_process_group_ranks(found.between)


def test_groups_of_nodes() -> None:
    assert run_ranks(4, groups_of_rank, 4, 2) == [
        (0, [0, 1], [0, 2]),
        (0, [0, 1], [1, 3]),
        (1, [2, 3], [0, 2]),
        (1, [2, 3], [1, 3]),
    ]
    assert run_ranks(4, groups_of_rank, 4, 1) == [(rank, None, [0, 1, 2, 3]) for rank in range(4)]


def test_groups_of_nodes_of_several_expert_parallel_groups() -> None:
    assert run_ranks(4, groups_of_rank, 2, 1) == [
        (0, None, [0, 1]),
        (1, None, [0, 1]),
        (0, None, [2, 3]),
        (1, None, [2, 3]),
    ]


def refused(ranks_per_node: int) -> str:
    with pytest.raises(ValueError, match="ranks_per_node") as error:
        node_groups(ranks_per_node)
    return str(error.value)


@pytest.mark.parametrize("ranks_per_node", [3, 4, 8])
def test_nodes_must_divide_the_group(ranks_per_node: int) -> None:
    message = (
        f"parallel.ranks_per_node: {ranks_per_node} does not divide the 4 ranks of an expert-parallel group "
        "into two or more nodes; use a smaller divisor, or parallel.dispatch: flat"
    )
    assert run_ranks(4, refused, ranks_per_node) == [message] * 4


def test_nothing_is_counted_unless_asked_and_counters_may_be_nested() -> None:
    first, second = run_ranks(2, count_nested)
    assert first == second == ({"headers": 8}, {"headers": 16})


def count_nested() -> tuple[Counter[str], Counter[str]]:
    def send() -> None:
        all_to_all("headers", torch.zeros(2, dtype=torch.int64), [1, 1], [1, 1], dist.group.WORLD)

    send()
    with counting(1) as outer:
        send()
        with counting(1) as inner:
            send()
    send()
    return inner.between_nodes, outer.between_nodes
