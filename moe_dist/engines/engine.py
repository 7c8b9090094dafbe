"""What all engines share: one optimiser step from its parts, evaluation, and the search for what is not finite.

The divisor of the loss is the number of target tokens of the whole optimiser step, over all ranks and micro-batches.

Shape letters: N MoE layers, E experts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_dist.config import Config, Layout
from moe_dist.engines.batch import Batch
from moe_dist.layer import MoELayer
from moe_dist.parallel.environment import ranks_of_a_node
from moe_dist.routing import Routing
from moe_dist.routing.balance import Totals, sum_over_ranks
from moe_dist.telemetry.recorder import LayerRecorder


@dataclass(frozen=True)
class StepResult:
    """What a step gave, over all ranks."""

    loss: float
    """Mean cross-entropy of the targets, in nats."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Loss or gradient was not finite; no weight, moment or bias has changed."""
    totals: list[Totals]
    """Of each MoE layer the counters of its router, on the device."""

    @property
    def load_NE(self) -> torch.Tensor:
        """int64: pairs per layer and expert before any drop."""
        return torch.stack([totals["load_E"] for totals in self.totals])

    @property
    def dropped_NE(self) -> torch.Tensor:
        """int64: pairs that capacity removed."""
        return torch.stack([totals["dropped_E"] for totals in self.totals])


