"""Ways to compute the experts of a rank, all with one signature and one result.

    compute(rows_RH, segments, w_in_LHG, w_out_LFH, activation) -> rows_RH

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU: gate
columns, then up columns; F for GELU).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from moe_dist.dispatch.types import Segments
from moe_dist.experts.cpu import compute_cpu

Activation = Literal["swiglu", "gelu"]
Compute = Callable[[torch.Tensor, Segments, torch.Tensor, torch.Tensor, Activation], torch.Tensor]


def activate(pre_RG: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[R, F]: SwiGLU of the two halves, or GELU."""
    if activation == "gelu":
        return functional.gelu(pre_RG)
    gate_RF, up_RF = pre_RG.chunk(2, dim=-1)
    return functional.silu(gate_RF) * up_RF


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
    return torch.cat(outputs)


def compute_grouped(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """torch.nn.functional.grouped_mm, one group an expert; segments of several source ranks are brought together first."""
    num_experts = len(w_in_LHG)
    order = sorted(range(len(segments.sizes)), key=lambda s: segments.experts[s])
    regrouped = order != list(range(len(order)))
    if regrouped:
        rows_RH = _reorder(rows_RH, segments.sizes, order)
    sizes_L = [0] * num_experts
    for size, expert in zip(segments.sizes, segments.experts, strict=True):
        sizes_L[expert] += size
    ends_L = torch.tensor(sizes_L, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows_RH.device, non_blocking=True)
    pre_RG = functional.grouped_mm(rows_RH, w_in_LHG, offs=ends_L)
    out_RH = functional.grouped_mm(activate(pre_RG, activation), w_out_LFH, offs=ends_L)
    if regrouped:
        back = sorted(range(len(order)), key=order.__getitem__)
        out_RH = _reorder(out_RH, [segments.sizes[s] for s in order], back)
    return out_RH


def _reorder(rows: torch.Tensor, sizes: list[int], order: list[int]) -> torch.Tensor:
    blocks = rows.split(sizes)
    return torch.cat([blocks[s] for s in order])


BACKENDS: dict[str, Compute] = {"loop": compute_loop, "cpu": compute_cpu, "grouped_mm": compute_grouped}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]) -> Compute:
    """The backend that `moe.backend` names; `auto` takes the fast one that the device has for such rows.

    Args:
        widths: H and F; grouped_mm wants rows of a multiple of 16 bytes.

    Raises ValueError if grouped_mm is asked for where torch has none.
    """
    on_gpu = device.type != "cpu"
    grouped = dtype == torch.bfloat16 if on_gpu else dtype in (torch.bfloat16, torch.float32)
    grouped = grouped and all(width * dtype.itemsize % 16 == 0 for width in widths)
    if name == "grouped_mm" and not grouped:
        raise ValueError(
            f"moe.backend: grouped_mm does not compute {dtype} with model.hidden_size and moe.ffn_size {widths} on "
            f"{device.type}; use auto, or training.precision: bfloat16 with multiples of 8"
        )
    if name == "auto":
        name = "cpu" if not on_gpu else "grouped_mm" if grouped else "loop"
    return BACKENDS[name]
