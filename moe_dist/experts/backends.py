"""Ways to compute the experts of a rank, all with one signature and one result.

    compute(rows_RH, segments, w_in_LHG, w_out_LFH, activation) -> rows_RH

is differentiable by torch. A backend with kernels of its own (forward and backward written out) also takes part in the
fused journey of moe_dist.experts.journey.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU: gate
columns, then up columns; F for GELU).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.dispatch.types import Segments
from moe_dist.experts import cpu, fp8, sonic, transformer_engine, triton_backend, whole
from moe_dist.experts.grouped import activate, compute_by_product, grouped_product
from moe_dist.experts.types import Activation, Incoming, Kernels, Result, Rows, WeightGradients, Weights

Compute = Callable[[torch.Tensor, Segments, torch.Tensor, torch.Tensor, Activation], torch.Tensor]
WhyNot = Callable[[torch.device, torch.dtype, tuple[int, int], Activation], str | None]


def compute_loop(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """The reference: two matrix products a segment, gradients by autograd."""
    outputs = [
        activate(x @ w_in_LHG[e], activation) @ w_out_LFH[e]
        for x, e in zip(rows_RH.split(segments.sizes), segments.experts, strict=True)
    ]
    return torch.cat(outputs) if outputs else rows_RH  # no experts, no rows


def compute_grouped(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """torch.nn.functional.grouped_mm, one group an expert; a batched product where all have equally many rows."""

    product = partial(grouped_product, equal=segments.equal)
    return compute_by_product(product, rows_RH, segments, w_in_LHG, w_out_LFH, activation)


def by_kernels(kernels: Kernels) -> Compute:
    """Rows that are here, by kernels of a fused journey."""

    def compute(
        rows_RH: torch.Tensor,
        segments: Segments,
        w_in_LHG: torch.Tensor,
        w_out_LFH: torch.Tensor,
        activation: Activation,
    ) -> torch.Tensor:
        return _ByKernels.apply(rows_RH, w_in_LHG, w_out_LFH, segments, activation, kernels)

    return compute


class _ByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, *arguments: Any) -> torch.Tensor:
        w_in_LHG, w_out_LFH, segments, activation, kernels = arguments
        rows_RH = rows_RH.contiguous()
        x, weights = Rows(rows_RH, segments.starts()), Weights(w_in_LHG, w_out_LFH, activation)
        result, kept = kernels.forward(x, segments, weights, "rows")
        ctx.segments, ctx.activation, ctx.kernels = segments, activation, kernels
        ctx.save_for_backward(rows_RH, w_in_LHG, w_out_LFH, *kept)
        return _own(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_RH, w_in_LHG, w_out_LFH, *kept = ctx.saved_tensors
        segments: Segments = ctx.segments
        weights = Weights(w_in_LHG, w_out_LFH, ctx.activation)
        x, grad = Rows(rows_RH, segments.starts()), Rows(grads[0].contiguous(), segments.starts())
        to = None
        if any(ctx.needs_input_grad[1:3]):
            to = WeightGradients(torch.zeros_like(w_in_LHG), torch.zeros_like(w_out_LFH))
        done: list[Result] = []
        ctx.kernels.backward(x, Incoming(grad, None, kept), segments, weights, to, "rows", done.append)
        d_weights = (None, None) if to is None else (to.d_w_in_LHG, to.d_w_out_LFH)
        return _own(done[0]), *d_weights, None, None, None


def _own(result: Result) -> torch.Tensor:
    """The rows in order, in memory of their own."""
    return result.rows_QH.clone() if result.place_R is None else result.in_order(result.rows_QH)


@dataclass(frozen=True)
class Backend:
    """One way to compute experts."""

    compute: Compute
    kernels: Kernels | None = None
    why_not: WhyNot | None = None
    """Of an optional one: None if it computes such experts here, else the reason and what to use instead."""


BACKENDS = {
    "loop": Backend(compute_loop),
    "cpu": Backend(by_kernels(cpu.KERNELS), cpu.KERNELS),
    "grouped_mm": Backend(compute_grouped, whole.KERNELS),
    "triton": Backend(by_kernels(triton_backend.KERNELS), triton_backend.KERNELS, triton_backend.why_not),
    "transformer_engine": Backend(transformer_engine.compute_transformer_engine, why_not=transformer_engine.why_not),
    "sonic": Backend(sonic.compute_sonic, why_not=sonic.why_not),
    "fp8": Backend(fp8.compute_fp8, why_not=fp8.why_not),
}


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    activation: Activation = "swiglu",
    equal: bool = False,
) -> Backend:
    """The backend that `moe.backend` names; `auto` takes the fast one that the device has for such rows.

    Args:
        widths: H and F; grouped_mm wants rows of a multiple of 16 bytes.
        equal: all experts have equally many rows, so that grouped_mm is a batched product, which any dtype and width has.

    Raises ValueError if grouped_mm is asked for where torch has none, or an optional backend that is not installed or does
    not fit.
    """
    on_gpu = device.type != "cpu"
    grouped = dtype == torch.bfloat16 if on_gpu else dtype in (torch.bfloat16, torch.float32)
    grouped = equal or (grouped and all(width * dtype.itemsize % 16 == 0 for width in widths))
    if name == "grouped_mm" and not grouped:
        raise ValueError(
            f"moe.backend: grouped_mm does not compute {dtype} with model.hidden_size and moe.ffn_size {widths} on "
            f"{device.type}; use auto, or training.precision: bfloat16 with multiples of 8"
        )
    if name == "auto":
        own_kernels = not on_gpu and not (equal and torch.compiler.is_compiling())  # which cannot be traced
        name = "cpu" if own_kernels else "grouped_mm" if grouped else "loop"
    backend = BACKENDS[name]
    if backend.why_not is not None and (reason := backend.why_not(device, dtype, widths, activation)):
        raise ValueError(f"moe.backend: {name}: {reason}")
    return backend
