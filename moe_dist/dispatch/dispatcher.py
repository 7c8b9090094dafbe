"""Routing -> tokens grouped by expert on the rank that owns it, and back, by all-to-all over the expert-parallel group.

The journey of a row has three orders:
1. pairs in token order, as the router gives them;
2. slots of the send buffer: by chunk, then by owner rank, then by expert, then by token (one stable sort);
3. received rows of a chunk: by source rank, then by expert. These are the segments; experts take them as they come.

A chunk holds some of each rank's experts, so that the rows of one chunk can travel while those of another are computed.

Slots are laid out in one of two ways, as the routing asks. Packed: exactly the pairs there are, so that ranks must tell
each other how many rows come (one exchange of counts, one copy to the host). Padded, where `pairs_per_expert` is set:
that many slots for every expert from every rank, so that splits and shapes are known and neither is needed. Vacant pairs
(expert E) are in none of them.

Shape letters: T tokens, H hidden, E experts, P pairs, W slots in the send buffer, R rows received.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.dispatch.rows import slot_weights, slots_to_tokens, tokens_to_slots
from moe_dist.dispatch.types import Chunk, Journey, Plan, Segments, Ticket
from moe_dist.parallel.collectives import all_to_all_rows, start_all_to_all
from moe_dist.placement import ExpertMap
from moe_dist.routing.types import Routing


class AllToAllDispatcher(nn.Module):
    """Holds the map of experts and the group, and nothing between calls."""

    key_E1: torch.Tensor
    place_E: torch.Tensor

    def __init__(self, expert_map: ExpertMap, group: dist.ProcessGroup | None, num_chunks: int = 1) -> None:
        """See `moe_dist.layer.MoELayer`.

        Args:
            num_chunks: chunks of a dispatch; at most the largest number of experts of a rank.
        """
        super().__init__()
        self.group = group
        own_rank = dist.get_rank(group) if group is not None else 0
        ranks = dist.get_world_size(group) if group is not None else 1
        self.experts_of_rank = expert_map.num_experts_of_rank
        assert ranks == len(self.experts_of_rank), f"a map over {len(self.experts_of_rank)} ranks, a group of {ranks}"
        self.own_experts = self.experts_of_rank[own_rank]
        num_chunks = min(num_chunks, max(1, *self.experts_of_rank)) if group is not None else 1
        self.experts_of_chunk = [_cut(count, num_chunks) for count in self.experts_of_rank]
        """For each rank the number of its experts in each chunk."""
        self.own_chunks = self.experts_of_chunk[own_rank]
        place_of_key = self._place_of_key(num_chunks)
        # An expert's key is its place by chunk, then owner; its slot is its place by owner alone. Vacant pairs come last.
        self.num_experts = expert_map.num_experts
        key_E1 = torch.cat([torch.argsort(place_of_key)[expert_map.slot_E], torch.tensor([self.num_experts])])
        self.register_buffer("key_E1", key_E1, persistent=False)
        self.register_buffer("place_E", torch.argsort(place_of_key), persistent=False)

    def _place_of_key(self, num_chunks: int) -> torch.Tensor:
        """int64 [E]: experts by chunk, then owner -> their places by owner."""
        first_of_rank = [sum(self.experts_of_rank[:rank]) for rank in range(len(self.experts_of_rank))]
        places: list[int] = []
        for chunk in range(num_chunks):
            for first, counts in zip(first_of_rank, self.experts_of_chunk, strict=True):
                begin = first + sum(counts[:chunk])
                places += range(begin, begin + counts[chunk])
        return torch.tensor(places, dtype=torch.int64)

    def dispatch(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Segments, Ticket]:
        """Send each pair's row to the owner of its expert.

        Returns:
            rows [R, H] in arrival order, the segments that say which rows belong to which expert, and the ticket for
            `combine`.
        """
        journey = self.plan(routing, hidden_TH.shape[0])
        rows_WH = tokens_to_slots(hidden_TH, journey.plan)
        if routing.weight_on == "input":
            rows_WH = rows_WH * slot_weights(routing.weight_P, journey.plan).to(rows_WH.dtype)[:, None]
        parts = rows_WH.split([sum(chunk.send) for chunk in journey.chunks])
        rows_RH = _join(
            [all_to_all_rows(x, c.send, c.receive, self.group) for x, c in zip(parts, journey.chunks, strict=True)]
        )
        return rows_RH, journey.segments, Ticket(journey, routing.weight_P if routing.weight_on == "output" else None)

    def combine(self, rows_RH: torch.Tensor, ticket: Ticket) -> torch.Tensor:
        """[T, H]: bring the experts' outputs back and add them up per token, weighted."""
        chunks = ticket.journey.chunks
        parts = rows_RH.split([sum(chunk.receive) for chunk in chunks])
        rows_WH = _join([all_to_all_rows(x, c.receive, c.send, self.group) for x, c in zip(parts, chunks, strict=True)])
        return slots_to_tokens(rows_WH, ticket.weight_P, ticket.journey.plan)

    def plan(self, routing: Routing, num_tokens: int) -> Journey:
        """Decide the slots. Packed, the counts are under way when this returns; `Journey.chunks` waits for them."""
        return (
            self._packed(routing, num_tokens) if routing.pairs_per_expert is None else self._padded(routing, num_tokens)
        )

    def _packed(self, routing: Routing, num_tokens: int) -> Journey:
        key_P, order_P = _sort_by_expert(self.key_E1[routing.expert_P])
        slot_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
        edges = torch.arange(self.num_experts + 1, device=key_P.device, dtype=key_P.dtype)
        count_E = torch.searchsorted(key_P, edges).diff()[self.place_E]  # by owner, then expert
        own, ranks = self.own_experts, len(self.experts_of_rank)
        received, pending = count_E, None
        if self.group is not None:
            received = count_E.new_empty(ranks * own)
            pending = start_all_to_all("headers", count_E, self.experts_of_rank, received, [own] * ranks, self.group)

        @cache
        def finish() -> list[Chunk]:
            if pending is not None:
                pending.wait()
            counts = torch.cat([count_E, received]).tolist()  # the one copy to the host
            sent = _split(counts[: len(count_E)], self.experts_of_rank)
            return self._chunks(sent, _split(counts[len(count_E) :], [own] * ranks), equal=False)

        plan = Plan(num_tokens, routing.token_P, slot_P, routing.token_P[order_P])
        return Journey(plan, self.group, finish, equal=False)

    def _padded(self, routing: Routing, num_tokens: int) -> Journey:
        slots = routing.pairs_per_expert
        assert slots is not None
        num_slots = slots * self.num_experts
        key_P, order_P = _sort_by_expert(self.key_E1[routing.expert_P])
        first_P = torch.searchsorted(key_P, key_P)  # where the expert's pairs begin
        place_P = torch.arange(len(key_P), device=key_P.device) - first_P
        if key_P.device.type == "cpu":  # on a GPU a failed check would end the process
            fits = (place_P < slots) | (key_P == self.num_experts)
            torch._assert_async(fits.all(), "more pairs for an expert than slots")
        # Vacant pairs stand at slot W, which is cut off.
        slot_P = torch.empty_like(order_P).scatter_(0, order_P, key_P.long() * slots + place_P).clamp_(max=num_slots)
        token_W = slot_P.new_zeros(num_slots + 1).scatter_(0, slot_P, routing.token_P)[:-1]
        empty_W = slot_P.new_ones(num_slots + 1, dtype=torch.bool).scatter_(0, slot_P, False)[:-1]
        vacant_P = slot_P == num_slots
        slot_P = slot_P.masked_fill(vacant_P, 0)
        sent = [[slots] * experts for experts in self.experts_of_rank]
        chunks = self._chunks(sent, [[slots] * self.own_experts] * len(self.experts_of_rank), equal=True)
        plan = Plan(num_tokens, routing.token_P, slot_P, token_W, empty_W, vacant_P)
        return Journey(plan, self.group, lambda: chunks, equal=True)

    def _chunks(self, sent: list[list[int]], received: list[list[int]], equal: bool) -> list[Chunk]:
        """From the slots of each rank's experts, and the rows of this rank's experts from each rank."""
        chunks, first = [], 0
        for chunk, own in enumerate(self.own_chunks):
            send = [
                sum(counts[sum(cut[:chunk]) : sum(cut[: chunk + 1])])
                for counts, cut in zip(sent, self.experts_of_chunk, strict=True)
            ]
            arriving = [counts[first : first + own] for counts in received]
            experts = list(range(first, first + own)) * len(received)
            segments = Segments([n for counts in arriving for n in counts], experts, equal)
            chunks.append(Chunk(send, [sum(counts) for counts in arriving], segments))
            first += own
        return chunks


def _sort_by_expert(key_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in order and the stable order itself. 16-bit keys sort several times faster than 64-bit ones."""
    return torch.sort(key_P.to(torch.int16), stable=True)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(count: int, parts: int) -> list[int]:
    """`count` as a sum of `parts` numbers that differ by at most one."""
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


def _split(numbers: list[int], lengths: list[int]) -> list[list[int]]:
    """Consecutive blocks."""
    blocks, start = [], 0
    for length in lengths:
        blocks.append(numbers[start : start + length])
        start += length
    return blocks
