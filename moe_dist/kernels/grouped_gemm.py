"""One GEMM an expert over rows that stand together, gathered from anywhere while they are read.

The products of an expert layer and of its backward are three uses of two kernels:

    pre = grouped_gemm(hidden_TH, w_in_LHG, start_L1, token_P)           gathered, no copy of the rows
    d_active = grouped_gemm(d_out, w_out_LFH.transpose(1, 2), ...)       the transposed weights are a view
    d_w_in = grouped_weight_grad(hidden_TH, d_pre_PG, start_L1, token_P)

Where the groups begin is known on the device only. The grid is an upper bound: expert e gets the tiles from
floor(start_e / M) + e on, for M rows a tile, which is enough for any loads and needs no sums; of the P / M + L tiles at
most L find nothing to do.

Shape letters: T rows of x, P pairs, L experts on this rank, H width of x, G width of the output.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from moe_dist.kernels import interpreted
from moe_dist.kernels.checks import FLOATS, INDICES, check, require


def grouped_gemm(
    x_TH: torch.Tensor, w_LHG: torch.Tensor, start_L1: torch.Tensor, row_P: torch.Tensor | None = None
) -> torch.Tensor:
    """out[p] = x[row[p]] @ w[e] for the expert e with start[e] <= p < start[e + 1]; sums in float32.

    float32 is multiplied as float32, not as TF32. Configurations are tried out once for each width and type, outside
    CUDA graphs; ranks may find different ones best, and then differ in the last digit.

    Args:
        x_TH: float32, bfloat16 or float16; rows may stand apart.
        w_LHG: the type of x; its second or last dim has stride 1.
        start_L1: int32 or int64 [L + 1], non-decreasing, from 0 to P.
        row_P: int32 or int64, from 0 to T - 1. None: pair p is row p, P = T.

    Returns:
        [P, G] in the type of x.

    Raises:
        ValueError: a shape, type, stride or device is none of these.
    """
    check("x_TH", x_TH, (None, None), FLOATS)
    transposed = w_LHG.dim() == 3 and w_LHG.stride(2) != 1
    check("w_LHG", w_LHG.mT if transposed else w_LHG, (None, None, None), (x_TH.dtype,), x_TH)
    num_groups, num_k, num_n = w_LHG.shape
    require("columns of x_TH", x_TH.shape[1], x_TH.shape[1] == num_k, f"{num_k}, as in w_LHG")
    span = (num_k - 1) * w_LHG.stride(1) + (num_n - 1) * w_LHG.stride(2)
    require("elements from first to last of one expert in w_LHG", span, span < 2**31, "less than 2^31")
    num_pairs = _check_pairs(x_TH, start_L1, num_groups, row_P)
    out_PG = x_TH.new_empty(num_pairs, num_n)
    if out_PG.numel():
        _gemm_kernel[lambda meta: ((num_pairs // meta["BLOCK_M"] + num_groups) * triton.cdiv(num_n, meta["BLOCK_N"]),)](
            *(x_TH, row_P, w_LHG, start_L1, out_PG),
            *(num_groups, num_k, num_n, x_TH.stride(0), *w_LHG.stride()),
            BLOCK_L=triton.next_power_of_2(num_groups),
        )
    return out_PG


def grouped_weight_grad(
    x_TH: torch.Tensor, d_out_PG: torch.Tensor, start_L1: torch.Tensor, row_P: torch.Tensor | None = None
) -> torch.Tensor:
    """[L, H, G]: d_w[e] = sum over the pairs of e of x[row[p]]^T d_out[p], in the type of x; 0 for experts without rows.

    Sums in float32, each by one program in the order of the pairs. Arguments and errors are those of `grouped_gemm`.
    """
    check("x_TH", x_TH, (None, None), FLOATS)
    num_groups = start_L1.numel() - 1
    num_pairs = _check_pairs(x_TH, start_L1, num_groups, row_P)
    check("d_out_PG", d_out_PG, (num_pairs, None), (x_TH.dtype,), x_TH)
    num_m, num_n = x_TH.shape[1], d_out_PG.shape[1]
    d_w_LHG = x_TH.new_empty(num_groups, num_m, num_n)
    if d_w_LHG.numel():
        _weight_grad_kernel[
            lambda meta: (triton.cdiv(num_m, meta["BLOCK_M"]) * triton.cdiv(num_n, meta["BLOCK_N"]), num_groups)
        ](*(x_TH, row_P, d_out_PG, start_L1, d_w_LHG), *(num_m, num_n, x_TH.stride(0), d_out_PG.stride(0)))
    return d_w_LHG


def _check_pairs(x_TH: torch.Tensor, start_L1: torch.Tensor, num_groups: int, row_P: torch.Tensor | None) -> int:
    """The number of pairs."""
    require("experts", num_groups, 1 <= num_groups <= 4096, "from 1 to 4096")
    check("start_L1", start_L1, (num_groups + 1,), INDICES, x_TH)
    if row_P is not None:
        check("row_P", row_P, (None,), INDICES, x_TH)
    num_pairs = len(x_TH if row_P is None else row_P)
    require("pairs", num_pairs, num_pairs < 2**31, "less than 2^31")
    return num_pairs


def _configs(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Rows, columns and depth of a tile, warps, stages. The interpreter takes one small tile and tries nothing out."""
    sizes = ((16, 16, 16, 4, 1),) if interpreted() else sizes
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]


