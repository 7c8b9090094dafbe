"""DeepEP as an exchange, on a stand-in with its released signature, against the flat dispatcher; hierarchical too.

Everything is a small integer, or half of one, so that bfloat16 holds every value and every sum exactly and the two must
agree bit by bit.

Shape letters: T tokens, H hidden, E experts, P pairs, R rows.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist import MoELayer
from moe_dist.config.deepep import deepep_problems
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import AllToAllDispatcher, Segments
from moe_dist.dispatch.deepep import DeepEPExchange
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing
from moe_dist.routing.router import count_per_expert
from tests.dispatch.test_hierarchical import node_groups
from tests.support.distributed import run_ranks
from tests.support.stand_ins import installed_stand_ins

H, E, K = 16, 8, 3
MAPS = {
    "contiguous of 2": ExpertMap.contiguous(E, 2),
    "unequal of 2": ExpertMap(((6, 2, 0, 5, 1, 7), (4, 3))),
    "shuffled of 4": ExpertMap.from_owners([3, 0, 2, 1, 0, 3, 1, 2]),
    "an idle rank of 4": ExpertMap(((5, 3, 1), (), (7, 0, 2, 4), (6,))),
}


@contextmanager
def deep_ep() -> Iterator[None]:
    """The stand-in is installed, and there seems to be a device for it."""
    with ExitStack() as stack:
        stack.enter_context(installed_stand_ins())
        stack.enter_context(patch("torch.cuda.is_available", return_value=True))
        yield


def integers(low: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def routing_of_rank(rank: int, weight_on: Any) -> Routing:
    """0 to K experts of each of 5 tokens or more; one token has none, one has all."""
    generator = torch.Generator().manual_seed(rank)
    num_tokens = 5 + 3 * rank
    experts = [torch.randperm(E, generator=generator)[: t % (K + 1)].tolist() for t in range(num_tokens)]
    pairs = torch.tensor([(t, e) for t, chosen in enumerate(experts) for e in chosen])
    weight_P = 0.5 * integers(1, 5, len(pairs), seed=rank)
    return Routing(
        token_P=pairs[:, 0],
        expert_P=pairs[:, 1],
        weight_P=weight_P.float().requires_grad_(),
        load_E=count_per_expert(pairs[:, 1], E),
        weight_on=weight_on,
    )


def compute(rows_RH: torch.Tensor, segments: Segments, weight_L2: torch.Tensor) -> torch.Tensor:
    """An expert is x -> a x + b."""
    done = [
        x * weight_L2[e, 0] + weight_L2[e, 1]
        for x, e in zip(rows_RH.split(segments.sizes), segments.experts, strict=True)
    ]
    return torch.cat([*done, rows_RH[:0]])


def exchange_of(kind: str, expert_map: ExpertMap) -> DeepEPExchange | HierarchicalExchange | None:
    group = dist.group.WORLD
    if kind == "hierarchical":
        return HierarchicalExchange(expert_map, node_groups(dist.get_world_size() // 2))
    if kind == "flat":
        return None
    with deep_ep():
        return DeepEPExchange(expert_map, group, H, K)


def journey(expert_map: ExpertMap, weight_on: str, kind: str, empty: bool = False) -> list[torch.Tensor]:
    """Output and gradients of this rank. `empty`: it has no tokens, if it is the first."""
    rank, group = dist.get_rank(), dist.group.WORLD
    routing = routing_of_rank(rank, weight_on)
    num_tokens = 5 + 3 * rank
    if empty and rank == 0:
        num_tokens, none = 0, torch.zeros(0, dtype=torch.int64)
        weight_P = torch.zeros(0, requires_grad=True)
        routing = replace(routing, token_P=none, expert_P=none, weight_P=weight_P)
    hidden_TH = integers(-3, 4, num_tokens, H, seed=10 + rank).bfloat16().requires_grad_()
    own = expert_map.experts_of_rank[rank]
    weight_L2 = integers(-2, 3, E, 2, seed=7)[list(own)].bfloat16().requires_grad_()
    exchange, inner_hidden, inner_routing = exchange_of(kind, expert_map), hidden_TH, routing
    if exchange is not None:
        inner_hidden, inner_routing, between = exchange.send(hidden_TH, routing)
        load_E = count_per_expert(inner_routing.expert_P, exchange.inner_map.num_experts)
        assert torch.equal(inner_routing.load_E, load_E)
    inner = (exchange.inner_map, exchange.inner_group) if exchange else (expert_map, group)
    dispatcher = AllToAllDispatcher(*inner)
    rows, segments, ticket = dispatcher.dispatch(inner_hidden, inner_routing)
    out_TH = dispatcher.combine(compute(rows, segments, weight_L2), ticket)
    if exchange is not None:
        out_TH = exchange.bring_back(out_TH, between)
    out_TH.backward(integers(-1, 2, num_tokens, H, seed=20 + rank).bfloat16())
    grads = [x.grad if x.grad is not None else torch.zeros(0) for x in (hidden_TH, routing.weight_P, weight_L2)]
    return [out_TH.detach(), *grads]


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("kind", ["deepep", "hierarchical"])
def test_the_same_as_flat_to_the_bit(kind: str, maps: str, weight_on: str, empty: bool) -> None:
    num_ranks = int(maps.split()[-1])
    flat, results = (run_ranks(num_ranks, journey, MAPS[maps], weight_on, on, empty) for on in ("flat", kind))
    for expected, actual in zip(flat, results, strict=True):
        for right, tensor in zip(expected, actual, strict=True):
            assert tensor.dtype == right.dtype
            assert torch.equal(tensor, right)
    assert all(tensor.any() for tensor in results[1][:3])


def layer_of_rank(kind: str) -> dict[str, torch.Tensor]:
    """Output and gradients of a layer under autocast."""
    expert_map = ExpertMap.contiguous(E, dist.get_world_size())
    exchange = exchange_of(kind, expert_map)
    moe, routing = MoEConfig(num_experts=E, ffn_size=8), RoutingConfig(top_k=K)
    layer = MoELayer(H, moe, routing, dist.group.WORLD, expert_map=expert_map, exchange=exchange)
    layer.initialise(seed=1, name="moe", std=0.3)
    hidden = torch.randn(12, H, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden)
    out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "hidden": hidden.grad, **gradients}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_layer_is_as_close_as_bfloat16_is(num_ranks: int) -> None:
    """Sums of a rank are rounded before they are added up."""
    flat, results = (run_ranks(num_ranks, layer_of_rank, kind) for kind in ("flat", "deepep"))
    for expected, actual in zip(flat, results, strict=True):
        for name, right in expected.items():
            error = (actual[name].float() - right.float()).norm() / right.float().norm()
            assert error < 0.02, f"{name}: {error}"


# Refusals.


def refused_to_build(installed: bool, has_device: bool, hidden_size: int = H, num_choices: int = K) -> str:
    with ExitStack() as stack:
        if installed:
            stack.enter_context(installed_stand_ins())
        stack.enter_context(patch("torch.cuda.is_available", return_value=has_device))
        with pytest.raises(ValueError, match="deepep") as error:
            DeepEPExchange(MAPS["contiguous of 2"], dist.group.WORLD, hidden_size, num_choices)
        return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, True), r"deepep needs the package deep_ep, which cannot be imported \(.*\); build it from .*"),
        ((True, False), r"deepep needs CUDA devices, and there is none; use flat or hierarchical"),
        ((True, True, 24), r"deepep needs a multiple of 16 below 8192 as model.hidden_size .*, not 24; use flat .*"),
        ((True, True, 8192), r"deepep needs a multiple of 16 below 8192 .*"),
        ((True, True, H, 33), r"deepep sends a token to at most 32 experts, and here one may have 33; use flat .*"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    for answer in run_ranks(2, refused_to_build, *arguments):
        assert re.fullmatch(r"parallel\.dispatch: " + message, answer), answer


def test_limits_over_several_nodes() -> None:
    assert list(deepep_problems(7168, 64, 8)) == []
    assert list(deepep_problems(2880, 8, 4)) == []
    (width,) = deepep_problems(2880, 16, 4)
    assert "multiple of 256 below 8192" in width
    (ranks,) = deepep_problems(7168, 12, 8)
    assert ranks.startswith(
        "parallel.dispatch: deepep has no settings for expert-parallel groups of 12 ranks; use one of 2,"
    )


def refused_to_send(dtype: torch.dtype, slots: int | None) -> str:
    with deep_ep():
        exchange = DeepEPExchange(MAPS["contiguous of 2"], dist.group.WORLD, H, K)
    routing = replace(routing_of_rank(0, "output"), pairs_per_expert=slots)
    with pytest.raises(ValueError, match="deepep") as error:
        exchange.send(torch.zeros(5, H, dtype=dtype), routing)
    return str(error.value)


def test_other_formats_and_padded_slots_are_refused() -> None:
    assert run_ranks(2, refused_to_send, torch.float32, None)[0] == (
        "parallel.dispatch: deepep moves bfloat16, and rows are torch.float32; "
        "set training.precision: bfloat16, or use flat or hierarchical"
    )
    assert run_ranks(2, refused_to_send, torch.bfloat16, 4)[0].startswith(
        "parallel.dispatch: deepep does not carry padded slots"
    )
