"""SwiGLU of gate and up columns, forward and backward, each in one pass over its rows.

Backward computes the activation again from what entered it, as the weight gradient of the second GEMM needs it, and finds
the gradient of a row's weight from two values that it has in hand: with out = w * active @ w_out and d_active the gradient
at w = 1, d_w = sum of d_active * active over the row. So no output of an expert need be kept (SonicMoE, arXiv 2512.14080).

Shape letters: R rows, F FFN width, G = 2F (gate columns, then up columns).
"""

import torch
import triton
import triton.language as tl

from moe_dist.kernels.checks import FLOATS, check, require

BLOCK_R = 4
WIDEST_BLOCK = 512


def swiglu(pre_RG: torch.Tensor) -> torch.Tensor:
    """[R, F] silu(gate) * up, computed in float32 and rounded once; pre is float32, bfloat16 or float16.

    Raises ValueError for other shapes, types or strides. Rows of pre may stand apart.
    """
    num_rows, width = _check_pre(pre_RG)
    active_RF = pre_RG.new_empty(num_rows, width)
    if active_RF.numel():
        _forward_kernel[(triton.cdiv(num_rows, BLOCK_R),)](
            *(pre_RG, active_RF, num_rows, width, pre_RG.stride(0)), BLOCK_R=BLOCK_R, BLOCK_F=_block(width)
        )
    return active_RF


def swiglu_backward(
    pre_RG: torch.Tensor, d_active_RF: torch.Tensor, weight_R: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradient of pre, the activation, and the gradient of the rows' weights.

    Args:
        pre_RG: what entered `swiglu`.
        d_active_RF: the type of pre; the gradient of the activation for weights of 1.
        weight_R: float32, what multiplies each row of the experts' output. None: nothing does.

    Returns:
        d_pre_RG: in the type of pre, weights included.
        active_RF: in the type of pre, times the weight: active^T @ d_out, with d_out not weighted, is then the gradient of
            the second GEMM's weights.
        d_weight_R: float32, the sum of d_active * active over a row; None without weights.

    Raises:
        ValueError: a shape, type, stride or device is none of these.
    """
    num_rows, width = _check_pre(pre_RG)
    check("d_active_RF", d_active_RF, (num_rows, width), (pre_RG.dtype,), pre_RG)
    d_weight_R = None
    if weight_R is not None:
        check("weight_R", weight_R, (num_rows,), (torch.float32,), pre_RG)
        d_weight_R = torch.zeros_like(weight_R) if width == 0 else torch.empty_like(weight_R)
    d_pre_RG, active_RF = pre_RG.new_empty(num_rows, 2 * width), pre_RG.new_empty(num_rows, width)
    if active_RF.numel():
        _backward_kernel[(triton.cdiv(num_rows, BLOCK_R),)](
            *(pre_RG, d_active_RF, weight_R, d_pre_RG, active_RF, d_weight_R),
            *(num_rows, width, pre_RG.stride(0), d_active_RF.stride(0)),
            BLOCK_R=BLOCK_R,
            BLOCK_F=_block(width),
        )
    return d_pre_RG, active_RF, d_weight_R


def _check_pre(pre_RG: torch.Tensor) -> tuple[int, int]:
    """Rows and FFN width."""
    check("pre_RG", pre_RG, (None, None), FLOATS)
    require("columns of pre_RG", pre_RG.shape[1], pre_RG.shape[1] % 2 == 0, "even (gate, then up)")
    return pre_RG.shape[0], pre_RG.shape[1] // 2


def _block(width: int) -> int:
    return min(WIDEST_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _load_pre(pre_ptr, row_R, f_F, inside_RF, width, pre_stride):
    """Gate and up in float32."""
    gate_ptr = pre_ptr + row_R[:, None] * pre_stride + f_F[None, :]
    gate_RF = tl.load(gate_ptr, inside_RF, other=0.0).to(tl.float32)
    return gate_RF, tl.load(gate_ptr + width, inside_RF, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(pre_ptr, active_ptr, num_rows, width, pre_stride, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    for first in range(0, width, BLOCK_F):
        f_F = first + tl.arange(0, BLOCK_F)
        inside_RF = (row_R < num_rows)[:, None] & (f_F < width)[None, :]
        gate_RF, up_RF = _load_pre(pre_ptr, row_R, f_F, inside_RF, width, pre_stride)
        active_RF = gate_RF * tl.sigmoid(gate_RF) * up_RF
        tl.store(active_ptr + row_R[:, None] * width + f_F[None, :], active_RF, inside_RF)


@triton.jit
def _backward_kernel(
    pre_ptr,
    d_active_ptr,
    weight_ptr,
    d_pre_ptr,
    active_ptr,
    d_weight_ptr,
    num_rows,
    width,
    pre_stride,
    d_active_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if weight_ptr is not None:
        weight_R1 = tl.load(weight_ptr + row_R, row_R < num_rows, other=0.0)[:, None]
        d_weight_R = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, width, BLOCK_F):
        f_F = first + tl.arange(0, BLOCK_F)
        inside_RF = (row_R < num_rows)[:, None] & (f_F < width)[None, :]
        gate_RF, up_RF = _load_pre(pre_ptr, row_R, f_F, inside_RF, width, pre_stride)
        d_active_ptr_RF = d_active_ptr + row_R[:, None] * d_active_stride + f_F[None, :]
        d_active_RF = tl.load(d_active_ptr_RF, inside_RF, other=0.0).to(tl.float32)
        sigmoid_RF = tl.sigmoid(gate_RF)
        silu_RF = gate_RF * sigmoid_RF
        active_RF = silu_RF * up_RF
        if weight_ptr is not None:
            d_weight_R += tl.sum(d_active_RF * active_RF, 1)
            d_active_RF *= weight_R1
            active_RF *= weight_R1
        d_gate_RF = d_active_RF * up_RF * sigmoid_RF * (1.0 + gate_RF * (1.0 - sigmoid_RF))
        d_gate_ptr_RF = d_pre_ptr + row_R[:, None] * (2 * width) + f_F[None, :]
        tl.store(d_gate_ptr_RF, d_gate_RF, inside_RF)
        tl.store(d_gate_ptr_RF + width, d_active_RF * silu_RF, inside_RF)
        tl.store(active_ptr + row_R[:, None] * width + f_F[None, :], active_RF, inside_RF)
    if weight_ptr is not None:
        tl.store(d_weight_ptr + row_R, d_weight_R, row_R < num_rows)
