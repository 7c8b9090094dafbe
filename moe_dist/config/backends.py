"""What the optional expert backends can compute, for the checks of a config and for the backends themselves."""

from typing import NamedTuple


class Limits(NamedTuple):
    """What one backend takes."""

    title: str
    precisions: tuple[str, ...]
    activations: tuple[str, ...]
    multiple: int
    """Of model.hidden_size, and of moe.ffn_size or the slice of it that a rank has."""


LIMITS = {
    "triton": Limits("the Triton backend", ("bfloat16", "float32", "float16"), ("swiglu",), 1),
    # In float32 its GEMMs always round to TF32 (common/gemm/cublaslt_gemm.cu), which would not be the same training.
    "transformer_engine": Limits("TransformerEngine", ("bfloat16", "float16"), ("swiglu", "gelu"), 1),
    "sonic": Limits("SonicMoE", ("bfloat16",), ("swiglu",), 8),
    "fp8": Limits("fp8", ("bfloat16",), ("swiglu", "gelu"), 16),
}


def backend_problem(name: str, precision: str, activation: str, widths: tuple[int, int]) -> str | None:
    """Why an optional backend does not compute such experts on any device, and what to use instead; None if it does.

    Args:
        precision: of the rows, such as bfloat16.
        widths: H and F.
    """
    limits = LIMITS[name]
    if precision not in limits.precisions:
        names = " or ".join(limits.precisions)
        return (
            f"{limits.title} computes experts in {names}, not in {precision}; use auto, or training.precision: bfloat16"
        )
    if activation not in limits.activations:
        names = " or ".join(limits.activations)
        return f"{limits.title} computes moe.activation: {names}, not {activation}; use auto, or that activation"
    if any(width % limits.multiple for width in widths):
        return (
            f"{limits.title} needs a multiple of {limits.multiple} as model.hidden_size and as moe.ffn_size on each rank, "
            f"not {widths[0]} and {widths[1]}; use auto, or other widths"
        )
    return None
