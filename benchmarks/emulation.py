"""Lets Megatron-Core 0.16.1's MoE layer (alltoall dispatcher, SequentialMLP) run on CPU processes with gloo.

Megatron-Core takes a CUDA device for granted. On a CPU every operation has finished when it returns, so streams and
events have nothing to do, and "the current device" is the CPU. Nothing inside the timed path is wrapped: the layer
runs its own code at full speed.
"""

import contextlib

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


def run_megatron_on_cpu() -> None:
    """Make the layer usable in this process, before one is built."""
    _emulate_cuda()
    _mend_megatron()


def _emulate_cuda() -> None:
    """Point the calls of torch.cuda that the layer makes at the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.Stream = lambda: _FINISHED
    torch.cuda.current_stream = lambda: _FINISHED
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _mend_megatron() -> None:
    """The two places where 0.16.1 fails without CUDA or without TransformerEngine."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.te_general_gemm = None  # read by the router, but defined only where TransformerEngine is installed
    # The original leaves CPU tensors as tensors, but all_to_all_single wants the splits as plain numbers.
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _on_host(tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