class Engine(ABC):
    """Model, groups and optimiser of one rank. Every method is collective: all ranks call it alike."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, data_rank: int) -> None:
        self.config, self.layout, self.device, self.data_rank = config, layout, device, data_rank
        self.precision = resolve_precision(config.training.precision, device)
        self.all_ranks = dist.group.WORLD if layout.num_ranks > 1 else None
        self.data_group = self.all_ranks
        """The ranks that hold different tokens and the same layers; None for one. An engine that splits layers sets it."""
        self.counts_tokens = True
        """False on all but one of the ranks that hold the same tokens and layers. An engine that has such ranks sets it."""

    def watch(self, moe_layers: dict[int, MoELayer]) -> None:
        """Take the routers and recorders of this rank's MoE layers, by layer number."""
        self.moe_layers = moe_layers
        self.routers = [layer.router for layer in moe_layers.values()]
        for router in self.routers:
            router.tolerates_nonfinite = True  # train_step skips such a step, and first_nonfinite names the layer
        self.recorders: dict[int, LayerRecorder] = {}
        if self.config.telemetry.interval is None:
            return
        node = ranks_of_a_node(self.config.parallel.ranks_per_node)
        for number, layer in moe_layers.items():
            sizes = layer.expert_map.num_experts, len(layer.own_experts)
            layer.recorder = LayerRecorder(self.device, *sizes, node, self.counts_tokens)
            self.recorders[number] = layer.recorder

    # What an engine does in its own way.

    @abstractmethod
    def accumulate(self, batches: list[Batch], num_targets: int, num_tokens: int, step: int = 0) -> torch.Tensor:
        """Forward and backward of all micro-batches. Returns this rank's summed loss, float64 [].

        Of ranks that hold the same tokens, all but one return 0.
        """

    @abstractmethod
    def loss_and_norm(self, loss_sum: torch.Tensor) -> tuple[float, float]:
        """After accumulate: the loss summed over all ranks, and the norm of the reduced gradient, each value once."""

    @abstractmethod
    def update(self, norm: float, learning_rate: float) -> None:
        """Clip the gradient of this norm if the config says so, take the optimiser step, and drop the gradient."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradient instead of taking the step."""

    @abstractmethod
    def loss(self, batch: Batch, share: float, step: int = 0) -> torch.Tensor:
        """Cross-entropy summed over the targets of a micro-batch.

        Of ranks that hold the same tokens, all but one return 0.

        Args:
            share: see moe_dist.routing.Tokens.
        """

    @abstractmethod
    def set_training(self, training: bool) -> None:
        """Put the model into training or evaluation; the latter also frees what a training step left gathered."""

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The parts of the whole model in the order of the forward pass; None for those on other ranks."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """After loss_and_norm and before update or drop_gradients: the reduced gradient of every weight by its global name."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by global name; see moe_dist.engines.state."""

    @abstractmethod
    def take_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, once a checkpoint has been read into its tensors."""

    # What an engine with pipeline stages or several ranks for the same tokens does otherwise.

    def of_all_layers(self, values: dict[int, Any]) -> dict[int, Any]:
        """What the ranks of `data_group` agree on, by layer number: of this rank's MoE layers -> of those of all stages."""
        return values

    # What is the same for all.

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        """Add up host numbers over all ranks that hold different tokens, without the device.

        Ranks that hold the same tokens give the same; should one of them alone give 1, the sum is 1.
        """
        total = torch.tensor(values)
        dist.all_reduce(total)
        return [math.ceil(value / self.layout.copies) for value in total.tolist()]

    def train_step(
        self,
        batches: list[Batch],
        num_targets: int,
        num_tokens: int,
        learning_rate: float,
        bias_rate: float,
        step: int = 0,
        observe: bool = False,
    ) -> StepResult:
        """Accumulate the gradient of this rank's micro-batches, reduce it, and take one optimiser step.

        Args:
            batches: this rank's share of the global batch.
            num_targets, num_tokens: of the whole global batch, over all ranks; the divisors of the loss and of the
                auxiliary losses.
            bias_rate: size of the update of the loss-free bias; 0 leaves it as it is.
            step: optimiser steps done before this one: random numbers of the routers depend on it.
            observe: also gather the routers' statistics (moe_dist.routing.observation).
        """
        for router in self.routers:
            router.observing = observe
        loss_sum = self.accumulate(batches, num_targets, num_tokens, step)
        totals_N = sum_over_ranks([router.balance for router in self.routers], self.data_group)
        loss, norm = self.loss_and_norm(loss_sum)  # waits for the device: whether to update is decided here
        loss /= max(1, num_targets)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            self.drop_gradients()
        else:
            self.update(norm, learning_rate)
            for router, totals_of_layer in zip(self.routers, totals_N, strict=True):
                router.update(totals_of_layer, bias_rate)
        totals = self.of_all_layers(dict(zip(self.moe_layers, totals_N, strict=True)))
        return StepResult(loss, norm, skipped, list(totals.values()))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], as_trained: bool = False) -> tuple[float, int, torch.Tensor]:
        """Loss summed over the targets of all ranks, in nats, their number, and the load_NE of all layers.

        Args:
            as_trained: route by the method's rule of training, whatever routing.evaluation says.
        """
        self.set_training(False)
        for router in self.routers:
            router.as_trained = as_trained or self.config.routing.evaluation == "as_trained"
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._loads() as load_NE:
            for batch in batches:
                loss_sum += self.loss(batch, share=0.0)
        if self.all_ranks is not None:
            dist.all_reduce(loss_sum)
        if self.data_group is not None and self.routers:
            dist.all_reduce(load_NE, group=self.data_group)
        loads = self.of_all_layers(dict(zip(self.moe_layers, load_NE, strict=True)))
        (num_targets,) = self.sum_over_ranks([sum(batch.num_targets() for batch in batches)])
        self.set_training(True)
        return loss_sum.item(), num_targets, torch.stack(list(loads.values()))

    @torch.no_grad()
    def first_nonfinite(self, batches: list[Batch]) -> str:
        """The first part of the model, in the order of the forward pass, whose output is not finite on some rank."""
        parts = self.parts()
        first = torch.tensor(len(parts))  # place among them

        def check(place: int, part: nn.Module) -> RemovableHandle:
            def hook(module: nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, Any]) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                if not tensor.isfinite().all():
                    first.clamp_(max=place)

            return part.register_forward_hook(hook)

        handles = [check(place, part) for place, part in enumerate(parts.values()) if part is not None]
        for batch in batches:
            self.loss(batch, share=0.0)
        for handle in handles:
            handle.remove()
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == len(parts):
            return "a gradient, while all outputs are finite"
        return f"the output of {list(parts)[int(first)]}" if first < len(parts) - 1 else "the logits"

    @contextmanager
    def _loads(self) -> Iterator[torch.Tensor]:
        """A counter [N, E] of what the routers choose inside the block."""
        load_NE = torch.zeros(len(self.routers), self.config.moe.num_experts, dtype=torch.int64, device=self.device)

        def count(router: nn.Module, args: object, routing: Routing) -> None:
            load_NE[places[router]] += routing.load_E

        places: dict[nn.Module, int] = {router: n for n, router in enumerate(self.routers)}
        handles = [router.register_forward_hook(count) for router in places]
        yield load_NE
        for handle in handles:
            handle.remove()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device multiplies it fast, else float32."""
    if precision != "auto":
        return precision
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return "bfloat16" if fast else "float32"
