"""Exactly balanced assignment of rows (tokens) to columns (experts).

Prices make the columns about equally popular, rows take their best columns at these prices, what does not fit is placed
elsewhere, and exchanges round cycles of columns win back nearly all that this lost. Decisions compare single scores or sums
of whole numbers: no order of summation (threads, device, number of groups) can change a result. Nothing is differentiable.

Shape letters: G groups, R rows, C columns, K the best of them; in exchanges N nodes of the graph, Q slots of a node,
I items that fill slots, the last of them the empty slot.
"""

import torch
from torch.nn.functional import pad

from moe_dist.routing.auction import auction, complete, first

__all__ = ["assign", "auction", "dual_prices"]

EXCHANGE_ROUNDS = 24
# A group is done when two rounds gain less than this part of what its assignment is worth over a mean one.
NEGLIGIBLE = 2**-12
# Nodes that hold the empty slots where rows are the nodes: as many rows can trade with them at once.
EMPTY_NODES = 4
# Scores are at most 2^23 in size, gains 2^24. This is below any sum of 8 gains, and two of it still fit in 32 bits.
BLOCKED = -(2**29)


def dual_prices(
    score_GRC: torch.Tensor,
    per_row: int,
    capacity: int,
    iterations: int,
    start_GC: torch.Tensor | None = None,
    real_GR: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prices at which the top `per_row` of score - price of all rows fill no column much beyond `capacity`.

    Coordinate descent on the dual of the assignment's linear program: min over prices p of
    sum_r (sum of the top per_row of score_r - p) + capacity * sum_c p_c. A row's own price lies between its per_row-th and
    next best score - p, then a column's between its capacity-th and next best score - row price. Quantile balancing
    (kexue.fm/archives/11619) takes the lower end; the middle comes closer where scores are few or alike.

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        start_GC: prices to start from. None: the mean score of each column.
        real_GR: bool, False for padding rows. None: all rows are real.

    Returns:
        [G, C] in the dtype of the scores. Where rows fill all columns, only the differences between prices matter. Where
        there is room to spare, prices are at least 0, and 0 for columns that need not be full. No host synchronisation.
    """
    num_groups, num_rows, num_columns = score_GRC.shape
    if per_row == num_columns or capacity >= num_rows:  # no column can overflow
        return score_GRC.new_zeros(num_groups, num_columns)
    real_GR = score_GRC.new_ones(num_groups, num_rows, dtype=torch.bool) if real_GR is None else real_GR
    score_GRC = score_GRC.masked_fill(~real_GR[:, :, None], 0)
    price_GC = _column_means(score_GRC, real_GR) if start_GC is None else start_GC.to(score_GRC.dtype)
    # With room to spare for n whole columns, start with at least n free ones.
    spare_G1 = num_columns * capacity - per_row * real_GR.sum(1, keepdim=True)
    least_G1 = torch.where(spare_G1 > 0, 0.0, -torch.inf).to(score_GRC.dtype)
    free_G1 = price_GC.sort(dim=1).values.gather(1, (spare_G1 // capacity).clamp(0, num_columns - 1))
    price_GC = torch.maximum(price_GC - free_G1, least_G1)
    score_GCR = score_GRC.masked_fill(~real_GR[:, :, None], -torch.inf).transpose(1, 2).contiguous()
    for _ in range(iterations):
        best_GRK = (score_GRC - price_GC[:, None]).topk(per_row + 1, dim=2).values
        best_GCK = (score_GCR - best_GRK[:, None, :, -2:].mean(3)).topk(capacity + 1, dim=2).values
        price_GC = torch.maximum(best_GCK[:, :, -2:].mean(2), least_G1)
    return price_GC


def assign(
    score_GRC: torch.Tensor,
    per_row: int,
    capacity: int,
    iterations: int = 4,
    start_GC: torch.Tensor | None = None,
    real_GR: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each real row `per_row` columns and each column at most `capacity` rows, at nearly the highest sum of scores.

    A group's result is the same alone as among others. Ties go to the lower row, then the lower column. The host waits for
    the device once in each pass of `complete`, 3 to 8 of them as a rule, and after every second round of `exchange`, at
    most 12 times. The largest tensor is int32 [G, C, capacity, C].

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        iterations, start_GC: of `dual_prices`.
        real_GR: bool, False for padding rows, which get no column. None: all rows are real.

    Returns:
        Bool [G, R, C], and the prices [G, C].
    """
    num_groups, num_rows, num_columns = score_GRC.shape
    assert 1 <= per_row <= num_columns, (per_row, num_columns)
    assert capacity >= 1, capacity
    real_GR = score_GRC.new_ones(num_groups, num_rows, dtype=torch.bool) if real_GR is None else real_GR
    price_GC = dual_prices(score_GRC, per_row, capacity, iterations, start_GC, real_GR)
    value_GRC = score_GRC.masked_fill(~real_GR[:, :, None], 0) - price_GC[:, None]
    best_GRK = value_GRC.topk(min(per_row + 1, num_columns), dim=2).values
    held_GRC = first(value_GRC, best_GRK[:, :, per_row - 1 : per_row], per_row) & real_GR[:, :, None]
    if capacity < num_rows:  # an overfull column keeps the rows that would lose most by their next best column
        surplus_GCR = torch.where(held_GRC, value_GRC - best_GRK[:, :, -1:], -torch.inf).transpose(1, 2).contiguous()
        least_GC1 = surplus_GCR.topk(capacity, dim=2).values[:, :, -1:]
        held_GRC &= first(surplus_GCR, least_GC1, capacity).transpose(1, 2)
    held_GRC = complete(value_GRC, held_GRC, per_row, capacity, real_GR)
    return exchange(value_GRC, price_GC, held_GRC, per_row, capacity, real_GR), price_GC


def exchange(
    value_GRC: torch.Tensor,
    price_GC: torch.Tensor,
    held_GRC: torch.Tensor,
    per_row: int,
    capacity: int,
    real_GR: torch.Tensor,
) -> torch.Tensor:
    """Raise the sum of scores of a complete assignment by moving items round cycles of nodes.

    Cycle cancelling (Klein 1967): an assignment is optimal if and only if no such cycle gains. The nodes are the columns,
    or the rows where these are far fewer, and the graph is small: its edge a -> b is the most that one of the items of a
    gains by moving to b. A slot that stays empty is worth what a row of score 0 would be, -price. Where columns are the
    nodes it is an item, which a column can hold any number of; where rows are, more nodes hold the empty slots.
    """
    by_rows = value_GRC.shape[2] > 2 * value_GRC.shape[1]
    empty_GEC = -price_GC[:, None].expand(-1, EMPTY_NODES if by_rows else 1, -1)
    value_GIN = torch.cat([value_GRC, empty_GEC], dim=1)
    value_GIN = _whole_numbers(value_GIN - value_GIN.amax(2, keepdim=True))  # no exchange changes a row's level
    held_GIN, slots, closed_GN = held_GRC, capacity, torch.zeros_like(held_GRC[:, 0])
    if by_rows:
        value_GIN, slots = pad(value_GIN.transpose(1, 2), (0, 0, 0, 1)), per_row
        held_GIN, closed_GN = pad(held_GRC.transpose(1, 2), (0, EMPTY_NODES)), pad(~real_GR, (0, EMPTY_NODES))
    item_GNQ = _items_of_nodes(held_GIN, slots)
    worth_G = _worth(value_GIN, item_GNQ)
    active_G, gained_G = torch.ones_like(worth_G, dtype=torch.bool), torch.zeros_like(worth_G)
    for step in range(EXCHANGE_ROUNDS):
        held_GIN = _held(item_GNQ, value_GIN.shape[1])
        if by_rows:
            item_GNQ, held_GIN = _offer_empty_slots(value_GIN, item_GNQ, held_GIN, capacity)
        blocked_GIN = held_GIN | closed_GN[:, None]
        item_GNQ, gain_G = _exchange_once(value_GIN, item_GNQ, blocked_GIN, active_G, cycles_first=step % 2 == 1)
        gained_G += gain_G
        if step % 2 == 1:
            active_G = gained_G > worth_G * NEGLIGIBLE
            gained_G.zero_()
            if not active_G.any():
                break
    held_GIN = _held(item_GNQ, value_GIN.shape[1])[:, :-1]
    return held_GIN[:, :, :-EMPTY_NODES].transpose(1, 2) if by_rows else held_GIN


def _exchange_once(
    value_GIN: torch.Tensor,
    item_GNQ: torch.Tensor,
    blocked_GIN: torch.Tensor,
    active_G: torch.Tensor,
    cycles_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move items along disjoint cycles, on each as many at once as still gain: their new places, and gains int64 [G].

    Disjoint cycles never get in each other's way, even where they move the same item: it leaves different nodes for
    different nodes.
    """
    num_groups, num_items, num_nodes = value_GIN.shape
    itself_GN = torch.arange(num_nodes, device=value_GIN.device).expand(num_groups, -1)
    first_G11 = num_items * torch.arange(num_groups, device=value_GIN.device)[:, None, None]
    elsewhere_XN = torch.where(blocked_GIN, BLOCKED, value_GIN).flatten(0, 1)
    gain_GNQN = elsewhere_XN.index_select(0, (item_GNQ + first_G11).flatten()).view(*item_GNQ.shape, num_nodes)
    gain_GNQN -= _own_values(value_GIN, item_GNQ)[..., None]
    edge_GNN, before_GN = gain_GNQN.amax(2), itself_GN
    for add in (_add_cycles, _add_pairs) if cycles_first else (_add_pairs, _add_cycles):
        before_GN = add(edge_GNN, before_GN)
    before_GN = torch.where(active_G[:, None], before_GN, itself_GN)
    after_GN = torch.empty_like(before_GN).scatter_(1, before_GN, itself_GN)
    gain_GNQ = gain_GNQN.gather(3, after_GN[:, :, None, None].expand(*item_GNQ.shape, 1))[..., 0]
    gain_GNQ, order_GNQ = gain_GNQ.sort(dim=2, descending=True, stable=True)
    item_GNQ = item_GNQ.gather(2, order_GNQ)
    # The q-th best items of all nodes of a cycle move together if their gains sum to more than 0.
    leader_GNQ = _leaders(before_GN)[:, :, None].expand_as(gain_GNQ)
    total_GNQ = torch.zeros_like(item_GNQ).scatter_add_(1, leader_GNQ, gain_GNQ.long()).gather(1, leader_GNQ)
    moves_GNQ = (total_GNQ > 0) & (before_GN != itself_GN)[:, :, None]
    arriving_GNQ = item_GNQ.gather(1, before_GN[:, :, None].expand_as(item_GNQ))
    gain_G = torch.where(moves_GNQ, gain_GNQ, 0).sum((1, 2), dtype=torch.int64)
    return torch.where(moves_GNQ, arriving_GNQ, item_GNQ), gain_G


def _add_pairs(edge_GNN: torch.Tensor, before_GN: torch.Tensor) -> torch.Tensor:
    """Add cycles of two free nodes, each the other's best, that gain. `before_GN`: the node before each on its cycle."""
    node_N = torch.arange(edge_GNN.shape[1], device=edge_GNN.device)
    taken_GN = before_GN != node_N
    pair_GNN = edge_GNN + edge_GNN.transpose(1, 2)
    for _ in range(4):
        pair_GNN = pair_GNN.masked_fill(taken_GN[:, :, None] | taken_GN[:, None], BLOCKED)
        best_GN, partner_GN = pair_GNN.max(2)
        taken_GN = (best_GN > 0) & (partner_GN.gather(1, partner_GN) == node_N)
        before_GN = torch.where(taken_GN, partner_GN, before_GN)
    return before_GN


def _add_cycles(edge_GNN: torch.Tensor, before_GN: torch.Tensor) -> torch.Tensor:
    """Add cycles of any length, of free nodes, that gain: those among the parents of Bellman-Ford's longest paths."""
    node_N = torch.arange(edge_GNN.shape[1], device=edge_GNN.device)
    taken_GN = before_GN != node_N
    edge_GNN = edge_GNN.masked_fill(taken_GN[:, :, None] | taken_GN[:, None], BLOCKED)
    length_GN, parent_GN = torch.zeros_like(edge_GNN[:, 0]), node_N.expand_as(before_GN)
    for _ in range(8):
        longer_GN, from_GN = (length_GN[:, :, None] + edge_GNN).max(1)
        parent_GN = torch.where(longer_GN > length_GN, from_GN, parent_GN)
        length_GN = torch.maximum(longer_GN, length_GN)
    ancestor_GN = parent_GN
    for _ in range((len(node_N) - 1).bit_length()):
        ancestor_GN = ancestor_GN.gather(1, ancestor_GN)
    # Far ancestors are on a cycle, if only with themselves.
    on_cycle_GN = torch.zeros_like(taken_GN).scatter_(1, ancestor_GN, True) & ~taken_GN
    return torch.where(on_cycle_GN, parent_GN, before_GN)


def _leaders(before_GN: torch.Tensor) -> torch.Tensor:
    """The lowest node of each node's cycle."""
    leader_GN = torch.minimum(before_GN, torch.arange(before_GN.shape[1], device=before_GN.device))
    for _ in range((before_GN.shape[1] - 1).bit_length()):
        leader_GN = torch.minimum(leader_GN, leader_GN.gather(1, before_GN))
        before_GN = before_GN.gather(1, before_GN)
    return leader_GN


def _offer_empty_slots(
    value_GIN: torch.Tensor, item_GNQ: torch.Tensor, held_GIN: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Deal the columns with room, those that rows want most, to the last nodes. These take any column, and all they like."""
    num_groups, _, slots = item_GNQ.shape
    none, offers = value_GIN.shape[1] - 1, EMPTY_NODES * slots
    open_GI = held_GIN[:, :none, :-EMPTY_NODES].sum(2) < capacity
    most_GI = torch.where(held_GIN, BLOCKED, value_GIN)[:, :none, :-EMPTY_NODES].amax(2)
    wanted_GI = torch.where(open_GI, most_GI - value_GIN[:, :none, -1], BLOCKED)
    best_GI, offered_GI = wanted_GI.sort(dim=1, descending=True, stable=True)
    offered_GI = torch.where(best_GI > BLOCKED // 2, offered_GI, none)
    offered_GI = pad(offered_GI, (0, max(0, offers - none)), value=none)[:, :offers]
    item_GNQ[:, -EMPTY_NODES:] = offered_GI.view(num_groups, slots, EMPTY_NODES).transpose(1, 2)
    held_GIN[:, :, -EMPTY_NODES:] = False
    held_GIN[:, none] = True  # no row takes a missing offer
    return item_GNQ, held_GIN


def _items_of_nodes(held_GIN: torch.Tensor, slots: int) -> torch.Tensor:
    """int64 [G, N, Q]: the items that each node holds, in order, then the empty slot."""
    num_groups, num_items, num_nodes = held_GIN.shape
    held_GNI = held_GIN.transpose(1, 2)
    slot_GNI = torch.where(held_GNI, held_GNI.cumsum(2) - 1, slots)
    item_GNQ = torch.full((num_groups, num_nodes, slots + 1), num_items, device=held_GIN.device)
    item_GNI = torch.arange(num_items, device=held_GIN.device).expand_as(slot_GNI)
    return item_GNQ.scatter_(2, slot_GNI, item_GNI)[:, :, :slots]


def _held(item_GNQ: torch.Tensor, num_items: int) -> torch.Tensor:
    """Bool [G, I, N]: which nodes hold each item. The empty slot counts as held by none."""
    held_GIN = item_GNQ.new_zeros(item_GNQ.shape[0], num_items, item_GNQ.shape[1], dtype=torch.bool)
    held_GIN.scatter_(1, item_GNQ.transpose(1, 2), True)
    held_GIN[:, -1] = False
    return held_GIN


def _own_values(value_GIN: torch.Tensor, item_GNQ: torch.Tensor) -> torch.Tensor:
    return value_GIN.gather(1, item_GNQ.transpose(1, 2)).transpose(1, 2)


def _worth(value_GIN: torch.Tensor, item_GNQ: torch.Tensor) -> torch.Tensor:
    """int64 [G]: what the assignment is worth beyond the mean values of its nodes, at least 0."""
    mean_GN = value_GIN.sum(1, dtype=torch.int64) // value_GIN.shape[1]
    return (_own_values(value_GIN, item_GNQ) - mean_GN[:, :, None]).sum((1, 2)).clamp(min=0)


def _whole_numbers(value_GRC: torch.Tensor) -> torch.Tensor:
    """int32 in units of 2^-23 of the group's largest magnitude: sums are exact, in any order."""
    return (value_GRC / _unit(value_GRC)).round().to(torch.int32)


def _unit(value_GRC: torch.Tensor) -> torch.Tensor:
    return value_GRC.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) * 2.0**-23


def _column_means(score_GRC: torch.Tensor, real_GR: torch.Tensor) -> torch.Tensor:
    total_GC = _whole_numbers(score_GRC).sum(1, dtype=torch.int64).to(score_GRC.dtype) * _unit(score_GRC)[:, 0]
    return total_GC / real_GR.sum(1, keepdim=True).clamp(min=1)
