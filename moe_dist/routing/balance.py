"""Balancer state of one layer, and its sum over ranks once per optimiser step.

Shape letters: E experts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.routing.types import Routing

FIXED_POINT = 2.0**24
"""Real numbers are summed as integers in units of 1 / this: exact, so equal on all ranks and in every layout."""


class BalanceState(nn.Module):
    """Counters of the current step, and the values that past steps have left.

    Values are equal on all ranks and are in the checkpoint. Evaluation, recomputation and casts of the model touch neither.
    """

    if TYPE_CHECKING:  # every buffer that is added

        def __getattr__(self, name: str) -> torch.Tensor: ...

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._counters: list[str] = []
        self._batch_loads: list[str] = []
        self.add_value("bias_E", torch.zeros(num_experts))
        self.add_counter("tokens")
        self.add_counter("slots")
        self.add_counter("load_E", num_experts)
        self.add_counter("dropped_E", num_experts)

    def add_value(self, name: str, value: torch.Tensor) -> None:
        """A buffer that is in the checkpoint."""
        self.register_buffer(name, value)

    def add_counter(self, name: str, *shape: int) -> None:
        """An int64 buffer of this rank's counts, which `sum_over_ranks` sums and starts anew."""
        self._counters.append(name)
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int64), persistent=False)

    def add_batch_load(self, name: str, size: int) -> None:
        """An int64 buffer of the step's loads over all ranks, for the loss of that name with scope: global_batch."""
        self._batch_loads.append(name)
        self.register_buffer(f"batch_{name}", torch.zeros(size, dtype=torch.int64), persistent=False)

    def batch_load(self, name: str) -> torch.Tensor:
        """The buffer of `add_batch_load`."""
        return getattr(self, f"batch_{name}")

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is in the checkpoint, by name without shape letters."""
        for name in self.state_dict():
            yield re.sub("_[A-Z]+$", "", name), getattr(self, name)

    def counters(self) -> dict[str, torch.Tensor]:
        """The counters by name."""
        return {name: getattr(self, name) for name in self._counters}

    def start_anew(self) -> None:
        """Zero the counts of the step."""
        for counter in (*self.counters().values(), *map(self.batch_load, self._batch_loads)):
            counter.zero_()

    def count(self, routing: Routing, num_tokens: int | torch.Tensor) -> None:
        """Add the load of one training forward with so many tokens that are not padding. Call it behind `counts_now`."""
        self.tokens += num_tokens
        self.load_E += routing.load_E
        if routing.dropped_E is not None:
            self.dropped_E += routing.dropped_E
        if routing.pairs_per_expert is not None:
            self.slots += routing.pairs_per_expert * len(routing.load_E)

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
    """Whether this forward runs inside a backward pass, that is, to recompute checkpointed activations.

    Compiled code cannot ask: a compiled layer inside a checkpoint is counted twice, a checkpoint inside it once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


Totals = dict[str, torch.Tensor]
"""The counters of one layer, int64, summed over all ranks."""


def sum_over_ranks(states: Sequence[BalanceState], group: dist.ProcessGroup | None) -> list[Totals]:
    """The counters of the step over all ranks, by one all-reduce for all layers; the counters start anew.

    Args:
        states: one for each MoE layer, in the same order on all ranks of `group`.
        group: all ranks that hold different tokens; None for one rank.
    """
    if not states:
        return []
    counters = [counter for state in states for counter in state.counters().values()]
    flat = torch.cat([counter.flatten() for counter in counters])
    if group is not None:
        dist.all_reduce(flat, group=group)
    parts = iter(flat.split([counter.numel() for counter in counters]))
    totals = [{name: next(parts).view(counter.shape) for name, counter in state.counters().items()} for state in states]
    for state in states:
        state.start_anew()
    return totals


def to_fixed_point(value: torch.Tensor) -> torch.Tensor:
    """int64, for counters of real numbers."""
    return (value.double() * FIXED_POINT).round().to(torch.int64)


def from_fixed_point(total: torch.Tensor) -> torch.Tensor:
    """float64 of a sum of `to_fixed_point`."""
    return total.double() / FIXED_POINT
