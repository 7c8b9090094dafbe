"""The deepspeed engine: the model under deepspeed.initialize, with ZeRO 0 to 3.

DeepSpeed takes the mean of gradients over all ranks (for experts: their sum over the ranks that hold the same ones, divided by
the number of all ranks). Ours are sums, so the loss is multiplied by the number of ranks, and so are auxiliary losses.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from moe_dist.config.support import cannot_import

try:
    import deepspeed
except ModuleNotFoundError as error:
    raise cannot_import("deepspeed", error) from None

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import groups, safe_set_full_grad, safe_set_local_grad, set_z3_leaf_modules
from torch import nn

from moe_dist.config import Config, Layout
from moe_dist.config.deepspeed import deepspeed_tree
from moe_dist.engines.batch import Batch
from moe_dist.engines.deepspeed_layer import (
    DeepSpeedMoELayer,
    expert_group,
    join_process_group,
    moe_layer,
    parameter_groups,
)
from moe_dist.engines.deepspeed_state import (
    base_optimizer,
    create_all_moments,
    full_gradient,
    full_moment,
    full_shape,
    full_weight,
    set_moments,
    set_weights,
)
from moe_dist.engines.deepspeed_tensor import TensorParallel, is_cut
from moe_dist.engines.engine import Engine
from moe_dist.engines.forward import build_model, model_loss, parts_of
from moe_dist.engines.optimizer import LocalParameter, clip, optimizer_of, squared_norm
from moe_dist.engines.state import Source, moments_of, named_state, set_updates
from moe_dist.layer import MoELayer
from moe_dist.model.names import global_tensors

__all__ = ["DeepSpeedEngine", "DeepSpeedMoELayer", "moe_layer", "parameter_groups"]


class DeepSpeedEngine(Engine):
    """See Engine."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, vocab_size: int) -> None:
        super().__init__(config, layout, device, dist.get_rank() // layout.tensor)
        self.stage = config.engine.zero_stage
        if self.stage == 0:
            self.precision = "float32"  # bfloat16 is refused, and auto means this
        # The norms of queries and keys are taken in float32 with bfloat16 weights.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it even where nothing was launched
        join_process_group()
        self.tensor = TensorParallel(config) if layout.tensor > 1 else None
        groups.mpu = self.tensor  # global in DeepSpeed, which would keep that of an engine before
        self.inside = self.tensor.inside if self.tensor else nullcontext
        # Ranks that hold the same tokens serve each its share of them, so experts have gradients of their own on each.
        as_experts = layout.expert > 1 or self.tensor is not None
        group = expert_group(layout.expert) if as_experts else None
        kind = DeepSpeedMoELayer if as_experts else MoELayer
        if self.tensor is not None:
            self.data_group = self.tensor.data_group
        self.model = build_model(config, layout, vocab_size, device, self.precision, group, self.data_group, kind)
        if self.tensor is not None:
            self.tensor.split(self.model)
        if self.stage == 3:
            set_z3_leaf_modules(self.model, [MoELayer])  # gathered as one, whichever experts have rows
        optimizer = config.training.optimizer
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=optimizer_of(parameter_groups(self.model, optimizer.weight_decay), optimizer),
            config=deepspeed_tree(config, layout, self.precision == "bfloat16"),
            mpu=self.tensor,
        )
        create_all_moments(self.deepspeed)
        self.watch(self.model.moe_layers)

    def accumulate(self, batches: list[Batch], num_targets: int, num_tokens: int, step: int = 0) -> torch.Tensor:
        """See Engine."""
        self.deepspeed.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            with self.inside():
                loss = self._loss(batch, batch.num_tokens() / max(1, num_tokens), step)
                self.deepspeed.backward(loss * (self.layout.data / max(1, num_targets)), scale_wrt_gas=False)
            loss_sum += self._once(loss.detach())
        return loss_sum

    def loss_and_norm(self, loss_sum: torch.Tensor) -> tuple[float, float]:
        """See Engine."""
        total = loss_sum.clone()
        if self.all_ranks is not None:
            dist.all_reduce(total)
        return total.item(), self._norm()

    def _norm(self) -> float:
        zero = self.deepspeed.optimizer
        if self.stage == 3:
            return float(combine_grad_norm_groups(zero._get_norm_groups()))
        if self.stage:
            return float(zero.scaled_global_norm())
        squares = squared_norm(self._whole_parameters())
        if self.all_ranks is not None:
            dist.all_reduce(squares)
        return math.sqrt(squares) if squares >= 0 else math.nan

    def update(self, norm: float, learning_rate: float) -> None:
        """See Engine. With ZeRO, DeepSpeed clips."""
        max_norm = self.config.training.optimizer.max_grad_norm
        if self.stage == 0 and max_norm is not None:
            clip(self._whole_parameters(), norm, max_norm)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()

    def drop_gradients(self) -> None:
        """See Engine. ZeRO skips a step by itself where it finds an overflow: so it is made to find one."""
        zero: Any = self.deepspeed.optimizer
        first: Any = next(self.model.parameters())
        if self.stage == 0:
            self.deepspeed.zero_grad()
            return
        if self.stage == 3:
            safe_set_local_grad(first, torch.full_like(first.ds_tensor, math.inf, dtype=torch.float32))
        elif zero.cpu_offload:
            zero.local_overflow = True
        else:
            safe_set_full_grad(first, torch.full_like(first, math.inf))
        checks, zero.check_grad_overflow = getattr(zero, "check_grad_overflow", None), True
        self.deepspeed.step()
        zero.check_grad_overflow = checks

    def loss(self, batch: Batch, share: float, step: int = 0) -> torch.Tensor:
        """See Engine."""
        with self.inside():
            return self._once(self._loss(batch, share, step))

    def _loss(self, batch: Batch, share: float, step: int) -> torch.Tensor:
        """On every rank. In bfloat16 the weights themselves are, so there is no autocast."""
        batch = batch.to(self.device)
        tokens = replace(batch.tokens(share, step), gradient_scale=float(self.layout.data))
        return model_loss(self.deepspeed, batch, tokens, "float32")

    def _once(self, loss: torch.Tensor) -> torch.Tensor:
        """0 on all but one of the ranks that hold the same tokens."""
        return loss if self.tensor is None or self.tensor.group.rank() == 0 else torch.zeros_like(loss)

    def set_training(self, training: bool) -> None:
        """See Engine."""
        self.deepspeed.train(training)

    def parts(self) -> Mapping[str, nn.Module]:
        """See Engine."""
        return parts_of(self.model)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Engine. Whole, on every rank."""
        return global_tensors(self.model, self._gathered(full_gradient))

    def state(self) -> dict[str, torch.Tensor]:
        """See Engine. Whole copies on the host, of which take_state takes the values."""
        optimizer = base_optimizer(self.deepspeed)
        sources = {"model": self._gathered(full_weight)}
        for moment in moments_of(optimizer):
            sources[f"optimizer.{moment}"] = self._gathered(partial(full_moment, moment=moment))
        return named_state(self.model, sources, optimizer)

    def take_state(self, state: dict[str, torch.Tensor]) -> None:
        """See Engine."""
        optimizer = base_optimizer(self.deepspeed)
        set_weights(self.deepspeed, self._packed(state, "model"))
        for moment in moments_of(optimizer):
            set_moments(self.deepspeed, moment, self._packed(state, f"optimizer.{moment}"))
        set_updates(optimizer, state["optimizer.updates"])

    def _gathered(self, get: Callable[[deepspeed.DeepSpeedEngine, nn.Parameter], torch.Tensor]) -> Source:
        """Something whole of every parameter, on the host; each is gathered once, in the same order on all ranks."""
        full: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self.model.parameters():
            tensor = get(self.deepspeed, parameter)
            full[parameter] = (self.tensor.whole(parameter, tensor) if self.tensor else tensor).cpu()
        return full.__getitem__

    def _packed(self, state: dict[str, torch.Tensor], kind: str) -> dict[nn.Parameter, torch.Tensor]:
        """The tensors of a kind as this rank's parameters hold them: experts stacked."""
        shape = self.tensor.whole_shape if self.tensor else full_shape
        full = {parameter: torch.empty(shape(parameter)) for parameter in self.model.parameters()}
        for name, part in global_tensors(self.model, full.__getitem__):
            part.copy_(state[f"{kind}.{name}"])
        if self.tensor:
            full = {parameter: self.tensor.part_of(parameter, tensor) for parameter, tensor in full.items()}
        return {parameter: tensor.to(self.device) for parameter, tensor in full.items()}

    def _whole_parameters(self) -> list[LocalParameter]:
        """Without ZeRO every parameter is whole; how many ranks hold it tells the norm to count it once."""
        return [LocalParameter(name, p, p, self._replicas(p)) for name, p in self.model.named_parameters()]

    def _replicas(self, parameter: nn.Parameter) -> int:
        """Ranks that hold the same values."""
        if hasattr(parameter, "group_name"):
            return self.layout.expert_data
        return self.layout.data if is_cut(parameter) else self.layout.num_ranks
