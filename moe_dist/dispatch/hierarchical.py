"""Hierarchical all-to-all: between nodes, where a token crosses once for each node it is needed on, then inside the node.

An exchange is what stands around a dispatcher that works inside a node:

    hidden_UH, routing_U, ticket = exchange.send(hidden_TH, routing)
    out_UH = the layer on hidden_UH by routing_U, over exchange.inner_group with exchange.inner_map
    out_TH = exchange.bring_back(out_UH, ticket)

`send` brings to this rank the tokens of other nodes' ranks (of the same place on their node), and of its own, that some
expert of its node takes: U rows, one for each (token, node). With them come their pairs, as an ordinary routing over the
experts of the node, so that the dispatcher fans the tokens out inside the node and returns sums weighted over the node's
experts. `bring_back` adds these up over the nodes. So a row crosses once each way, however many of its experts are there.

Collectives between nodes, without padding: one of counts and one of the pairs' weights and experts beside the rows there and
the rows back; in backward the rows and the gradients of the weights, and the rows. Weights and experts travel as one
tensor: numbers of experts are exact in float32, and to pack them into the rows would copy every row and, in bfloat16,
change its width. Where `pairs_per_expert` is set, every slot travels (which of them share a token would have to be counted
and told), splits are known, weights stay at home and only rows travel: one all-to-all each way.

Shape letters: T tokens, H hidden, E experts, P pairs, V (token, node) incidences of this rank's tokens, U rows it takes for
its node, Q pairs that come with them, N nodes.
"""

from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.dispatch.dispatcher import AllToAllDispatcher
from moe_dist.dispatch.rows import slots_to_tokens, tokens_to_slots
from moe_dist.dispatch.types import Hop, Plan, Ticket
from moe_dist.parallel.collectives import all_to_all, all_to_all_rows
from moe_dist.parallel.groups import NodeGroups
from moe_dist.placement import ExpertMap
from moe_dist.routing.types import Routing


@dataclass(frozen=True)
class ExchangeTicket:
    """What `bring_back` needs."""

    plan: Plan
    """Its pairs are (token, node)."""
    send: list[int]
    """Rows for each node."""
    receive: list[int]
    """Rows from each node."""


class HierarchicalExchange(nn.Module):
    """Holds where experts are and the groups, and nothing between calls; layers may share one.

    Attributes:
        inner_map: the experts of this node, numbered by owner and then by place, and the ranks of the node that own them.
        inner_group: the ranks of this node; None where it is one.
    """

    node_E: torch.Tensor
    number_E: torch.Tensor

    def __init__(self, expert_map: ExpertMap, groups: NodeGroups) -> None:
        """`expert_map` is over the ranks of the expert-parallel group that `groups` split."""
        super().__init__()
        size, owners = groups.ranks_per_node, expert_map.experts_of_rank
        blocks = [owners[first : first + size] for first in range(0, len(owners), size)]
        nodes = ExpertMap(tuple(tuple(chain.from_iterable(block)) for block in blocks))
        edges = accumulate((len(experts) for experts in blocks[groups.node]), initial=0)
        self.inner_map = ExpertMap(tuple(tuple(range(first, end)) for first, end in pairwise(edges)))
        self.group, self.inner_group = groups.between, groups.inside
        self.padded = AllToAllDispatcher(nodes, groups.between)
        node_E, number_E = (torch.empty(expert_map.num_experts, dtype=torch.int64) for _ in range(2))
        for node, experts in enumerate(nodes.experts_of_rank):
            node_E[list(experts)] = node
            number_E[list(experts)] = torch.arange(len(experts))
        self.register_buffer("node_E", node_E, persistent=False)
        self.register_buffer("number_E", number_E, persistent=False)

    def send(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing, ExchangeTicket | Ticket]:
        """Bring tokens to the nodes of their experts.

        Returns:
            rows [U, H] by source node, their routing over `inner_map`, and the ticket for `bring_back`.
        """
        if routing.pairs_per_expert is not None:
            return self._send_slots(hidden_TH, routing)
        pairs = _sort_by_node(routing, self.node_E, dist.get_world_size(self.group))
        counts_N2 = torch.stack([pairs.rows_N, pairs.pairs_N], 1)
        ones = [1] * len(counts_N2)
        received_N2 = all_to_all("headers", counts_N2, ones, ones, self.group)
        counts = torch.cat([counts_N2, received_N2]).t().tolist()  # the one copy to the host
        (send, receive), (send_pairs, receive_pairs) = ([row[: len(ones)], row[len(ones) :]] for row in counts)
        plan = _plan(hidden_TH.shape[0], routing.token_P, pairs, sum(send))
        label_P = (self.number_E[routing.expert_P[pairs.order_P]] * 2).add_(pairs.first_P)
        hidden_UH, weight_Q, label_Q = _SendRowsAndPairs.apply(
            tokens_to_slots(hidden_TH, plan),
            routing.weight_P,
            pairs.order_P,
            label_P,
            (send, receive),
            (send_pairs, receive_pairs),
            self.group,
        )
        row_Q, expert_Q = (label_Q % 2).cumsum(0) - 1, label_Q // 2
        routing_U = Routing(row_Q, expert_Q, weight_Q, self._load(expert_Q), weight_on=routing.weight_on)
        return hidden_UH, routing_U, ExchangeTicket(plan, send, receive)

    def bring_back(self, out_UH: torch.Tensor, ticket: ExchangeTicket | Ticket) -> torch.Tensor:
        """[T, H]: rows return to the rank they came from and are added up over the nodes of each token."""
        if isinstance(ticket, Ticket):
            return self.padded.combine(out_UH, ticket)
        rows_VH = all_to_all_rows(out_UH, ticket.receive, ticket.send, self.group)
        return slots_to_tokens(rows_VH, None, ticket.plan)

    def hop(self, ticket: ExchangeTicket | Ticket) -> Hop:
        """Rows to and from each node, whose rank of the same place takes and gives them."""
        return ticket.journey.hop if isinstance(ticket, Ticket) else Hop(self.group, ticket.send, ticket.receive)

    def _send_slots(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing, Ticket]:
        """All slots of a node in one message. Weights are applied at home, so that inside the node they are 1."""
        assert routing.pairs_per_expert is not None
        rows_UH, _, ticket = self.padded.dispatch(hidden_TH, routing)
        slot_U = torch.arange(len(rows_UH), device=rows_UH.device)
        expert_U = slot_U // max(1, routing.pairs_per_expert) % max(1, self.inner_map.num_experts)
        routing_U = Routing(
            token_P=slot_U,
            expert_P=expert_U,
            weight_P=routing.weight_P.new_ones(len(rows_UH)),
            load_E=self._load(expert_U),
            pairs_per_expert=routing.pairs_per_expert * dist.get_world_size(self.group),
        )
        return rows_UH, routing_U, ticket

    def _load(self, expert_Q: torch.Tensor) -> torch.Tensor:
        load_E = torch.zeros(self.inner_map.num_experts, dtype=torch.int64, device=expert_Q.device)
        return load_E.scatter_add_(0, expert_Q, torch.ones_like(expert_Q))


