"""Experts by one grouped product for all of them: the rows of all experts at once, as GPUs want it.

Where every expert has equally many rows (static routings) the product is a batched one, of any dtype, and nothing depends
on values on the device, so that a CUDA graph can hold it; else it is torch.nn.functional.grouped_mm.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU), K and N
width of rows that go into a product and that come out.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_dist.dispatch.types import Segments
from moe_dist.experts.grouped import activate, group_ends, grouped_product
from moe_dist.experts.order import experts_of, place_by_expert, sizes_by_expert, take, weights_by_expert
from moe_dist.experts.types import Activation, Incoming, Kernels, Result, Rows, RowsDone, WeightGradients, Weights


def forward(x: Rows, segments: Segments, weights: Weights, name: str) -> tuple[Result, list[torch.Tensor]]:
    """See moe_dist.experts.types.Kernels."""
    device = x.buffer_UH.device
    groups = _Groups.of(segments)
    pre_RG = groups.product(take(x, segments), weights.w_in_LHG[groups.own])
    out_RH = groups.product(activate(pre_RG, weights.activation), weights.w_out_LFH[groups.own])
    return Result(out_RH, place_by_expert(segments, device)), [pre_RG]


def backward(
    x: Rows,
    incoming: Incoming,
    segments: Segments,
    weights: Weights,
    to: WeightGradients | None,
    name: str,
    rows_done: RowsDone,
) -> None:
    """See moe_dist.experts.types.Kernels."""
    device = x.buffer_UH.device
    groups = _Groups.of(segments)
    w_in_LHG, w_out_LFH = weights.w_in_LHG[groups.own], weights.w_out_LFH[groups.own]
    x_RH, grad_RH = take(x, segments), take(incoming.grad, segments)
    pre_RG = incoming.kept[0] if incoming.kept else groups.product(x_RH, w_in_LHG)
    d_active_RF = groups.product(grad_RH, w_out_LFH.mT)
    weight_R = weights_by_expert(incoming, segments, device)
    active_RF, d_pre_RG, d_weight_R = _activate_backward(pre_RG, d_active_RF, weight_R, weights.activation)
    rows_done(Result(groups.product(d_pre_RG, w_in_LHG.mT), place_by_expert(segments, device), d_weight_R))
    if to is None:
        return
    groups.transposed_product(x_RH, d_pre_RG, to.d_w_in_LHG[groups.own])
    groups.transposed_product(active_RF, grad_RH, to.d_w_out_LFH[groups.own])


KERNELS = Kernels(forward, backward)


@dataclass(frozen=True)
class _Groups:
    """Rows by expert, of consecutive experts of the stack."""

    own: slice
    sizes: list[int]
    equal: bool

    @staticmethod
    def of(segments: Segments) -> "_Groups":
        return _Groups(experts_of(segments), sizes_by_expert(segments), segments.equal)

    def product(self, rows_RK: torch.Tensor, w_LKN: torch.Tensor) -> torch.Tensor:
        """[R, N] each expert's rows times its matrix."""
        if not self.sizes:
            return rows_RK.new_zeros(0, w_LKN.shape[2])
        with torch.autocast(rows_RK.device.type, enabled=False):
            return grouped_product(rows_RK, w_LKN, self.sizes, self.equal)

    def transposed_product(self, x_RK: torch.Tensor, y_RN: torch.Tensor, out_LKN: torch.Tensor) -> None:
        """out[expert] = x^T y over the expert's rows."""
        if len(x_RK) == 0:
            out_LKN.zero_()
        elif self.equal:
            shape = (len(self.sizes), self.sizes[0], -1)
            torch.bmm(x_RK.view(shape).transpose(1, 2), y_RN.view(shape), out=out_LKN)
        else:
            ends_L = group_ends(tuple(self.sizes), x_RK.device)
            out_LKN.copy_(functional.grouped_mm(x_RK.t(), y_RN, offs=ends_L))
            for expert, size in enumerate(self.sizes):
                if size == 0:  # not every kernel writes the product of no rows
                    out_LKN[expert].zero_()


def _activate_backward(
    pre_RG: torch.Tensor, d_active_RF: torch.Tensor, weight_R: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The activation's output times the row's weight, the gradient of what went into it, and that of the weight."""
    weight_R1 = weight_R.to(pre_RG.dtype)[:, None]
    with torch.enable_grad():
        pre_RG = pre_RG.detach().requires_grad_()
        active_RF = activate(pre_RG, activation)
    (d_pre_RG,) = torch.autograd.grad(active_RF, pre_RG, d_active_RF * weight_R1)
    active_RF = active_RF.detach()
    d_weight_R = (d_active_RF * active_RF).sum(1, dtype=weight_R.dtype)
    return active_RF * weight_R1, d_pre_RG, d_weight_R
