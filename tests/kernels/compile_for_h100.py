"""Compiles every kernel for an H100 and launches none. Prints a line for each: module, name, shared memory, tensor cores.

In a process of its own, where triton finds a driver that only knows its target. Started by test_compiled.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moe_dist.kernels import checks, combine, grouped_gemm, router, solvers, sorting, swiglu

TARGET = GPUTarget("cuda", 90, 32)
_run: Callable[..., Any] = JITFunction.run


class Driver:
    """What triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = _run(self, *arguments, grid=grid, warmup=True, **options)
    tensor_cores = any(word in kernel.asm["ptx"] for word in ("wgmma", "mma.sync"))
    print(self.__module__.split(".")[-1], self.__name__, kernel.metadata.shared, tensor_cores)
    return kernel


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    checks._launch_device = lambda: torch.device("cpu")
    JITFunction.run = compile_only
    for kernel in (grouped_gemm._gemm_kernel, grouped_gemm._weight_grad_kernel):
        kernel.configs = kernel.configs[:1]  # the largest tile

    for score in router.SCORES:
        weight_TK, *_ = router.score_top_k(make(300, 60).requires_grad_(), 8, score, make(60, dtype=torch.float32))
        weight_TK.sum().backward()
    sorting.sort_pairs(make(3000, dtype=torch.int64), 60)
    start_L1, row_P = make(9, dtype=torch.int64), make(512, dtype=torch.int64)
    x_TH, w_LHG, d_out_PG = make(100, 256), make(8, 256, 512), make(512, 512)
    grouped_gemm.grouped_gemm(x_TH, w_LHG, start_L1, row_P)
    grouped_gemm.grouped_gemm(d_out_PG, w_LHG.transpose(1, 2), start_L1)
    grouped_gemm.grouped_weight_grad(x_TH, d_out_PG, start_L1, row_P)
    weight_P, first_T = make(512, dtype=torch.float32), make(64, dtype=torch.int64)
    swiglu.swiglu(d_out_PG)
    combine.combine(d_out_PG, row_P, first_T, weight_P)
    for weights in (weight_P, None):
        swiglu.swiglu_backward(d_out_PG, d_out_PG[:, :256], weights)
        combine.combine_backward(d_out_PG[:64], d_out_PG, row_P, first_T, weights)
    score_GRC, real_GR = make(2, 300, 60, dtype=torch.float32), make(2, 300, dtype=torch.bool)
    solvers.sinkhorn_prices(score_GRC, 8, 0.1, 5, real_GR)
    solvers.dual_iterations(score_GRC, score_GRC[:, 0], make(2, dtype=torch.float32), 8, 50, 3, real_GR)


if __name__ == "__main__":
    main()
