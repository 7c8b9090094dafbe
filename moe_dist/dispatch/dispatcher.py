"""Routing -> tokens grouped by expert on the rank that owns it, and back, by all-to-all over the expert-parallel group.

The journey of a row has three orders:
1. pairs in token order, as the router gives them;
2. slots of the send buffer: by owner rank, then by expert, then by token (one stable sort);
3. received rows: by source rank, then by expert of this rank. These are the segments; experts take them as they come.

Slots are laid out in one of two ways, as the routing asks. Packed: exactly the pairs there are, so that ranks must tell
each other how many rows come (one exchange of counts, one copy to the host). Padded, where `pairs_per_expert` is set:
that many slots for every expert from every rank, so that splits and shapes are known and neither is needed.

Shape letters: T tokens, H hidden, E experts, P pairs, W slots in the send buffer, R rows received.
"""

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.dispatch.rows import slots_to_tokens, tokens_to_slots
from moe_dist.dispatch.types import Plan, Segments, Ticket
from moe_dist.parallel.collectives import all_to_all_counts, all_to_all_rows
from moe_dist.placement import ExpertMap
from moe_dist.routing.types import Routing


class AllToAllDispatcher(nn.Module):
    """Holds the map of experts and the group, and nothing between calls."""

    slot_of_E: torch.Tensor

    def __init__(self, expert_map: ExpertMap, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = group
        self.own_rank = dist.get_rank(group) if group is not None else 0
        self.experts_of_rank = expert_map.num_experts_of_rank
        ranks = dist.get_world_size(group) if group is not None else 1
        assert ranks == len(self.experts_of_rank), f"a map over {len(self.experts_of_rank)} ranks, a group of {ranks}"
        self.register_buffer("slot_of_E", expert_map.slot_E, persistent=False)

    def dispatch(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Segments, Ticket]:
        """Send each pair's row to the owner of its expert.

        Returns:
            rows [R, H] in arrival order, the segments that say which rows belong to which expert, and the ticket for
            `combine`.
        """
        plan_slots = self._packed if routing.pairs_per_expert is None else self._padded
        plan, send, sizes = plan_slots(routing, hidden_TH.shape[0])
        own, ranks = self.experts_of_rank[self.own_rank], len(self.experts_of_rank)
        receive = [sum(sizes[rank * own : (rank + 1) * own]) for rank in range(ranks)]
        rows_WH = tokens_to_slots(hidden_TH, plan)
        if routing.weight_on == "input":
            rows_WH = rows_WH * _slot_weights(routing.weight_P, plan).to(rows_WH.dtype)[:, None]
        rows_RH = all_to_all_rows(rows_WH, send, receive, self.group)
        weight_P = routing.weight_P if routing.weight_on == "output" else None
        segments = Segments(sizes=sizes, experts=list(range(own)) * ranks)
        return rows_RH, segments, Ticket(plan, weight_P, send, receive, self.group)

    def combine(self, rows_RH: torch.Tensor, ticket: Ticket) -> torch.Tensor:
        """[T, H]: bring the experts' outputs back and add them up per token, weighted."""
        rows_WH = all_to_all_rows(rows_RH, ticket.receive, ticket.send, ticket.group)
        return slots_to_tokens(rows_WH, ticket.weight_P, ticket.plan)

    def _packed(self, routing: Routing, num_tokens: int) -> tuple[Plan, list[int], list[int]]:
        """The plan, the slots for each rank, and the rows of each received segment."""
        key_P, order_P = _sort_by_expert(self.slot_of_E[routing.expert_P])
        slot_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        edges = torch.arange(len(self.slot_of_E) + 1, device=key_P.device, dtype=key_P.dtype)
        count_E = torch.searchsorted(key_P, edges).diff()  # by owner, then expert
        received = all_to_all_counts(count_E, self.experts_of_rank, self.group)
        counts = torch.cat([count_E, received]).tolist()  # the one copy to the host
        sent, sizes = counts[: len(count_E)], counts[len(count_E) :]
        plan = Plan(num_tokens, routing.token_P, slot_P, routing.token_P[order_P])
        return plan, _sums(sent, self.experts_of_rank), sizes

    def _padded(self, routing: Routing, num_tokens: int) -> tuple[Plan, list[int], list[int]]:
        slots = routing.pairs_per_expert
        assert slots is not None
        key_P, order_P = _sort_by_expert(self.slot_of_E[routing.expert_P])
        first_P = torch.searchsorted(key_P, key_P)  # where the expert's pairs begin
        place_P = torch.arange(len(key_P), device=key_P.device) - first_P
        slot_P = torch.empty_like(order_P).scatter_(0, order_P, key_P.long() * slots + place_P)
        num_slots = slots * len(self.slot_of_E)
        token_W = torch.zeros(num_slots, dtype=torch.int64, device=key_P.device).scatter_(0, slot_P, routing.token_P)
        empty_W = torch.ones(num_slots, dtype=torch.bool, device=key_P.device).scatter_(0, slot_P, False)
        plan = Plan(num_tokens, routing.token_P, slot_P, token_W, empty_W)
        own = self.experts_of_rank[self.own_rank]
        return plan, [slots * n for n in self.experts_of_rank], [slots] * (own * len(self.experts_of_rank))


def _sort_by_expert(key_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in order and the stable order itself. 16-bit keys sort several times faster than 64-bit ones."""
    return torch.sort(key_P.to(torch.int16), stable=True)


def _slot_weights(weight_P: torch.Tensor, plan: Plan) -> torch.Tensor:
    return weight_P.new_zeros(plan.token_W.shape[0]).scatter(0, plan.slot_P, weight_P)


def _sums(counts: list[int], lengths: list[int]) -> list[int]:
    """Sums of consecutive blocks of `counts`."""
    sums, start = [], 0
    for length in lengths:
        sums.append(sum(counts[start : start + length]))
        start += length
    return sums
