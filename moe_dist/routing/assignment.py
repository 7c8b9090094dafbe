"""Exactly balanced assignment of rows (tokens) to columns (experts), by shapes and scores alone.

Prices make the columns equally popular, rows take their best columns, what does not fit is placed elsewhere, and exchanges
along cycles of columns remove what that cost. Every comparison that decides is of single scores or of whole numbers, so
that no order of summation (threads, device, number of groups) can change a result. Nothing is differentiable.

Shape letters: G groups, R rows, C columns, N rows that lack columns, Q slots of a column (its capacity), I items.
"""

import torch

from moe_dist.routing.auction import auction, complete, first

__all__ = ["assign", "auction", "dual_prices"]

EXCHANGE_ROUNDS = 24
# Exchanges of a group end when a round gains less than this part of what its assignment is worth over a random one.
PERIOD = 3
NEGLIGIBLE = 2**-13
# Below every sum of 8 gains, each at most 2^24; two of it fit in 32 bits.
BLOCKED = -(2**29)


def dual_prices(
    score_GRC: torch.Tensor,
    per_row: int,
    capacity: int,
    iterations: int,
    start_GC: torch.Tensor | None = None,
    real_GR: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prices such that the top `per_row` of score - price of all rows fill no column much beyond `capacity`.

    Coordinate descent on the dual of the assignment's linear program, min over p of
    sum_r (sum of the top per_row of score_r - p) + capacity sum_c p_c: a row's price lies between its per_row-th and next
    value, then a column's between its capacity-th and next. (Quantile balancing, kexue.fm/archives/11619, takes the lower
    ends; the middle comes closer to the optimum where values are few or equal.) No host synchronisation.

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        start_GC: prices to start from; None for the mean score of each column.
        real_GR: bool, False for padding. None: all rows are real.

    Returns:
        [G, C] in the dtype of the scores. Where rows and capacities match exactly, only differences of prices matter; where
        there is room to spare, prices are at least 0 and columns that need not be full cost 0.
    """
    num_rows, num_columns = score_GRC.shape[1:]
    if real_GR is None:
        real_GR = score_GRC.new_ones(score_GRC.shape[:2], dtype=torch.bool)
    if per_row == num_columns or capacity >= num_rows:  # no column can overflow
        return score_GRC.new_zeros(score_GRC.shape[0], num_columns)
    score_GRC = score_GRC.masked_fill(~real_GR[:, :, None], 0)
    spare_G1 = per_row * real_GR.sum(1, keepdim=True) < num_columns * capacity
    price_GC = _column_means(score_GRC, real_GR) if start_GC is None else start_GC.to(score_GRC.dtype)
    price_GC = torch.where(spare_G1, price_GC - price_GC.amin(1, keepdim=True), price_GC)
    least_G1 = torch.where(spare_G1, 0.0, -torch.inf).to(score_GRC.dtype)
    score_GCR = score_GRC.masked_fill(~real_GR[:, :, None], -torch.inf).transpose(1, 2).contiguous()
    for _ in range(iterations):
        best_GRK = (score_GRC - price_GC[:, None]).topk(per_row + 1, dim=2).values
        row_price_GR = best_GRK[:, :, -2:].mean(2)
        best_GCK = (score_GCR - row_price_GR[:, None]).topk(capacity + 1, dim=2).values
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

    The same for each group whether alone or among others. Ties go to the lower row, then the lower column. Waits for the
    device once a pass of `complete` (2 to 8 as a rule), once every fourth round of exchanges (at most 6), and once if
    `real_GR` is given.

    Args:
        score_GRC: finite, float32 or float64; padding rows may hold anything.
        iterations: of `dual_prices`, which also says what `start_GC` is.
        real_GR: bool, False for padding rows, which get no column. None: all rows are real.

    Returns:
        Bool [G, R, C] and the prices [G, C] that the rows saw.
    """
    num_rows, num_columns = score_GRC.shape[1:]
    assert per_row <= num_columns, (per_row, num_columns)
    most_rows = num_rows if real_GR is None else int(real_GR.sum(1).max())
    assert most_rows * per_row <= num_columns * capacity, (most_rows, per_row, num_columns, capacity)
    if real_GR is None:
        real_GR = score_GRC.new_ones(score_GRC.shape[:2], dtype=torch.bool)
    price_GC = dual_prices(score_GRC, per_row, capacity, iterations, start_GC, real_GR)
    if per_row == num_columns:
        return real_GR[:, :, None].expand_as(score_GRC).clone(), price_GC
    value_GRC = score_GRC.masked_fill(~real_GR[:, :, None], 0) - price_GC[:, None]
    best_GRK = value_GRC.topk(per_row + 1, dim=2).values
    held_GRC = first(value_GRC, best_GRK[:, :, -2:-1], per_row) & real_GR[:, :, None]
    if capacity < num_rows:  # an overfull column keeps the rows that would lose most by their next best column
        surplus_GCR = torch.where(held_GRC, value_GRC - best_GRK[:, :, -1:], -torch.inf).transpose(1, 2).contiguous()
        least_GC1 = surplus_GCR.topk(capacity, dim=2).values[:, :, -1:]
        held_GRC &= first(surplus_GCR, least_GC1, capacity).transpose(1, 2)
    held_GRC = complete(value_GRC, held_GRC, per_row, capacity, real_GR)
    return exchange(value_GRC, -price_GC, held_GRC, capacity, real_GR), price_GC


