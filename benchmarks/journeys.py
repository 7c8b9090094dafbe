"""What benchmarks/dispatch.py times: a load, the journeys that carry it, and what arithmetic makes of it.

Shape letters: T tokens of this rank, H hidden, E experts, L experts of this rank, K experts per token, P = T K pairs in token
order, R rows received by this rank, U rows received by this rank for its node.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peers import COMPETITORS, Shape, UnavailableError, make_problem
from torch import Tensor

from moe_dist.dispatch import AllToAllDispatcher
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.parallel.groups import build_node_groups
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing

ZIPF_EXPONENT = {"uniform": 0.0, "zipf": 1.0}

Experts = Callable[[Tensor, list[int], list[int]], Tensor]
"""Rows, the sizes of their segments, and for each segment the place of its expert on this rank -> rows."""


@dataclass(frozen=True)
class Load:
    """Tokens, and where each goes."""

    shape: Shape
    nodes: int
    hidden_TH: Tensor
    grad_TH: Tensor
    expert_TK: Tensor
    weight_TK: Tensor

    @property
    def ranks(self) -> int:
        return dist.get_world_size()

    @property
    def num_local(self) -> int:
        return self.shape.experts // self.ranks


class Journey(NamedTuple):
    """One way to go: the weights in the form it takes them, all the way, and the weights' gradient as [T, K]."""

    weight: Tensor
    run: Callable[[Tensor, Tensor, Experts], Tensor]
    gradient_TK: Callable[[Tensor], Tensor]


def draw_load(shape: Shape, load_name: str, nodes: int) -> Load:
    """Different tokens on every rank; which experts are popular is drawn once for all."""
    tokens = torch.Generator().manual_seed(1 + dist.get_rank())
    place_E = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(0))
    popularity_E = (1.0 + place_E) ** -ZIPF_EXPONENT[load_name]
    chance_TE = popularity_E.expand(shape.tokens, -1)
    return Load(
        shape,
        nodes,
        hidden_TH=torch.randn(shape.tokens, shape.hidden, generator=tokens),
        grad_TH=torch.randn(shape.tokens, shape.hidden, generator=tokens),
        expert_TK=torch.multinomial(chance_TE, shape.top_k, generator=tokens),
        weight_TK=torch.randn(shape.tokens, shape.top_k, generator=tokens).softmax(dim=1),
    )


def checked_results(journey: Journey, load: Load) -> dict[str, Tensor]:
    """Output and gradients of a journey whose experts multiply by a number of their own."""
    factor_L = expert_factors(load.shape.experts).chunk(load.ranks)[dist.get_rank()]

    def experts(rows_RH: Tensor, sizes: list[int], places: list[int]) -> Tensor:
        return rows_RH * factor_L[places].repeat_interleave(torch.tensor(sizes))[:, None]

    hidden_TH = load.hidden_TH.clone().requires_grad_()
    output_TH = journey.run(hidden_TH, journey.weight, experts)
    output_TH.backward(load.grad_TH)
    weight_gradient_TK, journey.weight.grad = journey.gradient_TK(journey.weight.grad), None
    return {
        "output": output_TH.detach(),
        "token gradient": hidden_TH.grad,
        "weight gradient": weight_gradient_TK,
    }


def expected_results(load: Load) -> dict[str, Tensor]:
    """The same by arithmetic."""
    factor_TK = expert_factors(load.shape.experts)[load.expert_TK]
    sum_T1 = (load.weight_TK * factor_TK).sum(dim=1, keepdim=True)
    dot_T1 = (load.hidden_TH * load.grad_TH).sum(dim=1, keepdim=True)
    return {
        "output": load.hidden_TH * sum_T1,
        "token gradient": load.grad_TH * sum_T1,
        "weight gradient": dot_T1 * factor_TK,
    }


def expert_factors(num_experts: int) -> Tensor:
    return 1 + torch.arange(num_experts) / num_experts


def flat(load: Load) -> Journey:
    """moe_dist's dispatcher as it is."""
    dispatcher = AllToAllDispatcher(ExpertMap.contiguous(load.shape.experts, load.ranks), dist.group.WORLD)
    return pairs_journey(load, lambda hidden, routing, experts: through(dispatcher, hidden, routing, experts))


