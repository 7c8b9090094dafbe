"""Iterations of the balanced routers, one program for each routing group, all iterations in one launch.

A program reads the scores of its group again in each pass over them, from cache, so that a group is limited in size; what
the passes pass on stays in registers, or for row prices in a scratch row. In torch an iteration is several launches.

Shape letters: G groups, R rows (tokens), C columns (experts).
"""

import torch
import triton
import triton.language as tl

from moe_dist.kernels.checks import check, require
from moe_dist.kernels.order import LOWEST, key_of, value_of

LARGEST_GROUP = 2**18
"""Rows x columns of a group: 1 MiB of scores, which one multiprocessor reads some hundred times."""
TILE = 4096


def sinkhorn_prices(
    logits_GRC: torch.Tensor, top_k: int, epsilon: float, iterations: int, real_GR: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 [G, C]: see moe_dist.routing.sinkhorn.sinkhorn_prices, for groups that lie on one rank.

    Args:
        logits_GRC: float32; padding rows may hold anything.
        real_GR: bool, False for padding. None: all rows are real.

    Raises:
        ValueError: a shape, type or device is none of these, or a group has more than 2^18 logits (torch takes larger ones).
    """
    num_groups, num_rows, num_columns = _check_groups("logits_GRC", logits_GRC, real_GR)
    require("top_k", top_k, 1 <= top_k <= num_columns, f"from 1 to {num_columns}")
    price_GC = logits_GRC.new_empty(num_groups, num_columns)
    if price_GC.numel():
        block_r, block_c = _tile(num_rows, num_columns)
        _sinkhorn_kernel[(num_groups,)](
            *(logits_GRC, _bytes(real_GR), price_GC, num_rows, num_columns, *logits_GRC.stride()[:2]),
            *(float(top_k), float(epsilon), iterations),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=8,
        )
    return price_GC


def dual_iterations(
    score_GRC: torch.Tensor,
    price_GC: torch.Tensor,
    least_G: torch.Tensor,
    per_row: int,
    capacity: int,
    iterations: int,
    real_GR: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [G, C]: the loop of moe_dist.routing.assignment.dual_prices, bit for bit.

    A row's price is the mean of its per_row-th and next best score - price; a column's then the mean of its capacity-th and
    next best score - row price, at least `least`. The best of a row are taken one by one; those of a column are found by
    halving the range of float32 32 times.

    Args:
        score_GRC: float32; padding rows may hold anything.
        price_GC: float32, to start from.
        least_G: float32, 0 or -inf.
        real_GR: bool, False for padding. None: all rows are real.

    Raises:
        ValueError: a shape, type or device is none of these, per_row is not below C or capacity not below R, or a group has
            more than 2^18 scores (torch takes larger ones).
    """
    num_groups, num_rows, num_columns = _check_groups("score_GRC", score_GRC, real_GR)
    check("price_GC", price_GC, (num_groups, num_columns), (torch.float32,), score_GRC)
    check("least_G", least_G, (num_groups,), (torch.float32,), score_GRC)
    require("per_row", per_row, 1 <= per_row < num_columns, f"from 1 to {num_columns - 1}")
    require("capacity", capacity, 1 <= capacity < num_rows, f"from 1 to {num_rows - 1}")
    new_price_GC = price_GC.contiguous().clone()
    if num_groups and iterations:
        block_r, block_c = _tile(num_rows, num_columns)
        row_price_GR = score_GRC.new_empty(num_groups, num_rows)
        _dual_kernel[(num_groups,)](
            *(score_GRC, _bytes(real_GR), least_G, row_price_GR, new_price_GC),
            *(num_rows, num_columns, *score_GRC.stride()[:2], per_row, capacity, iterations),
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=8,
        )
    return new_price_GC


def _check_groups(name: str, score_GRC: torch.Tensor, real_GR: torch.Tensor | None) -> tuple[int, int, int]:
    check(name, score_GRC, (None, None, None), (torch.float32,))
    num_groups, num_rows, num_columns = score_GRC.shape
    size = num_rows * triton.next_power_of_2(num_columns)
    require(f"rows x columns (a power of 2) of {name}", size, size <= LARGEST_GROUP, f"at most {LARGEST_GROUP}")
    require("columns", num_columns, num_columns <= TILE, f"at most {TILE}")
    if real_GR is not None:
        check("real_GR", real_GR, (num_groups, num_rows), (torch.bool,), score_GRC)
    return num_groups, num_rows, num_columns


def _tile(num_rows: int, num_columns: int) -> tuple[int, int]:
    block_c = triton.next_power_of_2(num_columns)
    return min(TILE // block_c, triton.next_power_of_2(max(1, num_rows))), block_c


def _bytes(real_GR: torch.Tensor | None) -> torch.Tensor | None:
    return None if real_GR is None else real_GR.contiguous().view(torch.uint8)


@triton.jit
def _load_rows(
    score_ptr, real_ptr, first, num_rows, num_columns, row_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A tile of scores (0 where there are none), which of its elements exist, and which of its rows are real."""
    row_R, column_C = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    real_R = row_R < num_rows
    inside_RC = real_R[:, None] & (column_C < num_columns)[None, :]
    score_RC = tl.load(score_ptr + row_R.to(tl.int64)[:, None] * row_stride + column_C[None, :], inside_RC, other=0.0)
    if real_ptr is not None:
        real_R &= tl.load(real_ptr + row_R, real_R, other=0) != 0
    return score_RC, inside_RC, real_R


@triton.jit
def _scale(logits_ptr, real_ptr, num_rows, num_columns, row_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Number of real rows, and the standard deviation of their logits, by sums in float64."""
    count = 0
    sum_C, square_C = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, num_rows, BLOCK_R):
        logits_RC, inside_RC, real_R = _load_rows(
            logits_ptr, real_ptr, first, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
        )
        value_RC = tl.where(inside_RC & real_R[:, None], logits_RC, 0.0).to(tl.float64)
        count += tl.sum(real_R.to(tl.int32), 0)
        sum_C += tl.sum(value_RC, 0)
        square_C += tl.sum(value_RC * value_RC, 0)
    values = tl.maximum(count * num_columns, 1).to(tl.float64)
    mean = tl.sum(sum_C, 0) / values
    variance = tl.sum(square_C, 0) / values - mean * mean
    return count, tl.sqrt(tl.maximum(variance, 1e-12)).to(tl.float32)


@triton.jit
def _sinkhorn_kernel(
    logits_ptr,
    real_ptr,
    price_ptr,
    num_rows,
    num_columns,
    group_stride,
    row_stride,
    top_k,
    epsilon,
    iterations,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    logits_ptr += group * group_stride
    if real_ptr is not None:
        real_ptr += group * num_rows
    count, deviation = _scale(logits_ptr, real_ptr, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C)
    scale = epsilon * deviation
    target = tl.log(top_k * tl.maximum(count, 1).to(tl.float32) / num_columns)
    column_C = tl.zeros((BLOCK_C,), tl.float32)
    for _iteration in range(iterations):
        # log-sum-exp over the rows as they come: the highest so far, and the sum relative to it.
        highest_C, sum_C = tl.full((BLOCK_C,), float("-inf"), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, num_rows, BLOCK_R):
            logits_RC, inside_RC, real_R = _load_rows(
                logits_ptr, real_ptr, first, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
            )
            value_RC = tl.where(inside_RC & real_R[:, None], logits_RC / scale + column_C[None, :], float("-inf"))
            best_R = tl.where(real_R, tl.max(value_RC, 1), 0.0)
            row_R = tl.log(top_k) - best_R - tl.log(tl.sum(tl.exp(value_RC - best_R[:, None]), 1))
            value_RC = tl.where(inside_RC & real_R[:, None], logits_RC / scale + row_R[:, None], float("-inf"))
            new_C = tl.maximum(highest_C, tl.max(value_RC, 0))
            base_C = tl.where(new_C == float("-inf"), 0.0, new_C)
            sum_C = sum_C * tl.exp(highest_C - base_C) + tl.sum(tl.exp(value_RC - base_C[None, :]), 0)
            highest_C = new_C
        column_C = target - tl.where(sum_C > 0, highest_C + tl.log(sum_C), 0.0)
    c_C = tl.arange(0, BLOCK_C)
    tl.store(price_ptr + group * num_columns + c_C, -column_C * scale, c_C < num_columns)


@triton.jit
def _dual_kernel(
    score_ptr,
    real_ptr,
    least_ptr,
    row_price_ptr,
    price_ptr,
    num_rows,
    num_columns,
    group_stride,
    row_stride,
    per_row,
    capacity,
    iterations,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    score_ptr += group * group_stride
    row_price_ptr += group * num_rows
    if real_ptr is not None:
        real_ptr += group * num_rows
    c_C = tl.arange(0, BLOCK_C)
    price_ptr += group * num_columns + c_C
    least = tl.load(least_ptr + group)
    price_C = tl.load(price_ptr, c_C < num_columns, other=0.0)
    for _iteration in range(iterations):
        for first in range(0, num_rows, BLOCK_R):
            score_RC, inside_RC, real_R = _load_rows(
                score_ptr, real_ptr, first, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
            )
            key_RC = tl.where(inside_RC & real_R[:, None], key_of(score_RC - price_C[None, :]), LOWEST)
            upper_R = tl.full((BLOCK_R,), LOWEST, tl.int32)
            for _choice in range(per_row):
                upper_R, at_R = tl.max(key_RC, 1, return_indices=True)
                key_RC = tl.where(c_C[None, :] == at_R[:, None], LOWEST, key_RC)
            row_price_R = (value_of(upper_R) + value_of(tl.max(key_RC, 1))) * 0.5
            row_R = first + tl.arange(0, BLOCK_R)
            tl.store(row_price_ptr + row_R, row_price_R, row_R < num_rows)
        # What some threads wrote others read below, and write again in the next iteration.
        tl.debug_barrier()
        upper_C, lower_C = _column_order(
            *(score_ptr, real_ptr, row_price_ptr, num_rows, num_columns, row_stride, capacity, BLOCK_R, BLOCK_C)
        )
        price_C = tl.maximum((value_of(upper_C) + value_of(lower_C)) * 0.5, least)
        tl.debug_barrier()
    tl.store(price_ptr, price_C, c_C < num_columns)


@triton.jit
def _column_order(
    score_ptr,
    real_ptr,
    row_price_ptr,
    num_rows,
    num_columns,
    row_stride,
    rank,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Keys of the rank-th and the next best score - row price of each column."""
    # Bit by bit from the sign: the largest key that at least `rank` rows reach. Flipping the sign bit of LOWEST gives 0.
    key_C = tl.full((BLOCK_C,), LOWEST, tl.int32)
    for step in range(32):
        trial_C = key_C ^ (tl.full((BLOCK_C,), 1, tl.int32) << (31 - step))
        reached_C, _ = _count_reached(
            trial_C, score_ptr, real_ptr, row_price_ptr, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
        )
        key_C = tl.where(reached_C >= rank, trial_C, key_C)
    reached_C, below_C = _count_reached(
        key_C, score_ptr, real_ptr, row_price_ptr, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
    )
    return key_C, tl.where(reached_C > rank, key_C, below_C)


@triton.jit
def _count_reached(
    trial_C,
    score_ptr,
    real_ptr,
    row_price_ptr,
    num_rows,
    num_columns,
    row_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """How many rows reach the trial key in each column, and the best key of those that do not."""
    reached_C, below_C = tl.zeros((BLOCK_C,), tl.int32), tl.full((BLOCK_C,), LOWEST, tl.int32)
    for first in range(0, num_rows, BLOCK_R):
        score_RC, inside_RC, real_R = _load_rows(
            score_ptr, real_ptr, first, num_rows, num_columns, row_stride, BLOCK_R, BLOCK_C
        )
        row_R = first + tl.arange(0, BLOCK_R)
        row_price_R = tl.load(row_price_ptr + row_R, row_R < num_rows, other=0.0)
        value_RC = tl.where(real_R[:, None], score_RC - row_price_R[:, None], float("-inf"))  # padding reaches nothing
        key_RC = tl.where(inside_RC, key_of(value_RC), LOWEST)
        reaches_RC = key_RC >= trial_C[None, :]
        reached_C += tl.sum(reaches_RC.to(tl.int32), 0)
        below_C = tl.maximum(below_C, tl.max(tl.where(reaches_RC, LOWEST, key_RC), 0))
    return reached_C, below_C
