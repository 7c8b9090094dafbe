"""Inputs and results of one expert computation, for tests of backends.

Shape letters: R rows, L experts on this rank, H hidden, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

import torch

from moe_dist.dispatch import Segments
from moe_dist.experts.backends import Compute
from moe_dist.experts.types import Activation

L, H, F = 3, 16, 32
SEGMENTS = {
    "one each": Segments([3, 2, 4], [0, 1, 2]),
    "an empty expert": Segments([3, 0, 4], [0, 1, 2]),
    "empty at the ends": Segments([0, 5, 0], [0, 1, 2]),
    "several each": Segments([3, 2, 4, 1, 5, 2], [0, 1, 2] * 2),
    "several each, some empty": Segments([0, 2, 0, 1, 0, 0, 3, 0, 0], [0, 1, 2] * 3),
    "an expert without segments": Segments([2, 3], [2, 0]),
    "no rows": Segments([0, 0, 0], [0, 1, 2]),
    "no rows from two ranks": Segments([0] * 6, [0, 1, 2] * 2),
}


def make_inputs(num_rows: int, activation: Activation, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows and both weight stacks: the same numbers, representable in bfloat16, in every format."""
    generator = torch.Generator().manual_seed(0)
    width = 2 * F if activation == "swiglu" else F
    shapes = [(num_rows, H), (L, H, width), (L, F, H)]
    draws = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [draw.to(dtype).requires_grad_() for draw in draws]


def run(
    compute: Compute, segments: Segments, activation: Activation, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """The output and the gradients of rows and weights, on the CPU."""
    inputs = make_inputs(sum(segments.sizes), activation, dtype)
    rows_RH, w_in_LHG, w_out_LFH = (x.to(device) for x in inputs)
    out_RH = compute(rows_RH, segments, w_in_LHG, w_out_LFH, activation)
    sent_RH = torch.linspace(-1, 1, out_RH.numel()).bfloat16().view(out_RH.shape)
    out_RH.backward(sent_RH.to(device, dtype))
    return [out_RH.detach().cpu(), *(x.grad for x in inputs)]
