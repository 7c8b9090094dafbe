"""Triton kernels for GPUs, each with a torch reference of the same signature in `moe_dist.kernels.reference`.

    router        scores, top-k, weights and loads in one launch
    sorting       stable counting sort of pairs by expert
    grouped_gemm  one GEMM an expert, rows of the left operand gathered while they are read
    swiglu        SwiGLU forward and backward, with the gradient of the row weights
    combine       weighted sum of a token's rows, and its backward
    solvers       Sinkhorn and dual iterations of a routing group in one launch

And for CPUs, without triton: `onednn`, float32 products where MKL uses only part of the processor.

The Triton modules import triton; this one does not, nor does anything import them before `why_not()` said None. What
they launch is checked on shapes, types and devices of its tensors (ValueError), never on their contents: the host does
not wait.
"""

from importlib.util import find_spec

import torch


def why_not() -> str | None:
    """The reason why the kernels cannot run in this process; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed; it comes with torch for CUDA, or by pip install triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, to test them"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which bfloat16 products need"
    return None


def available() -> bool:
    """Whether the kernels can run in this process; `why_not` has the reason if not."""
    return why_not() is None


def interpreted() -> bool:
    """Whether triton interprets the kernels on the CPU: TRITON_INTERPRET=1 was set before triton was imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)
