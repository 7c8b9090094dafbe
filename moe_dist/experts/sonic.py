"""Experts by SonicMoE (Guo et al. 2025, arXiv 2512.14080): gather, both GEMMs, activation and weighted sum in few kernels.

Its layer for general routing takes tokens and (token, expert, weight) triples. Rows that a dispatcher has gathered already
are tokens with one expert of weight one.

SonicMoE wants expert matrices [out, in] with `in` contiguous, where our stacks are [in, out]: one transposed copy of the
weights a call, and of their gradients. No order of the rows is wanted, so segments need not be brought together.

Signature and layouts: sonic-moe 0.1.2.post1, `sonicmoe/functional/__init__.py`. Not run on hardware.

Shape letters: R rows, U tokens, Q (token, expert) pairs, H hidden, L experts on this rank, F FFN width, G = 2F.
"""

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch

from moe_dist.config.backends import backend_problem
from moe_dist.dispatch.types import Segments
from moe_dist.experts.grouped import activate
from moe_dist.experts.types import Activation


def compute_sonic(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """See moe_dist.experts.backends; bfloat16 and SwiGLU on a Hopper or Blackwell GPU."""
    assert activation == "swiglu", activation
    row_R = torch.arange(len(rows_RH), dtype=torch.int32, device=rows_RH.device)
    expert_R = _repeat(segments.experts, segments.sizes, rows_RH.device)
    weight_R = torch.ones(len(rows_RH), device=rows_RH.device)
    return _sonic(rows_RH, row_R, expert_R, weight_R, w_in_LHG, w_out_LFH)


def why_not(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], activation: Activation) -> str | None:
    """None if this backend computes such experts here, else the reason and what to use instead."""
    if device.type != "cuda":
        return f"SonicMoE runs on Hopper and Blackwell GPUs, not on {device.type}; use auto"
    if problem := backend_problem("sonic", str(dtype).removeprefix("torch."), activation, widths):
        return problem
    if importlib.util.find_spec("sonicmoe") is None:
        return "SonicMoE is not installed; see docs/backends.md on how to (Python 3.12 or newer), or use auto"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):
        return f"SonicMoE runs on Hopper and Blackwell GPUs (compute capability 9.0 and 10.x), not {major}.{minor}; use auto"
    try:
        found = _arguments(_sonicmoe().moe_general_routing_inputs)
    except (ImportError, OSError, AttributeError) as error:
        return f"SonicMoE is installed but cannot be used ({error}); repair the installation, or use auto"
    if "concat_layout" not in found:
        return "this SonicMoE cannot take gate and up columns side by side (concat_layout); install 0.1.2 or newer, or use auto"
    return None


def _sonicmoe() -> Any:
    """Imported when first used: importing SonicMoE loads CUTLASS and Triton."""
    return importlib.import_module("sonicmoe")


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    """Kept, because it is asked before every forward."""
    return frozenset(inspect.signature(function).parameters)


def _sonic(
    hidden_UH: torch.Tensor,
    row_Q: torch.Tensor,
    expert_Q: torch.Tensor,
    weight_Q: torch.Tensor,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
) -> torch.Tensor:
    """[U, H] the weighted sums of tokens' experts; pairs by token: row_Q ascending int32, expert_Q int32."""
    if not len(row_Q):  # a kernel of no rows cannot be launched
        return _zeros(hidden_UH, row_Q, weight_Q, w_in_LHG, w_out_LFH)
    out_UH, _ = _sonicmoe().moe_general_routing_inputs(
        hidden_UH.contiguous(),
        weight_Q,
        row_Q,
        expert_Q,
        w_in_LHG.transpose(1, 2).contiguous().permute(1, 2, 0),  # [G, H, L], experts slowest, H contiguous
        None,
        w_out_LFH.transpose(1, 2).contiguous().permute(1, 2, 0),  # [H, F, L], experts slowest, F contiguous
        None,
        len(w_in_LHG),
        0,  # stream_id, which it does not read: kernels go to the current stream
        importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU,
        concat_layout=True,  # gate columns, then up columns
    )
    if out_UH.requires_grad:
        out_UH.register_hook(torch.Tensor.contiguous)  # its backward kernels read the gradient as rows in a row
    return out_UH


def _zeros(
    hidden_UH: torch.Tensor,
    row_Q: torch.Tensor,
    weight_Q: torch.Tensor,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
) -> torch.Tensor:
    """The result of no pairs, of which every input gets a gradient of zeros."""
    out_QH = activate(hidden_UH[row_Q] @ w_in_LHG.sum(0), "swiglu") @ w_out_LFH.sum(0)
    out_QH = out_QH * weight_Q[:, None].to(out_QH.dtype)
    return torch.zeros_like(hidden_UH).index_add(0, row_Q, out_QH)


def _repeat(experts: list[int], sizes: list[int], device: torch.device) -> torch.Tensor:
    """int32: each expert as often as its size says."""
    both = torch.tensor([experts, sizes], dtype=torch.int32).view(2, -1).to(device, non_blocking=True)
    return both[0].repeat_interleave(both[1], output_size=sum(sizes))
