"""The native engine: one optimiser step of the model on all ranks, by PyTorch alone.

The divisor of the loss is the number of target tokens of the whole optimiser step, over all ranks and micro-batches.

Shape letters: N MoE layers, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from moe_dist.config import Config, Layout
from moe_dist.config.layout import owner_of_expert
from moe_dist.dispatch.exchange import build_exchange
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.optimizer import (
    build_optimizer,
    clip,
    drop_gradients,
    local_parameters,
    squared_norm,
    take_gradients,
)
from moe_dist.engines.overlap import choose_num_chunks
from moe_dist.engines.sharding import distribute
from moe_dist.engines.state import create_moments, engine_state
from moe_dist.model import Transformer
from moe_dist.parallel.environment import ranks_of_a_node
from moe_dist.parallel.groups import build_groups
from moe_dist.placement import ExpertMap
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


class NativeEngine:
    """Model, groups and optimiser of one rank. Every method is collective: all ranks call it alike."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, vocab_size: int) -> None:
        self.config, self.layout, self.device = config, layout, device
        self.groups = build_groups(layout.expert, device, layout.expert_tensor)
        self.data_rank = self.groups.data_rank
        self._all_ranks = dist.group.WORLD if layout.data > 1 else None
        self.precision = resolve_precision(config.training.precision, device)
        overlap_chunks = config.parallel.overlap_chunks
        expert_map, group = ExpertMap.from_owners(owner_of_expert(config)), self.groups.expert_parallel_group
        self.model = Transformer(
            config,
            vocab_size,
            group,
            self._all_ranks,
            expert_map,
            layout.expert_tensor,
            build_exchange(config, expert_map.sliced(layout.expert_tensor), group),
            1 if overlap_chunks == "auto" else overlap_chunks,
        ).to(device, torch.float64 if self.precision == "float64" else torch.float32)
        if config.model.compile:
            for block in self.model.blocks():
                for part in (block.attention, block.ffn):
                    if part is not None:
                        part.compile()
        if overlap_chunks == "auto":
            self._choose_num_chunks(vocab_size)
        self._sharded = distribute(self.model, self.groups, config.engine)
        self.parameters = local_parameters(self.model)
        self.optimizer = build_optimizer(self.parameters, config.training.optimizer)
        create_moments(self.optimizer)
        self.routers = [layer.router for layer in self.model.moe_layers.values()]
        for router in self.routers:
            router.tolerates_nonfinite = True  # train_step skips such a step, and first_nonfinite names the layer
        node = ranks_of_a_node(config.parallel.ranks_per_node)
        self.recorders = {number: LayerRecorder(device, node) for number in self.model.moe_layers}
        for number, layer in self.model.moe_layers.items():
            layer.recorder = self.recorders[number]

    def _choose_num_chunks(self, vocab_size: int) -> None:
        training, layers = self.config.training, list(self.model.moe_layers.values())
        sequences = training.micro_batch_size or training.global_batch_size // self.layout.data
        chosen = choose_num_chunks(
            layers[0], sequences, training.sequence_length, vocab_size, self.precision == "bfloat16"
        )
        for layer in layers:
            layer.set_num_chunks(chosen)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by global name; see moe_dist.engines.state."""
        return engine_state(self.model, self.parameters, self.optimizer)

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        """Add up host numbers over all ranks, without the device."""
        total = torch.tensor(values)
        dist.all_reduce(total)
        return total.tolist()

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
        take_gradients(self.parameters)
        totals = torch.stack([loss_sum, squared_norm(self.parameters)])
        if self._all_ranks is not None:
            dist.all_reduce(totals)
        totals_N = sum_over_ranks([router.balance for router in self.routers], self._all_ranks)
        loss, norm = totals.tolist()  # waits for the device: whether to update is decided here
        loss, norm = loss / max(1, num_targets), math.sqrt(norm) if norm >= 0 else math.nan
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self._update(norm, learning_rate)
            for router, totals_of_layer in zip(self.routers, totals_N, strict=True):
                router.update(totals_of_layer, bias_rate)
        drop_gradients(self.parameters)
        return StepResult(loss, norm, skipped, totals_N)

    def accumulate(self, batches: list[Batch], num_targets: int, num_tokens: int, step: int = 0) -> torch.Tensor:
        """Forward and backward of all micro-batches. Returns this rank's summed loss, float64 []."""
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            for module in self._sharded:
                module.set_requires_gradient_sync(number == len(batches) - 1, recurse=False)
            loss = self._loss(batch, batch.num_tokens() / max(1, num_tokens), step)
            (loss / max(1, num_targets)).backward()
            loss_sum += loss.detach()
        return loss_sum

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], as_trained: bool = False) -> tuple[float, int, torch.Tensor]:
        """Loss summed over the targets of all ranks, in nats, their number, and the load_NE of all layers.

        Args:
            as_trained: route by the method's rule of training, whatever routing.evaluation says.
        """
        self.model.eval()
        for router in self.routers:
            router.as_trained = as_trained or self.config.routing.evaluation == "as_trained"
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._loads() as load_NE:
            for batch in batches:
                loss_sum += self._loss(batch, share=0.0)
        for module in self._sharded:
            module.reshard()  # only backward would do so for the outermost one
        if self._all_ranks is not None:
            dist.all_reduce(loss_sum)
            dist.all_reduce(load_NE)
        (num_targets,) = self.sum_over_ranks([sum(batch.num_targets() for batch in batches)])
        return loss_sum.item(), num_targets, load_NE

    @torch.no_grad()
    def first_nonfinite(self, batches: list[Batch]) -> str:
        """The first part of the model, in the order of the forward pass, whose output is not finite on some rank."""
        parts = ("attention", "moe", "ffn")
        layers = [
            f"layers.{i}.{p}" for i, b in enumerate(self.model.blocks()) for p in parts if getattr(b, p) is not None
        ]
        names = ["embedding", *layers, "norm", ""]  # the last is the whole model: its logits
        first = torch.tensor(len(names))  # place in names

        def check(place: int) -> RemovableHandle:
            def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
                if not output.isfinite().all():
                    first.clamp_(max=place)

            return self.model.get_submodule(names[place]).register_forward_hook(hook)

        handles = [check(place) for place in range(len(names))]
        for batch in batches:
            self._loss(batch, share=0.0)
        for handle in handles:
            handle.remove()
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == len(names):
            return "a gradient, while all outputs are finite"
        return f"the output of {names[first]}" if names[first] else "the logits"

    def _loss(self, batch: Batch, share: float, step: int = 0) -> torch.Tensor:
        """Cross-entropy summed over the targets of a micro-batch."""
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits_BSV = self.model(batch.input_BS, batch.tokens(share, step), batch.document_BS)
        logits_TV = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
        return functional.cross_entropy(logits_TV, batch.target_BS.flatten(), ignore_index=IGNORED, reduction="sum")

    def _update(self, norm: float, learning_rate: float) -> None:
        max_norm = self.config.training.optimizer.max_grad_norm
        if max_norm is not None:
            clip(self.parameters, norm, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    @contextmanager
    def _loads(self) -> Iterator[torch.Tensor]:
        """A counter [N, E] of what the routers choose inside the block."""
        layers = list(self.model.moe_layers.values())
        load_NE = torch.zeros(len(layers), self.config.moe.num_experts, dtype=torch.int64, device=self.device)

        def count(router: nn.Module, args: object, routing: Routing) -> None:
            load_NE[places[router]] += routing.load_E

        places: dict[nn.Module, int] = {layer.router: n for n, layer in enumerate(layers)}
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