def exchange(
    value_GRC: torch.Tensor, empty_GC: torch.Tensor, held_GRC: torch.Tensor, capacity: int, real_GR: torch.Tensor
) -> torch.Tensor:
    """Raise the sum of values by moving rows round cycles of columns, as many at once as still gain.

    An assignment is optimal if and only if no such cycle gains (cycle cancelling, Klein 1967). Columns are the nodes of a
    small graph: its edge a -> b is the most that one of the rows of a gains by moving to b. An empty slot moves like a row;
    `empty_GC` is its value in each column. Disjoint cycles never get in each other's way, even where they move the same
    row: it leaves different columns for different columns.
    """
    num_groups, num_rows, num_columns = value_GRC.shape
    device = value_GRC.device
    itself_GC = torch.arange(num_columns, device=device).expand(num_groups, -1)
    # Item num_rows is the empty slot.
    value_GIC = whole_numbers(torch.cat([value_GRC, empty_GC[:, None]], dim=1))[0]
    item_GCQ = _items_of_columns(held_GRC, capacity)
    # Row of value_GIC, all groups in one.
    first_G11 = (num_rows + 1) * torch.arange(num_groups, device=device)[:, None, None]
    worth_G = _worth(value_GIC, item_GCQ)
    active_G1 = torch.ones_like(worth_G, dtype=torch.bool)[:, None]
    gained_G = torch.zeros_like(worth_G, dtype=torch.int64)
    for step in range(EXCHANGE_ROUNDS):
        holds_GIC = _holders(item_GCQ, num_rows)
        own_GCQ = value_GIC.gather(1, item_GCQ.transpose(1, 2)).transpose(1, 2)
        open_GIC = torch.where(holds_GIC, BLOCKED, value_GIC).flatten(0, 1)
        gain_GCQC = open_GIC.index_select(0, (item_GCQ + first_G11).flatten()).view(*item_GCQ.shape, num_columns)
        gain_GCQC -= own_GCQ[..., None]
        before_GC = torch.where(active_G1, disjoint_cycles(gain_GCQC.amax(2)), itself_GC)
        after_GC = torch.empty_like(before_GC).scatter_(1, before_GC, itself_GC)
        gain_GCQ = gain_GCQC.gather(3, after_GC[:, :, None, None].expand(*item_GCQ.shape, 1))[..., 0]
        gain_GCQ, order_GCQ = gain_GCQ.sort(dim=2, descending=True, stable=True)
        item_GCQ = item_GCQ.gather(2, order_GCQ)
        # The q-th best rows of all columns of a cycle move together while their gains sum to more than 0.
        leader_GCQ = _leaders(before_GC)[:, :, None].expand_as(gain_GCQ)
        total_GCQ = torch.zeros_like(gain_GCQ, dtype=torch.int64).scatter_add_(1, leader_GCQ, gain_GCQ.long())
        moves_GCQ = (total_GCQ.gather(1, leader_GCQ) > 0) & (before_GC != itself_GC)[:, :, None]
        arriving_GCQ = item_GCQ.gather(1, before_GC[:, :, None].expand_as(item_GCQ))
        item_GCQ = torch.where(moves_GCQ, arriving_GCQ, item_GCQ)
        gained_G += torch.where(moves_GCQ, gain_GCQ, 0).sum((1, 2), dtype=torch.int64)
        if step % PERIOD == PERIOD - 1:
            active_G1 = (gained_G > worth_G * NEGLIGIBLE)[:, None]
            gained_G = torch.zeros_like(gained_G)
            if not active_G1.any():
                break
    return _holders(item_GCQ, num_rows)[:, :num_rows]


