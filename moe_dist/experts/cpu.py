"""Experts on CPU: one autograd function with per-expert GEMMs into preallocated tensors.

Against autograd over a loop it saves what costs most around the GEMMs on a CPU: the activation runs on one expert's rows
while they are in cache, outputs are written in place instead of concatenated, and the gradient of the weight stack is
written once instead of once per expert. Only the rows and the first GEMM's output are kept for backward.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch

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
        pre_RG = rows_RH.new_empty(len(rows_RH), w_in_LHG.shape[2])
        out_RH = torch.empty_like(rows_RH)
        scratch_F = _scratch(segments, rows_RH, w_out_LFH.shape[1])
        for rows, e in _blocks(segments):
            torch.mm(rows_RH[rows], w_in_LHG[e], out=pre_RG[rows])
            active = scratch_F[: rows.stop - rows.start]
            _activate(pre_RG[rows], active, activation)
            torch.mm(active, w_out_LFH[e], out=out_RH[rows])
        ctx.segments, ctx.activation = segments, activation
        ctx.save_for_backward(rows_RH, pre_RG, w_in_LHG, w_out_LFH)
        return out_RH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        rows_RH, pre_RG, w_in_LHG, w_out_LFH = ctx.saved_tensors
        grad_RH = grads[0].contiguous()
        d_rows_RH = torch.empty_like(rows_RH)
        d_w_in, d_w_out = torch.empty_like(w_in_LHG), torch.empty_like(w_out_LFH)
        width = w_out_LFH.shape[1]
        active_F, d_active_F = (_scratch(ctx.segments, rows_RH, width) for _ in range(2))
        d_pre_G = _scratch(ctx.segments, rows_RH, pre_RG.shape[1])
        seen: set[int] = set()
        for rows, e in _blocks(ctx.segments):
            n = rows.stop - rows.start
            active, d_active, d_pre = active_F[:n], d_active_F[:n], d_pre_G[:n]
            torch.mm(grad_RH[rows], w_out_LFH[e].t(), out=d_active)
            _activate_backward(pre_RG[rows], d_active, active, d_pre, ctx.activation)
            torch.mm(d_pre, w_in_LHG[e].t(), out=d_rows_RH[rows])
            _add_product(active, grad_RH[rows], d_w_out[e], first=e not in seen)
            _add_product(rows_RH[rows], d_pre, d_w_in[e], first=e not in seen)
            seen.add(e)
        for e in set(range(len(w_in_LHG))) - seen:
            d_w_in[e].zero_()
            d_w_out[e].zero_()
        return d_rows_RH, d_w_in, d_w_out, None, None


def _blocks(segments: Segments) -> Iterator[tuple[slice, int]]:
    """The rows and the expert of each segment that has rows."""
    start = 0
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        if size:
            yield slice(start, start + size), expert
        start += size


def _scratch(segments: Segments, like: torch.Tensor, width: int) -> torch.Tensor:
    return like.new_empty(max(segments.sizes, default=0), width)


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