def hierarchical(load: Load) -> Journey:
    """moe_dist's exchange between nodes around its dispatcher inside a node."""
    if load.nodes == 1:
        raise UnavailableError("needs --nodes of at least 2")
    groups = build_node_groups(dist.group.WORLD, load.ranks // load.nodes)
    exchange = HierarchicalExchange(ExpertMap.contiguous(load.shape.experts, load.ranks), groups)
    dispatcher = AllToAllDispatcher(exchange.inner_map, exchange.inner_group)

    def run(hidden_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
        hidden_UH, routing_U, ticket = exchange.send(hidden_TH, routing)
        return exchange.bring_back(through(dispatcher, hidden_UH, routing_U, experts), ticket)

    return pairs_journey(load, run)


def through(dispatcher: AllToAllDispatcher, hidden_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
    rows_RH, segments, ticket = dispatcher.dispatch(hidden_TH, routing)
    return dispatcher.combine(experts(rows_RH, segments.sizes, segments.experts), ticket)


def pairs_journey(load: Load, run: Callable[[Tensor, Routing, Experts], Tensor]) -> Journey:
    """A journey that takes a Routing."""
    shape = load.shape
    token_P = torch.arange(shape.tokens).repeat_interleave(shape.top_k)
    expert_P = load.expert_TK.flatten()
    routing = Routing(token_P, expert_P, load.weight_TK.flatten(), expert_P.bincount(minlength=shape.experts))
    return Journey(
        load.weight_TK.flatten().requires_grad_(),
        lambda hidden, weight_P, experts: run(hidden, replace(routing, weight_P=weight_P), experts),
        lambda gradient_P: gradient_P.view_as(load.weight_TK),
    )


def plain_torch(load: Load) -> Journey:
    """What one writes first."""
    shape, ranks = load.shape, load.ranks

    def run(hidden_TH: Tensor, weight_TK: Tensor, experts: Experts) -> Tensor:
        expert_P = load.expert_TK.flatten()
        order_P = expert_P.argsort(stable=True)
        sent_E = expert_P.bincount(minlength=shape.experts)
        received_E = torch.empty_like(sent_E)
        dist.all_to_all_single(received_E, sent_E)
        send, receive = (count_E.view(ranks, -1).sum(dim=1).tolist() for count_E in (sent_E, received_E))
        token_P = order_P // shape.top_k
        rows = _AllToAll.apply(hidden_TH.index_select(0, token_P), send, receive)
        rows = experts(rows, received_E.tolist(), list(range(load.num_local)) * ranks)
        rows = _AllToAll.apply(rows, receive, send)
        return torch.zeros_like(hidden_TH).index_add(0, token_P, rows * weight_TK.flatten()[order_P, None])

    return Journey(load.weight_TK.clone().requires_grad_(), run, lambda gradient_TK: gradient_TK)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        ctx.send, ctx.receive = send, receive
        received = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(received, rows, receive, send)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(grads[0].contiguous(), ctx.receive, ctx.send), None, None


def megatron(name: str) -> Callable[[Load], Journey]:
    """A dispatcher of Megatron-Core, taken out of the layer that benchmarks/layer.py times."""

    def build(load: Load) -> Journey:
        problem = make_problem(replace(load.shape, tokens=1, ffn=1), dist.get_rank(), load.ranks)
        dispatcher = COMPETITORS[name](problem).layer.token_dispatcher
        map_TE = torch.zeros(load.shape.tokens, load.shape.experts, dtype=torch.bool).scatter(1, load.expert_TK, True)

        def run(hidden_TH: Tensor, weight_TE: Tensor, experts: Experts) -> Tensor:
            rows, weights = dispatcher.dispatch_preprocess(hidden_TH, map_TE, weight_TE)
            rows, weights = dispatcher.token_dispatch(rows, weights)
            rows, sizes, weights = dispatcher.dispatch_postprocess(rows, weights)
            rows = experts(rows * weights[:, None], sizes.tolist(), list(range(load.num_local)))
            rows = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
            return dispatcher.combine_postprocess(rows)

        weight_TE = torch.zeros(map_TE.shape).scatter(1, load.expert_TK, load.weight_TK)
        return Journey(weight_TE.requires_grad_(), run, lambda gradient_TE: gradient_TE.gather(1, load.expert_TK))

    return build


JOURNEYS: dict[str, Callable[[Load], Journey]] = {
    "moe_dist": flat,
    "moe_dist hierarchical": hierarchical,
    "plain torch": plain_torch,
    "megatron alltoall": megatron("megatron"),
    "megatron allgather": megatron("megatron_allgather"),
}
