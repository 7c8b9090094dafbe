"""Float32 products by oneDNN on processors of which MKL uses only part.

Which library computes must not be found out by timing: another answer after a restart would round otherwise, and the run
would no longer be the same. So it follows from the processor and the shape.

Shape letters: M and N rows and columns of a product, K what is summed over.
"""

from contextlib import suppress
from pathlib import Path

import torch


def _amd_family() -> int:
    """The family of an AMD processor, 0 of any other: 23 is Zen and Zen 2, 25 Zen 3 and 4, 26 Zen 5."""
    with suppress(OSError, StopIteration):
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        values = {key.strip(): value.strip() for key, value in reversed(lines)}
        return int(values["cpu family"]) if values.get("vendor_id") == "AuthenticAMD" else 0
    return 0


AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FASTER = AVAILABLE and _amd_family() > 0
"""Whether oneDNN is faster here."""
FASTER_TRANSPOSED = AVAILABLE and _amd_family() >= 26
"""Whether it is also where the first factor is a transposed matrix, as in weight gradients."""
_LARGE_PRODUCT = 2**26
"""Multiplications from which it pays that oneDNN builds a kernel for each shape it meets, once."""


def linear(x_MK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """[M, N] x w^T of two float32 matrices."""
    return torch.ops.mkldnn._linear_pointwise.default(x_MK, w_NK, None, "none", [], "")


def matmul(x_MK: torch.Tensor, y_KN: torch.Tensor) -> torch.Tensor:
    """[M, N] x y: by oneDNN if they are large float32 matrices on a CPU and it is faster there, else by torch."""
    large = x_MK.numel() * y_KN.shape[1] >= _LARGE_PRODUCT
    suits = large and x_MK.device.type == "cpu" and x_MK.element_size() == 4
    if suits and (FASTER if x_MK.is_contiguous() else FASTER_TRANSPOSED):
        return linear(x_MK, y_KN.t())
    return x_MK @ y_KN