def _of_type(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """float32 is multiplied without tensor cores, from registers, which tiles of depth 64 overflow; it gets the flat ones."""
    is_float32 = arguments["x_ptr"].dtype == torch.float32
    return [config for config in configs if (config.kwargs["BLOCK_K"] <= 16) == is_float32] or configs


_CONFIGS = _configs(
    *((128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 32, 4, 3)),
    *((128, 128, 16, 8, 3), (64, 64, 16, 4, 3)),
)
_autotune = partial(triton.autotune, _CONFIGS, prune_configs_by={"early_config_prune": _of_type})


@_autotune(key=["num_groups", "num_k", "num_n", "w_stride_n"])
@triton.heuristics({"EVEN_K": lambda args: args["num_k"] % args["BLOCK_K"] == 0})
@triton.jit
def _gemm_kernel(
    x_ptr,
    row_ptr,
    w_ptr,
    start_ptr,
    out_ptr,
    num_groups,
    num_k,
    num_n,
    x_stride,
    w_stride_l,
    w_stride_k,
    w_stride_n,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    tiles_m = tl.num_programs(0) // tiles_n
    # Eight tiles of rows take turns at a column of weights while it is in cache.
    first_tile = tl.program_id(0) // (8 * tiles_n) * 8
    band = tl.minimum(tiles_m - first_tile, 8)
    tile_m = first_tile + tl.program_id(0) % (8 * tiles_n) % band
    tile_n = tl.program_id(0) % (8 * tiles_n) // band

    l_L = tl.arange(0, BLOCK_L)
    first_L = tl.load(start_ptr + l_L, l_L < num_groups, other=0) // BLOCK_M + l_L
    group = tl.sum(((first_L <= tile_m) & (l_L < num_groups)).to(tl.int32), 0) - 1
    start, end = tl.load(start_ptr + group).to(tl.int64), tl.load(start_ptr + group + 1).to(tl.int64)
    first_row = start + (tile_m - (start // BLOCK_M + group)) * BLOCK_M
    if first_row >= end:
        return

    pair_M = first_row + tl.arange(0, BLOCK_M)
    row_M = pair_M if row_ptr is None else tl.load(row_ptr + pair_M, pair_M < end, other=0).to(tl.int64)
    n_N = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    x_MK = x_ptr + row_M[:, None] * x_stride + k_K[None, :]
    w_KN = w_ptr + group.to(tl.int64) * w_stride_l + k_K[:, None] * w_stride_k + n_N[None, :] * w_stride_n
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, num_k, BLOCK_K):
        if EVEN_K:
            a_MK = tl.load(x_MK + k, (pair_M < end)[:, None], other=0.0)
            b_KN = tl.load(w_KN + k * w_stride_k, (n_N < num_n)[None, :], other=0.0)
        else:
            inside_K = k + k_K < num_k
            a_MK = tl.load(x_MK + k, (pair_M < end)[:, None] & inside_K[None, :], other=0.0)
            b_KN = tl.load(w_KN + k * w_stride_k, inside_K[:, None] & (n_N < num_n)[None, :], other=0.0)
        sum_MN = tl.dot(a_MK, b_KN, sum_MN, input_precision="ieee")
    inside_MN = (pair_M < end)[:, None] & (n_N < num_n)[None, :]
    tl.store(out_ptr + pair_M[:, None] * num_n + n_N[None, :], sum_MN.to(out_ptr.dtype.element_ty), inside_MN)


@_autotune(key=["num_m", "num_n"])
@triton.jit
def _weight_grad_kernel(
    x_ptr,
    row_ptr,
    d_out_ptr,
    start_ptr,
    d_w_ptr,
    num_m,
    num_n,
    x_stride,
    d_out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(1)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    m_M = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = tl.load(start_ptr + group).to(tl.int64), tl.load(start_ptr + group + 1).to(tl.int64)
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        pair_K = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        row_K = pair_K if row_ptr is None else tl.load(row_ptr + pair_K, pair_K < end, other=0).to(tl.int64)
        x_KM = tl.load(
            x_ptr + row_K[:, None] * x_stride + m_M[None, :],
            (pair_K < end)[:, None] & (m_M < num_m)[None, :],
            other=0.0,
        )
        d_out_KN = tl.load(
            d_out_ptr + pair_K[:, None] * d_out_stride + n_N[None, :],
            (pair_K < end)[:, None] & (n_N < num_n)[None, :],
            other=0.0,
        )
        sum_MN = tl.dot(tl.trans(x_KM), d_out_KN, sum_MN, input_precision="ieee")
    d_w_MN = d_w_ptr + (group.to(tl.int64) * num_m + m_M[:, None]) * num_n + n_N[None, :]
    inside_MN = (m_M < num_m)[:, None] & (n_N < num_n)[None, :]
    tl.store(d_w_MN, sum_MN.to(d_w_ptr.dtype.element_ty), inside_MN)
