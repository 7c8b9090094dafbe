"""Lets peers run where something is missing that the timed path does not need.

Megatron-Core 0.16.1's MoE layer takes a CUDA device for granted. On a CPU every operation has finished when it returns,
so streams and events have nothing to do, and "the current device" is the CPU. Nothing inside the timed path is wrapped:
the layer runs its own code at full speed.
"""

import contextlib
import importlib.util
import sys
import types

import torch


class _FinishedWork:
    """Stands for a CUDA stream or event: whatever is waited for has already happened."""

    def record_event(self) -> "_FinishedWork":
        return self

    def wait_stream(self, other: "_FinishedWork") -> None:
        pass

    def synchronize(self) -> None:
        pass


_FINISHED = _FinishedWork()


def mend_megatron() -> None:
    """What 0.16.1's router reads, but defines only where TransformerEngine is installed."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def run_megatron_on_cpu() -> None:
    """Make the layer usable in this process, before one is built."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.Stream = _FinishedWork  # a class: transformers has annotations of it
    torch.cuda.current_stream = lambda: _FINISHED
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    # The original leaves CPU tensors as tensors, but all_to_all_single wants the splits as plain numbers.
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _on_host(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def give_megatron_grouped_gemm() -> None:
    """Stand in for the package grouped_gemm, which only builds with nvcc, by torch's grouped GEMM."""
    from megatron.core.transformer.moe import grouped_gemm_util

    if not grouped_gemm_util.grouped_gemm_is_available():
        grouped_gemm_util.grouped_gemm = grouped_gemm_util.ops = types.SimpleNamespace(gmm=_grouped_gemm)
        grouped_gemm_util.grouped_gemm.ops = grouped_gemm_util.ops


def _grouped_gemm(rows_RH, weight_LHG, rows_per_expert_L, trans_b: bool = False):
    assert not trans_b
    ends_L = rows_per_expert_L.cumsum(0, dtype=torch.int32).to(rows_RH.device)
    return torch.nn.functional.grouped_mm(rows_RH, weight_LHG, offs=ends_L)


def import_torchtitan_without_triton() -> None:
    """Without Triton, leave out a dispatcher of torchtitan 0.3.0 that its MoE layer imports but is not configured for."""
    name = "torchtitan.distributed.minimal_async_ep"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        absent = dict.fromkeys(("combine_op", "dispatch_op", "init_buffer", "MinimalAsyncEPDispatchMetadata"))
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(absent)
