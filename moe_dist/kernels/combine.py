"""The weighted sum of the rows that came back for each token, and its backward.

One program a token takes its pairs in order: no atomics, no K-fold tensor, the same bits every time.

Shape letters: T tokens, H hidden, P pairs in token order, W slots of the rows.
"""

import torch
import triton
import triton.language as tl

from moe_dist.kernels.checks import FLOATS, INDICES, check, require

WIDEST_ROW = 32768
"""A program holds a whole row."""


def combine(
    rows_WH: torch.Tensor, slot_P: torch.Tensor, first_T: torch.Tensor, weight_P: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, H] out[t] = sum of weight[p] * rows[slot[p]] over first[t] <= p < first[t + 1] in order; sums in float32.

    Args:
        rows_WH: float32, bfloat16 or float16; rows may stand apart.
        slot_P: int32 or int64, from 0 to W - 1.
        first_T: int32 or int64, non-decreasing, where each token's pairs begin; the last token's end at P.
        weight_P: float32. None: all are 1.

    Returns:
        In the type of the rows; 0 for tokens without pairs.

    Raises:
        ValueError: a shape, type, stride or device is none of these.
    """
    _check_pairs(rows_WH, slot_P, first_T, weight_P)
    num_tokens, width = len(first_T), rows_WH.shape[1]
    out_TH = rows_WH.new_empty(num_tokens, width)
    if out_TH.numel():
        block, warps = _row_block(width)
        _forward_kernel[(num_tokens,)](
            *(rows_WH, slot_P, first_T, weight_P, out_TH, num_tokens, len(slot_P), width, rows_WH.stride(0)),
            BLOCK_H=block,
            num_warps=warps,
        )
    return out_TH


def combine_backward(
    d_out_TH: torch.Tensor,
    rows_WH: torch.Tensor,
    slot_P: torch.Tensor,
    first_T: torch.Tensor,
    weight_P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the rows and of the weights, of no two pairs with one slot.

    Args:
        d_out_TH: the type of the rows.

    Returns:
        d_rows_WH: weight[p] * d_out[t] at slot[p], 0 at slots without a pair; in the type of the rows.
        d_weight_P: float32, the dot product of d_out[t] and rows[slot[p]]; None without weights.

    Raises:
        ValueError: as `combine`.
    """
    _check_pairs(rows_WH, slot_P, first_T, weight_P)
    num_tokens, num_pairs, width = len(first_T), len(slot_P), rows_WH.shape[1]
    check("d_out_TH", d_out_TH, (num_tokens, width), (rows_WH.dtype,), rows_WH)
    every_slot_has_a_pair = num_pairs == len(rows_WH)
    new = torch.empty_like if every_slot_has_a_pair else torch.zeros_like
    d_rows_WH = new(rows_WH, memory_format=torch.contiguous_format)
    d_weight_P = None if weight_P is None else torch.zeros_like(weight_P)
    if num_pairs and d_out_TH.numel():
        block, warps = _row_block(width)
        _backward_kernel[(num_tokens,)](
            *(d_out_TH, rows_WH, slot_P, first_T, weight_P, d_rows_WH, d_weight_P),
            *(num_tokens, num_pairs, width, d_out_TH.stride(0), rows_WH.stride(0)),
            BLOCK_H=block,
            num_warps=warps,
        )
    return d_rows_WH, d_weight_P


def _check_pairs(
    rows_WH: torch.Tensor, slot_P: torch.Tensor, first_T: torch.Tensor, weight_P: torch.Tensor | None
) -> None:
    check("rows_WH", rows_WH, (None, None), FLOATS)
    require("columns of rows_WH", rows_WH.shape[1], rows_WH.shape[1] <= WIDEST_ROW, f"at most {WIDEST_ROW}")
    check("slot_P", slot_P, (None,), INDICES, rows_WH)
    check("first_T", first_T, (None,), INDICES, rows_WH)
    if weight_P is not None:
        check("weight_P", weight_P, (len(slot_P),), (torch.float32,), rows_WH)


def _row_block(width: int) -> tuple[int, int]:
    """Columns and warps of a program: 16 values a thread, at most 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


@triton.jit
def _pairs_of(first_ptr, token, num_tokens, num_pairs):
    """Where the token's pairs begin and end, int64."""
    first = tl.load(first_ptr + token).to(tl.int64)
    return first, tl.load(first_ptr + token + 1, token + 1 < num_tokens, other=num_pairs).to(tl.int64)


@triton.jit
def _forward_kernel(
    rows_ptr, slot_ptr, first_ptr, weight_ptr, out_ptr, num_tokens, num_pairs, width, rows_stride, BLOCK_H: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    sum_H = tl.zeros((BLOCK_H,), tl.float32)
    first, end = _pairs_of(first_ptr, token, num_tokens, num_pairs)
    for pair in range(first, end):
        slot = tl.load(slot_ptr + pair).to(tl.int64)
        row_H = tl.load(rows_ptr + slot * rows_stride + h_H, h_H < width, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            row_H *= tl.load(weight_ptr + pair)
        sum_H += row_H
    tl.store(out_ptr + token * width + h_H, sum_H, h_H < width)


@triton.jit
def _backward_kernel(
    d_out_ptr,
    rows_ptr,
    slot_ptr,
    first_ptr,
    weight_ptr,
    d_rows_ptr,
    d_weight_ptr,
    num_tokens,
    num_pairs,
    width,
    d_out_stride,
    rows_stride,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    d_out_H = tl.load(d_out_ptr + token * d_out_stride + h_H, h_H < width, other=0.0).to(tl.float32)
    first, end = _pairs_of(first_ptr, token, num_tokens, num_pairs)
    for pair in range(first, end):
        slot = tl.load(slot_ptr + pair).to(tl.int64)
        d_row_H = d_out_H
        if weight_ptr is not None:
            row_H = tl.load(rows_ptr + slot * rows_stride + h_H, h_H < width, other=0.0).to(tl.float32)
            tl.store(d_weight_ptr + pair, tl.sum(d_out_H * row_H, 0))
            d_row_H = d_out_H * tl.load(weight_ptr + pair)
        tl.store(d_rows_ptr + slot * width + h_H, d_row_H, h_H < width)
