"""Exactly balanced assignment of rows (tokens) to columns (experts), by shapes and scores alone.

Prices make the columns equally popular, rows take their best columns, what does not fit is placed elsewhere, and exchanges
along cycles of columns remove what that cost. Every comparison that decides is of single scores or of whole numbers, so
that no order of summation (threads, device, number of groups) can change a result. Nothing is differentiable.

Shape letters: G groups, R rows, C columns, N rows that lack columns, Q slots of a column (its capacity), I items.
"""

import torch

EXCHANGE_ROUNDS = 24
# Exchanges of a group end when a round gains less than this part of what its assignment is worth over a random one.
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
    price_GC = _column_means(score_GRC) if start_GC is None else start_GC.to(score_GRC.dtype)
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


def first(value: torch.Tensor, threshold: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Bool: `count` entries of each line of the last dim, those above its threshold and then those equal to it by index."""
    above, equal = value > threshold, value == threshold
    left = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def complete(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, per_row: int, capacity: int, real_GR: torch.Tensor
) -> torch.Tensor:
    """Give every real row its `per_row` columns: by proposals to columns with room, and swaps where none is left to take.

    `held_GRC` must not exceed `per_row` or `capacity`. Of any two passes one places something, so that it ends.
    """
    total_before = None
    while True:
        lacking_GR = per_row * real_GR.to(torch.int32) - held_GRC.sum(2, dtype=torch.int32)
        room_GC = capacity - held_GRC.sum(1, dtype=torch.int32)
        num_rows, total = torch.stack([(lacking_GR > 0).sum(1).max(), lacking_GR.sum()]).tolist()
        if total == 0:
            return held_GRC
        step = _swap if total == total_before else _propose
        held_GRC = step(value_GRC, held_GRC, lacking_GR, room_GC, num_rows)
        total_before = total


def _propose(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Each row that lacks columns proposes to its best open ones; these take the rows that would lose most elsewhere."""
    num_columns = value_GRC.shape[2]
    row_GNC = _first_rows(lacking_GR > 0, num_rows)[:, :, None].expand(-1, -1, num_columns)
    lacking_GN1 = lacking_GR.gather(1, row_GNC[:, :, 0])[:, :, None].clamp(min=0)
    held_GNC, value_GNC = held_GRC.gather(1, row_GNC), value_GRC.gather(1, row_GNC)
    value_GNC = value_GNC.masked_fill(held_GNC | (room_GC == 0)[:, None] | (lacking_GN1 == 0), -torch.inf)
    sorted_GNC = value_GNC.sort(dim=2, descending=True).values
    least_GN1 = sorted_GNC.gather(2, (lacking_GN1 - 1).clamp(min=0).long())
    proposed_GNC = first(value_GNC, least_GN1, lacking_GN1) & (value_GNC > -torch.inf)
    # A row that proposes to all columns has a runner-up of its own; its surplus is infinite all the same if none is open.
    runner_up_GN1 = sorted_GNC.gather(2, lacking_GN1.clamp(max=num_columns - 1).long())
    surplus_GCN = torch.where(proposed_GNC, value_GNC - runner_up_GN1, -torch.inf).transpose(1, 2).contiguous()
    place_GC1 = (room_GC[:, :, None] - 1).clamp(0, num_rows - 1).long()
    least_GC1 = surplus_GCN.sort(dim=2, descending=True).values.gather(2, place_GC1)
    taken_GNC = first(surplus_GCN, least_GC1, room_GC[:, :, None]).transpose(1, 2) & proposed_GNC
    return held_GRC.scatter(1, row_GNC, held_GNC | taken_GNC)


def _swap(
    value_GRC: torch.Tensor, held_GRC: torch.Tensor, lacking_GR: torch.Tensor, room_GC: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Rows that lack a column but hold all open ones take one from rows that get the first open column j for it.

    Always possible. A row t that lacks one lacks only full columns, so that there are at least `capacity` other rows; j has
    fewer holders, and all rows that lack one hold it: some complete row d does not. d holds more columns than t, so one
    that t lacks.
    """
    num_columns = value_GRC.shape[2]
    open_G11 = (room_GC > 0).to(torch.int8).argmax(1)[:, None, None]
    open_GR1 = open_G11.expand(-1, value_GRC.shape[1], 1)
    holds_GR = held_GRC.gather(2, open_GR1)[:, :, 0]
    taker_GR = (lacking_GR > 0) & holds_GR
    donor_GR = (lacking_GR == 0) & ~holds_GR & held_GRC.any(2)
    worth_GR = torch.where(donor_GR, value_GRC.gather(2, open_GR1)[:, :, 0], -torch.inf)
    donor_GN = worth_GR.argsort(dim=1, descending=True, stable=True)[:, :num_rows]
    taker_GN = _first_rows(taker_GR, num_rows)
    pairs_G1 = torch.minimum(taker_GR.sum(1), donor_GR.sum(1)).minimum(room_GC.gather(1, open_G11[:, :, 0])[:, 0])[
        :, None
    ]
    paired_GN1 = (torch.arange(num_rows, device=value_GRC.device) < pairs_G1)[:, :, None]
    taker_GNC, donor_GNC = (row_GN[:, :, None].expand(-1, -1, num_columns) for row_GN in (taker_GN, donor_GN))
    movable_GNC = held_GRC.gather(1, donor_GNC) & ~held_GRC.gather(1, taker_GNC)
    gain_GNC = value_GRC.gather(1, taker_GNC) - value_GRC.gather(1, donor_GNC)
    moved_GN1 = torch.where(movable_GNC, gain_GNC, -torch.inf).argmax(2, keepdim=True)
    column_C = torch.arange(num_columns, device=value_GRC.device)
    moved_GNC, opened_GNC = (column_C == moved_GN1) & paired_GN1, (column_C == open_G11) & paired_GN1
    held_GRC = held_GRC.scatter(1, taker_GNC, held_GRC.gather(1, taker_GNC) | moved_GNC)
    return held_GRC.scatter(1, donor_GNC, (held_GRC.gather(1, donor_GNC) & ~moved_GNC) | opened_GNC)


def exchange(
    value_GRC: torch.Tensor,
    empty_GC: torch.Tensor,
    held_GRC: torch.Tensor,
    capacity: int,
    real_GR: torch.Tensor,
) -> torch.Tensor:
    return held_GRC
