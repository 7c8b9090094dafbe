"""Layers of Megatron-Core 0.16.1 and DeepSpeed 0.19.8 on gloo ranks without a GPU, for as long as a block runs.

Both hand all settings back: other tests run in the same processes, some with these engines.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from moe_dist.engines.cuda_on_cpu import cuda_on_cpu


def topk_as_on_gpu(
    value: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.topk which of equal values takes the first, as its radix selection on a GPU does; on a CPU it takes any.

    Both peers drop by position through it, by comparing ones with zeros.
    """
    values, indices = value.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, int(k)), indices.narrow(dim, 0, int(k))


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """What its MoE layer takes for granted of CUDA and TransformerEngine."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    with ExitStack() as stack:
        stack.enter_context(cuda_on_cpu())
        for owner, name, value in (
            (torch, "topk", topk_as_on_gpu),
            # The original leaves CPU tensors as tensors, but all_to_all_single wants the splits as plain numbers.
            (moe_utils, "maybe_move_tensor_to_cpu", _on_host),
            (token_dispatcher, "maybe_move_tensor_to_cpu", _on_host),
            (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),
            (moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None),  # 1: that of a loss without scaling
        ):
            stack.enter_context(patch.object(owner, name, value))
        # 0.16.1's router reads it, but defines it only where TransformerEngine is installed.
        stack.enter_context(patch.object(moe_utils, "te_general_gemm", None, create=True))
        # Its small compiled functions: compiling them takes longer than all tests, and needs a C++ compiler.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@cache
def megatron_groups() -> Any:
    """All ranks are data and expert parallel, none tensor, context or expert tensor parallel."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    groups = ProcessGroupCollection()
    for name in ("ep", "tp_ep", "tp_dp_cp"):
        setattr(groups, name, dist.group.WORLD)
    for name in ("tp", "cp", "tp_cp", "expt_tp", "expt_dp"):
        setattr(groups, name, alone)
    return groups


@contextmanager
def deepspeed_on_gloo() -> Iterator[None]:
    """Its communication over the running process group, without building its C++ extension for inference."""
    import deepspeed
    from deepspeed.comm import comm

    with (
        patch.object(comm, "cdb", None),
        patch.dict(deepspeed.ops.__compatible_ops__, deepspeed_shm_comm=False),
        patch.object(torch, "topk", topk_as_on_gpu),
    ):
        deepspeed.init_distributed("gloo", verbose=False)
        yield


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
