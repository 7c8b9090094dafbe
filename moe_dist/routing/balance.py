"""Balancer state of one layer, and its update once per optimiser step.

Shape letters: N MoE layers, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.routing.types import Routing


class BalanceState(nn.Module):
    """Selection bias and load counters. Equal on all ranks after each update; evaluation and recomputation never touch it."""

    bias_E: torch.Tensor
    load_E: torch.Tensor
    dropped_E: torch.Tensor
    batch_load_E: torch.Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("bias_E", torch.zeros(num_experts))
        # Counts of the current optimiser step: of this rank, and of all ranks for the global_batch loss.
        for name in ("load_E", "dropped_E", "batch_load_E"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def count(self, routing: Routing) -> None:
        """Add the load of one training forward. Call it behind `counts_now`."""
        self.load_E += routing.load_E
        if routing.dropped_E is not None:
            self.dropped_E += routing.dropped_E

    def counts_now(self) -> bool:
        """Whether this forward is one to count: training, with gradients, and not a recomputation.

        Reentrant checkpointing (`use_reentrant=True`) first runs without gradients and then recomputes: it is never counted.
        """
        return self.training and torch.is_grad_enabled() and not is_recomputation()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A cast of the model (bfloat16, half, double) must change neither the bias, whose updates are far below
        # bfloat16's resolution, nor the counts. Only the device follows the model.
        kept = {name: (buffer, buffer.dtype) for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, (before, dtype) in kept.items():
            if getattr(self, name).dtype != dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, that is, to recompute checkpointed activations."""
    return torch._C._current_graph_task_id() != -1


def sum_over_ranks(
    states: Sequence[BalanceState], group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads and drops of the step over all ranks, by one all-reduce of all layers; the counters start anew.

    Args:
        states: one for each MoE layer, in the same order on all ranks of `group`.
        group: all ranks that hold different tokens; None for one rank.

    Returns:
        load_NE and dropped_NE, int64.
    """
    counts_N2E = torch.stack([torch.stack([state.load_E, state.dropped_E]) for state in states])
    if group is not None:
        dist.all_reduce(counts_N2E, group=group)
    for state in states:
        for counter in (state.load_E, state.dropped_E, state.batch_load_E):
            counter.zero_()
    return counts_N2E[:, 0], counts_N2E[:, 1]


def update_biases(states: Sequence[BalanceState], load_NE: torch.Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), centred (arXiv 2408.15664, Algorithm 1).

    The comparison is of integers, so that no rounding can turn a sign. Centring leaves top-k as it is and keeps the mean
    from drifting.
    """
    num_experts = load_NE.shape[1]
    step_NE = torch.sign(load_NE.sum(1, keepdim=True) - num_experts * load_NE).to(torch.float32) * rate
    for state, step_E in zip(states, step_NE, strict=True):
        state.bias_E += step_E
        state.bias_E -= state.bias_E.mean()
