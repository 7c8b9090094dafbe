"""Tensor parallelism of the deepspeed engine: Megatron-Core's groups as DeepSpeed's `mpu`, and the model cut over them.

The ranks of a tensor-parallel group hold the same tokens. Attention, dense FFNs and shared experts are cut as Megatron-LM
cuts them (arXiv 1909.08053, section 3): heads and FFN width over the ranks, one all-reduce of each part's output in forward and
of its input's gradient in backward. Of the routed experts each rank serves its share of the tokens (TensorShare). Embedding,
output, norms and routers are whole, and their gradients are the same on all ranks of a group.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config import Config
from moe_dist.engines.megatron_groups import megatron_context, quiet_import
from moe_dist.model import Transformer

CUT = {"w_query": 0, "w_key": 0, "w_value": 0, "w_out": 1, "w_gate": 0, "w_up": 0, "w_down": 1}
"""The dimension of a matrix along which it is cut, of the parts that are."""


class TensorParallel:
    """DeepSpeed's `mpu`: what its engine, groups and ZeRO ask for. Without pipeline stages, model parallel is tensor parallel."""

    def __init__(self, config: Config) -> None:
        """Collective: makes Megatron-Core's groups, or finds them made."""
        if config.engine.emulate_cuda and dist.get_rank() == 0:
            print(
                "engine.emulate_cuda: Megatron-Core's part runs on the CPU, for trying and testing only",
                file=sys.stderr,
            )
        with quiet_import():
            from megatron.core import parallel_state
        self.inside: Callable[[], AbstractContextManager[None]] = megatron_context(config)
        """A context for forward and backward: in it, on a CPU, Megatron-Core's functions find the CUDA device they ask for."""
        with self.inside():
            self.group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
            self.data_group: dist.ProcessGroup = parallel_state.get_data_parallel_group()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_model_parallel_rank(self) -> int:
        return self.group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.group.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_global_rank(self.group, 0)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data_group.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data_group)

    # The model, and whole tensors of it.

    def split(self, model: Transformer) -> None:
        """Keep of a whole model the part of this rank, marked as DeepSpeed's gradient norm reads it."""
        with quiet_import():
            from moe_dist.engines.megatron_layer import TensorShare
        for block in model.blocks():
            for part in (block.attention, block.ffn, block.moe and block.moe.shared):
                if part is not None:
                    self._split(part)
            if block.moe is not None:
                block.moe.exchange = TensorShare(block.moe.expert_map, block.moe.expert_parallel_group, self.group)
                for parameter in block.moe.experts.parameters():
                    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def whole(self, parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
        """A weight, gradient or moment from its parts on all ranks; collective."""
        if not is_cut(parameter):
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.group.size())]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, dim=_dimension(parameter))

    def part_of(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole weight or moment."""
        return whole.chunk(self.group.size(), _dimension(parameter))[self.group.rank()] if is_cut(parameter) else whole

    def whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole weight."""
        shape = list(parameter.shape)
        if is_cut(parameter):
            shape[_dimension(parameter)] *= self.group.size()
        return torch.Size(shape)

    def _split(self, part: nn.Module) -> None:
        for name, parameter in part.named_parameters():
            dimension = CUT.get(name.removesuffix(".weight"))
            if dimension is None:  # used by each rank with its own heads or width: norms of queries and keys, a gate
                parameter.register_hook(partial(_summed, group=self.group))
                continue
            parameter.tensor_model_parallel, parameter.partition_dim = True, dimension  # type: ignore[attr-defined]
            parameter.data = self.part_of(parameter, parameter.data).contiguous()
        part.register_forward_pre_hook(lambda module, args: (_Copy.apply(args[0], self.group), *args[1:]))
        part.register_forward_hook(lambda module, args, output: _Sum.apply(output, self.group))


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether each rank of a tensor-parallel group has a part of it."""
    return hasattr(parameter, "partition_dim")


def _dimension(parameter: Any) -> int:
    return parameter.partition_dim


def _summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)  # what autograd hands over may be shared
    dist.all_reduce(total, group=group)
    return total


class _Copy(torch.autograd.Function):
    """Megatron-LM's f: the input of a part that is cut; its gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Megatron-LM's g: the output of a part that is cut, summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _summed(output, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
