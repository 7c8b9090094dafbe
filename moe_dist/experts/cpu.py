"""Experts on CPU: one autograd function with per-expert GEMMs into preallocated tensors.

Against autograd over a loop it saves what costs most around the GEMMs on a CPU: the activation runs on one expert's rows
while they are in cache, outputs are written in place instead of concatenated, and the gradient of the weight stack is
written once instead of once per expert. Only the rows and the first GEMM's output are kept for backward.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from moe_dist.dispatch.types import Segments

_aten = torch.ops.aten


def compute_cpu(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Literal["swiglu", "gelu"],
) -> torch.Tensor:
    """See moe_dist.experts.backends."""
    return _Experts.apply(rows_RH, w_in_LHG, w_out_LFH, segments, activation)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: torch.Tensor,
        w_in_LHG: torch.Tensor,
        w_out_LFH: torch.Tensor,
        segments: Segments,
        activation: Literal["swiglu", "gelu"],
    ) -> torch.Tensor:
        rows_RH = rows_RH.contiguous()
        blocks = _blocks(segments, rows_RH.dtype)
        pre_RG = _with_slack(rows_RH, w_in_LHG.shape[2])
        out_RH = _with_slack(rows_RH, rows_RH.shape[1])
        (scratch_F,) = _scratch(blocks, rows_RH, [w_out_LFH.shape[1]])
        for block in blocks:
            torch.mm(_window(rows_RH, block), w_in_LHG[block.expert], out=pre_RG[block.window])
            _activate(pre_RG[block.rows], scratch_F[: block.size], activation)
            torch.mm(scratch_F[: block.padded], w_out_LFH[block.expert], out=out_RH[block.window])
        ctx.segments, ctx.activation = segments, activation
        ctx.save_for_backward(rows_RH, pre_RG, w_in_LHG, w_out_LFH)
        return out_RH.resize_(rows_RH.shape)  # not a view: FSDP's hooks do not hold on views

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        rows_RH, pre_RG, w_in_LHG, w_out_LFH = ctx.saved_tensors
        grad_RH = grads[0].contiguous()
        blocks = _blocks(ctx.segments, rows_RH.dtype)
        d_rows_RH = _with_slack(rows_RH, rows_RH.shape[1])
        d_w_in, d_w_out = torch.empty_like(w_in_LHG), torch.empty_like(w_out_LFH)
        widths = [w_out_LFH.shape[1], w_out_LFH.shape[1], pre_RG.shape[1]]
        active_F, d_active_F, d_pre_G = _scratch(blocks, rows_RH, widths)
        seen: set[int] = set()
        for block in blocks:
            e, size, padded = block.expert, block.size, block.padded
            grad = _window(grad_RH, block)
            torch.mm(grad, w_out_LFH[e].t(), out=d_active_F[:padded])
            _activate_backward(pre_RG[block.rows], d_active_F[:size], active_F[:size], d_pre_G[:size], ctx.activation)
            # What a window holds behind its own rows must not reach the weights.
            active_F[size:padded].zero_()
            d_pre_G[size:padded].zero_()
            torch.mm(d_pre_G[:padded], w_in_LHG[e].t(), out=d_rows_RH[block.window])
            _add_product(active_F[:padded], grad, d_w_out[e], first=e not in seen)
            _add_product(_window(rows_RH, block), d_pre_G[:padded], d_w_in[e], first=e not in seen)
            seen.add(e)
        for e in set(range(len(w_in_LHG))) - seen:
            d_w_in[e].zero_()
            d_w_out[e].zero_()
        return d_rows_RH.resize_(rows_RH.shape), d_w_in, d_w_out, None, None


# oneDNN builds a new kernel for each number of rows it meets in a bfloat16 product, which takes longer than the product.
# Rounded up, few numbers of rows occur. A window of rows then reaches into the next segment, whose own products come
# later and write those rows again; behind the last segment lies some slack.
_ROUND_ROWS = {torch.bfloat16: 32}


@dataclass(frozen=True)
class _Block:
    """The rows of one segment, and the window of a rounded number of rows that begins with them."""

    start: int
    size: int
    padded: int
    expert: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def window(self) -> slice:
        return slice(self.start, self.start + self.padded)


def _blocks(segments: Segments, dtype: torch.dtype) -> list[_Block]:
    """A block for each segment that has rows."""
    blocks, start, multiple = [], 0, _ROUND_ROWS.get(dtype, 1)
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        if size:
            blocks.append(_Block(start, size, -(-size // multiple) * multiple, expert))
        start += size
    return blocks


def _with_slack(rows_RH: torch.Tensor, width: int) -> torch.Tensor:
    return rows_RH.new_empty(len(rows_RH) + _ROUND_ROWS.get(rows_RH.dtype, 1) - 1, width)


def _window(rows_RH: torch.Tensor, block: _Block) -> torch.Tensor:
    """The rows of a window, zeros where it reaches behind the last row."""
    missing = block.window.stop - len(rows_RH)
    return rows_RH[block.window] if missing <= 0 else functional.pad(rows_RH[block.start :], (0, 0, 0, missing))


def _scratch(blocks: list[_Block], like: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
    """One buffer for each width, with rows for the largest block; while a block is computed they stay in cache."""
    num_rows = max((block.padded for block in blocks), default=0)
    return [like.new_empty(num_rows, width) for width in widths]


def _add_product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, first: bool) -> None:
    """out (+)= x^T y."""
    if first:
        torch.mm(x.t(), y, out=out)
    else:
        out.addmm_(x.t(), y)


def _activate(pre: torch.Tensor, out: torch.Tensor, activation: Literal["swiglu", "gelu"]) -> None:
    if activation == "gelu":
        _aten.gelu.out(pre, out=out)
        return
    gate, up = pre.chunk(2, dim=1)
    _aten.silu.out(gate, out=out)
    out.mul_(up)


def _activate_backward(
    pre: torch.Tensor, d_active: torch.Tensor, active: torch.Tensor, d_pre: torch.Tensor, activation: str
) -> None:
    """Write the activation's output again into `active` and its gradient into `d_pre`; `d_active` is used up."""
    if activation == "gelu":
        _aten.gelu.out(pre, out=active)
        _aten.gelu_backward.grad_input(d_active, pre, grad_input=d_pre)
        return
    gate, up = pre.chunk(2, dim=1)
    d_gate, d_up = d_pre.chunk(2, dim=1)
    _aten.silu.out(gate, out=active)
    torch.mul(d_active, active, out=d_up)
    active.mul_(up)
    _aten.silu_backward.grad_input(d_active.mul_(up), gate, grad_input=d_gate)
