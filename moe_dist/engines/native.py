"""The native engine: the model by PyTorch alone, sharded or replicated by FSDP2."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config import Config, Layout
from moe_dist.engines.batch import Batch
from moe_dist.engines.engine import Engine
from moe_dist.engines.forward import build_model, model_loss, parts_of
from moe_dist.engines.optimizer import (
    build_optimizer,
    clip,
    drop_gradients,
    local_parameters,
    squared_norm,
    take_gradients,
)
from moe_dist.engines.sharding import distribute
from moe_dist.engines.state import create_moments, engine_state, set_updates
from moe_dist.model.names import global_tensors, local_tensor
from moe_dist.parallel.groups import build_groups


class NativeEngine(Engine):
    """See Engine."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, vocab_size: int) -> None:
        self.groups = build_groups(layout.expert, device, layout.expert_tensor)
        super().__init__(config, layout, device, self.groups.data_rank)
        self.model = build_model(
            config, layout, vocab_size, device, self.precision, self.groups.expert_parallel_group, self.all_ranks
        )
        self._sharded = distribute(self.model, self.groups, config.engine)
        self.parameters = local_parameters(self.model)
        self.optimizer = build_optimizer(self.parameters, config.training.optimizer)
        create_moments(self.optimizer, [p.local for p in self.parameters])
        self.watch(self.model.moe_layers)

    def accumulate(self, batches: list[Batch], num_targets: int, num_tokens: int, step: int = 0) -> torch.Tensor:
        """See Engine. Gradients are reduced while the last micro-batch runs backward."""
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            for module in self._sharded:
                module.set_requires_gradient_sync(number == len(batches) - 1, recurse=False)
            loss = self.loss(batch, batch.num_tokens() / max(1, num_tokens), step)
            (loss / max(1, num_targets)).backward()
            loss_sum += loss.detach()
        return loss_sum

    def loss_and_norm(self, loss_sum: torch.Tensor) -> tuple[float, float]:
        """See Engine."""
        take_gradients(self.parameters)
        totals = torch.stack([loss_sum, squared_norm(self.parameters)])
        if self.all_ranks is not None:
            dist.all_reduce(totals)
        loss, norm = totals.tolist()
        return loss, math.sqrt(norm) if norm >= 0 else math.nan

    def update(self, norm: float, learning_rate: float) -> None:
        """See Engine."""
        max_norm = self.config.training.optimizer.max_grad_norm
        if max_norm is not None:
            clip(self.parameters, norm, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """See Engine."""
        drop_gradients(self.parameters)

    def loss(self, batch: Batch, share: float, step: int = 0) -> torch.Tensor:
        """See Engine."""
        batch = batch.to(self.device)
        return model_loss(self.model, batch, batch.tokens(share, step), self.precision)

    def set_training(self, training: bool) -> None:
        """See Engine."""
        self.model.train(training)
        if training:
            for module in self._sharded:
                module.reshard()  # only backward would do so for the outermost one

    def parts(self) -> Mapping[str, nn.Module]:
        """See Engine."""
        return parts_of(self.model)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Engine."""
        return global_tensors(self.model, _gradient)

    def state(self) -> dict[str, torch.Tensor]:
        """See Engine. The tensors are views: writing into them changes the model and the optimiser."""
        return engine_state(self.model, self.parameters, self.optimizer)

    def take_state(self, state: dict[str, torch.Tensor]) -> None:
        """See Engine."""
        set_updates(self.optimizer, state["optimizer.updates"])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return local_tensor(parameter.grad)