@dataclass(frozen=True)
class _PairsByNode:
    """The pairs of this rank sorted by node, in token order inside each, and the rows that they share."""

    order_P: torch.Tensor
    """int64: the sorted pairs."""
    first_P: torch.Tensor
    """bool, sorted: whether the pair is the first of its token on its node."""
    row_P: torch.Tensor
    """int64, sorted: the row of the send buffer that holds its token."""
    pairs_N: torch.Tensor
    rows_N: torch.Tensor


def _sort_by_node(routing: Routing, node_E: torch.Tensor, num_nodes: int) -> _PairsByNode:
    node_P, order_P = torch.sort(node_E[routing.expert_P].to(torch.int16), stable=True)
    token_P = routing.token_P[order_P]
    first_P = torch.ones_like(node_P, dtype=torch.bool)
    first_P[1:] = (node_P[1:] != node_P[:-1]) | (token_P[1:] != token_P[:-1])
    num_rows_P = first_P.cumsum(0)
    edge_N = torch.searchsorted(node_P, torch.arange(num_nodes + 1, device=node_P.device, dtype=node_P.dtype))
    rows_before = torch.cat([num_rows_P.new_zeros(1), num_rows_P])[edge_N]
    return _PairsByNode(order_P, first_P, num_rows_P - 1, edge_N.diff(), rows_before.diff())


def _plan(num_tokens: int, token_P: torch.Tensor, pairs: _PairsByNode, num_rows: int) -> Plan:
    """Each (token, node) stands for its first pair: in the order of the pairs, which is that of tokens, and in slots."""
    is_first_P = torch.empty_like(pairs.first_P).scatter_(0, pairs.order_P, pairs.first_P)
    row_P = torch.empty_like(pairs.row_P).scatter_(0, pairs.order_P, pairs.row_P)
    first_V = torch.nonzero_static(is_first_P, size=num_rows).flatten()
    sorted_V = torch.nonzero_static(pairs.first_P, size=num_rows).flatten()
    return Plan(num_tokens, token_P[first_V], row_P[first_V], token_P[pairs.order_P[sorted_V]])


class _SendRowsAndPairs(torch.autograd.Function):
    """One function, so that on every rank the collectives of backward are called in the same order."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_VH: torch.Tensor,
        weight_P: torch.Tensor,
        order_P: torch.Tensor,
        label_P: torch.Tensor,
        rows: tuple[list[int], list[int]],
        pairs: tuple[list[int], list[int]],
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(order_P)
        ctx.rows, ctx.pairs, ctx.group = rows, pairs, group
        pairs_P2 = torch.stack([weight_P[order_P], label_P.to(weight_P.dtype)], 1)
        weight_Q, label_Q = all_to_all("headers", pairs_P2, *pairs, group).unbind(1)
        label_Q = label_Q.long()
        ctx.mark_non_differentiable(label_Q)
        return all_to_all("rows", rows_VH, *rows, group), weight_Q.contiguous(), label_Q

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order_P,) = ctx.saved_tensors
        grad_UH, grad_weight_Q, _ = grads
        (send, receive), (send_pairs, receive_pairs) = ctx.rows, ctx.pairs
        grad_VH = all_to_all("rows", grad_UH, receive, send, ctx.group)
        grad_sorted_P = all_to_all("headers", grad_weight_Q, receive_pairs, send_pairs, ctx.group)
        grad_P = torch.empty_like(grad_sorted_P).scatter_(0, order_P, grad_sorted_P)
        return grad_VH, grad_P, None, None, None, None, None
