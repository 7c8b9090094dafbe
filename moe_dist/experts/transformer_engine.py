"""Experts by NVIDIA TransformerEngine's grouped linear: one cuBLASLt GEMM an expert, spread over several streams.

Called is `general_grouped_gemm`, which TransformerEngine's `GroupedLinear` module itself is made of, and not the module: a
module keeps one parameter [out, in] an expert, so that our stacks [L, in, out] would be transposed and copied on the way in
and their gradients on the way back. The function takes any of the three layouts; with it nothing is copied and the gradients
of all experts are written straight into one stack.

Signature and layouts: transformer_engine 2.20.2, `transformer_engine/pytorch/cpp_extensions/gemm.py`; the same since 2.11.
Not run on hardware.

Shape letters: R rows, L experts on this rank, K and N width of the rows that go into a product and that come out.
"""

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch

from moe_dist.config.backends import backend_problem
from moe_dist.dispatch.types import Segments
from moe_dist.experts.grouped import compute_by_product
from moe_dist.experts.types import Activation

_MODULE = "transformer_engine.pytorch.cpp_extensions"
_ARGUMENTS = ("A", "B", "out", "quantization_params", "out_dtype", "layout", "m_splits", "single_output")


def compute_transformer_engine(
    rows_RH: torch.Tensor,
    segments: Segments,
    w_in_LHG: torch.Tensor,
    w_out_LFH: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """See moe_dist.experts.backends; bfloat16 or float16 on a CUDA device."""
    return compute_by_product(_GroupedLinear.apply, rows_RH, segments, w_in_LHG, w_out_LFH, activation)


def why_not(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], activation: Activation) -> str | None:
    """None if this backend computes such experts here, else the reason and what to use instead."""
    if device.type != "cuda":
        return f"TransformerEngine runs on CUDA devices, not on {device.type}; use auto"
    if problem := backend_problem("transformer_engine", str(dtype).removeprefix("torch."), activation, widths):
        return problem
    if importlib.util.find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed; pip install 'transformer_engine[pytorch]', or use auto"
    try:
        found = _arguments(_grouped_gemm())
    except (ImportError, OSError, AttributeError) as error:
        return f"TransformerEngine is installed but cannot be used ({error}); repair the installation, or use auto"
    if missing := [name for name in _ARGUMENTS if name not in found]:
        return f"this TransformerEngine's general_grouped_gemm has no {', '.join(missing)}; install 2.11 or newer, or use auto"
    return None


def _grouped_gemm() -> Any:
    """Imported when first used: importing TransformerEngine takes seconds and loads CUDA libraries."""
    return importlib.import_module(_MODULE).general_grouped_gemm


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    """Kept, because it is asked before every forward."""
    return frozenset(inspect.signature(function).parameters)


class _GroupedLinear(torch.autograd.Function):
    """(rows_RK, w_LKN, sizes_L) -> rows_RN.

    TransformerEngine names layouts as BLAS does, in column-major order. For row-major tensors A and B: "NN" is B A, "TN" is
    B A^T and "NT" is B^T A.
    """

    @staticmethod
    def forward(ctx: Any, rows_RK: torch.Tensor, w_LKN: torch.Tensor, sizes_L: list[int]) -> torch.Tensor:
        rows_RK, w_LKN = rows_RK.contiguous(), w_LKN.contiguous()
        ctx.save_for_backward(rows_RK, w_LKN)
        ctx.sizes_L = sizes_L
        return _product(rows_RK, w_LKN, sizes_L, "NN", w_LKN.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        d_out_RN = grads[0].contiguous()
        rows_RK, w_LKN = ctx.saved_tensors
        d_rows_RK = d_w_LKN = None
        if ctx.needs_input_grad[0]:
            d_rows_RK = _product(d_out_RN, w_LKN, ctx.sizes_L, "TN", w_LKN.shape[1])
        if ctx.needs_input_grad[1]:
            d_w_LKN = torch.empty_like(w_LKN)
            _run(d_out_RN.split(ctx.sizes_L), rows_RK.split(ctx.sizes_L), list(d_w_LKN), ctx.sizes_L, layout="NT")
        return d_rows_RK, d_w_LKN, None


def _product(rows: torch.Tensor, w_L: torch.Tensor, sizes_L: list[int], layout: str, width: int) -> torch.Tensor:
    """The rows of each expert times its matrix, or the transposed matrix, in one new tensor [R, width]."""
    out = rows.new_empty(len(rows), width)
    _run(list(w_L), rows.split(sizes_L), [out], sizes_L, layout=layout, single_output=True)
    return out


def _run(a: Any, b: Any, out: list[torch.Tensor], sizes_L: list[int], layout: str, single_output: bool = False) -> None:
    if not any(sizes_L):  # no GEMM at all; outputs of weights are zeros, others have no rows
        for tensor in out:
            tensor.zero_()
        return
    _grouped_gemm()(
        list(a),
        list(b),
        out,
        [None] * len(sizes_L),  # quantization_params: no fp8
        out[0].dtype,
        layout=layout,
        m_splits=sizes_L,
        single_output=single_output,
    )
