"""One micro-batch's way through the pipeline stages without gradients, for which Megatron-Core's interleaved schedule has no use.

Shape letters: S tokens of a sequence on this rank, B sequences, H hidden.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig


def computing(config: TransformerConfig, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward: Megatron's schedules enter autocast themselves."""
    return torch.autocast(device.type, config.autocast_dtype) if config.enable_autocast else nullcontext()


def receive(config: TransformerConfig, shape_BS: torch.Size, device: torch.device) -> torch.Tensor:
    """Hidden states [S, B, H] from the stage before, from the last one to the first one's next chunk.

    Args:
        shape_BS: of the tokens of the micro-batch, over all ranks that hold parts of its sequences.
    """
    parts = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    shape = (shape_BS[1] // parts, shape_BS[0], config.hidden_size)
    hidden_SBH = torch.empty(shape, dtype=config.pipeline_dtype, device=device)
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.recv(hidden_SBH, dist.get_global_rank(group, (group.rank() - 1) % group.size()), group)
    return hidden_SBH


def send(hidden_SBH: torch.Tensor) -> None:
    """To the stage after, from the last one to the first one's next chunk."""
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.send(hidden_SBH.contiguous(), dist.get_global_rank(group, (group.rank() + 1) % group.size()), group)