def disjoint_cycles(gain_GCC: torch.Tensor) -> torch.Tensor:
    """Cycles of columns with positive gains that share no column: the column before each on its cycle, or itself.

    Pairs first, each the best for both; then longer cycles among the rest, as Bellman-Ford's parents show them.
    """
    num_columns = gain_GCC.shape[1]
    column_C = torch.arange(num_columns, device=gain_GCC.device)
    before_GC = column_C.expand(gain_GCC.shape[:2])
    pair_GCC = gain_GCC + gain_GCC.transpose(1, 2)
    for _ in range(8):
        best_GC, partner_GC = pair_GCC.max(2)
        mutual_GC = (best_GC > 0) & (partner_GC.gather(1, partner_GC) == column_C)
        before_GC = torch.where(mutual_GC, partner_GC, before_GC)
        pair_GCC = pair_GCC.masked_fill(mutual_GC[:, :, None] | mutual_GC[:, None], BLOCKED)
    paired_GC = before_GC != column_C
    gain_GCC = gain_GCC.masked_fill(paired_GC[:, :, None] | paired_GC[:, None], BLOCKED)
    length_GC, parent_GC = torch.zeros_like(gain_GCC[:, 0]), column_C.expand_as(before_GC)
    for _ in range(8):
        longer_GC, from_GC = (length_GC[:, :, None] + gain_GCC).max(1)
        parent_GC = torch.where(longer_GC > length_GC, from_GC, parent_GC)
        length_GC = torch.maximum(longer_GC, length_GC)
    ancestor_GC = parent_GC
    for _ in range((num_columns - 1).bit_length()):
        ancestor_GC = ancestor_GC.gather(1, ancestor_GC)
    on_cycle_GC = torch.zeros_like(paired_GC).scatter_(1, ancestor_GC, True)  # a far ancestor of some column
    return torch.where(on_cycle_GC & ~paired_GC, parent_GC, before_GC)


def _leaders(before_GC: torch.Tensor) -> torch.Tensor:
    """The lowest column of each column's cycle."""
    leader_GC = torch.minimum(before_GC, torch.arange(before_GC.shape[1], device=before_GC.device))
    for _ in range((before_GC.shape[1] - 1).bit_length()):
        leader_GC = torch.minimum(leader_GC, leader_GC.gather(1, before_GC))
        before_GC = before_GC.gather(1, before_GC)
    return leader_GC


def _items_of_columns(held_GRC: torch.Tensor, capacity: int) -> torch.Tensor:
    """[G, C, Q] rows that each column holds, in order, then R for each empty slot."""
    num_groups, num_rows, num_columns = held_GRC.shape
    held_GCR = held_GRC.transpose(1, 2)
    slot_GCR = torch.where(held_GCR, held_GCR.cumsum(2) - 1, capacity)
    item_GCQ = torch.full((num_groups, num_columns, capacity + 1), num_rows, device=held_GRC.device)
    row_GCR = torch.arange(num_rows, device=held_GRC.device).expand_as(slot_GCR)
    return item_GCQ.scatter_(2, slot_GCR, row_GCR)[:, :, :capacity]


def _holders(item_GCQ: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Bool [G, R + 1, C]: which columns hold each row. The empty slot, item R, counts as held by none."""
    held_GIC = item_GCQ.new_zeros(item_GCQ.shape[0], num_rows + 1, item_GCQ.shape[1], dtype=torch.bool)
    held_GIC.scatter_(1, item_GCQ.transpose(1, 2), True)
    held_GIC[:, num_rows] = False
    return held_GIC


def _worth(value_GIC: torch.Tensor, item_GCQ: torch.Tensor) -> torch.Tensor:
    """float64 [G]: what the assignment is worth beyond the mean value of its columns."""
    own_GCQ = value_GIC.gather(1, item_GCQ.transpose(1, 2)).transpose(1, 2)
    mean_GC = value_GIC.sum(1, dtype=torch.int64) // value_GIC.shape[1]
    return (own_GCQ - mean_GC[:, :, None]).sum((1, 2)).to(torch.float64)


def whole_numbers(value_GRC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 multiples of 2^-23 of the group's largest magnitude, and that unit [G, 1, 1]: sums are exact in any order."""
    unit_G11 = value_GRC.abs().amax((1, 2), keepdim=True).clamp(min=1e-30) * 2.0**-23
    return (value_GRC / unit_G11).round().to(torch.int32), unit_G11


def _column_means(score_GRC: torch.Tensor, real_GR: torch.Tensor) -> torch.Tensor:
    whole_GRC, unit_G11 = whole_numbers(score_GRC)
    num_real_G1 = real_GR.sum(1, keepdim=True).clamp(min=1)
    return whole_GRC.sum(1, dtype=torch.int64).to(score_GRC.dtype) / num_real_G1 * unit_G11[:, 0]
