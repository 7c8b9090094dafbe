"""The Megatron-Core engine: GPTModel with moe_dist's MoE layers, Megatron's schedules, data parallelism and optimizer.

The module is imported by the registry when a config asks for it: nothing else of moe_dist needs megatron-core.

For a user's script: `moe_layer_spec`, `TokenRecord`, `CheckpointedLayer`, `finalize_with_balance` (docs/megatron.md).

Shape letters: B sequences, S sequence length, V vocabulary on this rank.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moe_dist.config import Config, Layout
from moe_dist.config.layout import moe_layers, owner_of_expert
from moe_dist.dispatch.exchange import build_exchange
from moe_dist.engines import megatron_optimizer as optimizers
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.engine import Engine
from moe_dist.engines.megatron_groups import megatron_context, tell_what_is_missing
from moe_dist.engines.megatron_layer import (
    LayerOptions,
    MegatronMoELayer,
    TokenRecord,
    finalize_with_balance,
    moe_layer_spec,
    update_balance,
)
from moe_dist.engines.megatron_model import CheckpointedLayer, build_model, document_mask, transformer_config
from moe_dist.engines.megatron_names import initialise, named, pieces_of
from moe_dist.placement import ExpertMap
from moe_dist.routing import Tokens

__all__ = [
    "CheckpointedLayer",
    "MegatronEngine",
    "TokenRecord",
    "finalize_with_balance",
    "moe_layer_spec",
    "update_balance",
]

Step = tuple[Batch, Tokens]


class MegatronEngine(Engine):
    """See Engine. Megatron's global state is in place during the calls of this engine only."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, vocab_size: int) -> None:
        if dist.get_rank() == 0:
            tell_what_is_missing(config.engine.emulate_cuda)
        self.inside = megatron_context(config)
        with self.inside():
            super().__init__(config, layout, device, parallel_state.get_data_parallel_rank())
            if config.engine.emulate_cuda:
                self.precision = "float32"
            self.data_group = _unless_alone(parallel_state.get_data_parallel_group())
            self.counts_tokens = parallel_state.get_tensor_model_parallel_rank() == 0
            self.vocab_size, self.record = vocab_size, TokenRecord()
            self._build()
        self.watch(
            {
                layer.layer_number - 1: layer.mlp.moe
                for layer in self.model.decoder.layers
                if isinstance(layer.mlp, MegatronMoELayer)
            }
        )

    def _build(self) -> None:
        config, device = self.config, self.device
        model_parallel_cuda_manual_seed(config.training.seed % 2**31)
        self.megatron_config = transformer_config(config, self.precision == "bfloat16")
        expert_map = ExpertMap.from_owners(owner_of_expert(config))
        experts_group = _unless_alone(parallel_state.get_expert_tensor_and_model_parallel_group())
        options = LayerOptions(
            config.moe,
            config.routing,
            self.record,
            self.vocab_size,
            expert_map,
            build_exchange(config, expert_map.sliced(self.layout.expert_tensor), experts_group),
            1 if config.parallel.overlap_chunks == "auto" else config.parallel.overlap_chunks,
            config.training.seed,
        )
        tensor = self.layout.tensor
        padded = math.ceil(self.vocab_size / tensor) * tensor
        self.model = build_model(config, self.megatron_config, padded, options).to(device)
        self.pieces = pieces_of(
            self.model,
            config,
            self.vocab_size,
            _mesh(parallel_state.get_tensor_model_parallel_group(), device),
            _mesh(parallel_state.get_expert_tensor_parallel_group(), device),
        )
        for parameter, parts in self.pieces.items():
            if parts[0].mesh is not None and not hasattr(parameter, "tensor_model_parallel"):
                # Or the gradient norm would count one rank's part only. Megatron sets it where it draws the weights.
                set_tensor_model_parallel_attributes(parameter, True, parts[0].dimension, 1)
        initialise(self.pieces, config)
        self.chunk = DistributedDataParallel(
            self.megatron_config,
            DistributedDataParallelConfig(use_distributed_optimizer=config.engine.distributed_optimizer),
            self.model,
        )
        self.megatron_config.finalize_model_grads_func = _without_division
        self.optimizer = optimizers.build_optimizer(config, [self.chunk])

    def accumulate(self, batches: list[Batch], num_targets: int, num_tokens: int, step: int = 0) -> torch.Tensor:
        """See Engine."""
        self.chunk.train()
        self.drop_gradients()
        steps = [(batch, batch.num_tokens() / max(1, num_tokens)) for batch in batches]
        with self.inside():
            return self._run([self._on_device(batch, share, step) for batch, share in steps], max(1, num_targets))

    def loss_and_norm(self, loss_sum: torch.Tensor) -> tuple[float, float]:
        """See Engine."""
        with self.inside():
            self.optimizer.prepare_grads()
            norm = self.optimizer.get_grad_norm()
        if self.all_ranks is not None:
            dist.all_reduce(loss_sum)
        return loss_sum.item(), float(norm)

    def update(self, norm: float, learning_rate: float) -> None:
        """See Engine."""
        max_norm = self.config.training.optimizer.max_grad_norm
        with self.inside():
            if max_norm is not None and norm > max_norm:
                optimizers.clip(self.optimizer, norm, max_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step_with_ready_grads()

    def drop_gradients(self) -> None:
        """See Engine."""
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def loss(self, batch: Batch, share: float, step: int = 0) -> torch.Tensor:
        """See Engine."""
        with self.inside():
            return self._run([self._on_device(batch, share, step)], 1, forward_only=True)

    def set_training(self, training: bool) -> None:
        """See Engine."""
        self.chunk.train(training)

    def parts(self) -> Mapping[str, nn.Module | None]:
        """See Engine."""
        model = self.model
        own = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        found: dict[str, nn.Module | None] = {"embedding": model.embedding if model.pre_process else None}
        with_experts = set(moe_layers(self.config))
        for number in range(self.config.model.num_layers):
            layer = own.get(number)
            found[f"layers.{number}.attention"] = layer and layer.self_attention
            found[f"layers.{number}.{'moe' if number in with_experts else 'ffn'}"] = layer and layer.mlp
        last = model.post_process
        return found | {"norm": model.decoder.final_layernorm if last else None, "": model if last else None}

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See Engine."""
        with self.inside():
            gradients = optimizers.values(self.optimizer, "grad")
        return named(self.pieces, gradients.__getitem__)

    def state(self) -> dict[str, torch.Tensor]:
        """See Engine. The tensors are copies, or parts of them: `take_state` writes them back."""
        state = {f"model.{name}": tensor for name, tensor in named(self.pieces, lambda p: p)}
        for moment in self._moments():
            with self.inside():
                values = optimizers.values(self.optimizer, moment)
            state |= {f"optimizer.{moment}.{name}": value for name, value in named(self.pieces, values.__getitem__)}
        for number, router in zip(self.moe_layers, self.routers, strict=True):
            state |= {f"balance.{number}.{name}": value for name, value in router.balance.values()}
        return state | {"optimizer.updates": optimizers.get_updates(self.optimizer)}

    def take_state(self, state: dict[str, torch.Tensor]) -> None:
        """See Engine."""
        self._write("model", state, {parameter: parameter for parameter in self.pieces})
        with self.inside():
            self.optimizer.reload_model_params()
            for moment in self._moments():
                values = {parameter: torch.zeros_like(parameter) for parameter in self.pieces}
                self._write(f"optimizer.{moment}", state, values)
                optimizers.set_values(self.optimizer, moment, values)
            optimizers.set_updates(self.optimizer, state["optimizer.updates"])

    def of_all_layers(self, values: dict[int, Any]) -> dict[int, Any]:
        """See Engine."""
        if self.layout.pipeline == 1:
            return values
        of_stages: list[dict[int, Any]] = [{} for _ in range(self.layout.pipeline)]
        with self.inside():
            group = parallel_state.get_pipeline_model_parallel_group()
        dist.all_gather_object(of_stages, {number: _on_cpu(value) for number, value in values.items()}, group=group)
        return {number: value for of_stage in of_stages for number, value in of_stage.items()}

    # A schedule's forward step, and the loss of its micro-batch.

    def _on_device(self, batch: Batch, share: float, step: int) -> Step:
        batch = batch.to(self.device)
        return batch, batch.tokens(share, step)

    def _run(self, steps: list[Step], divisor: int, forward_only: bool = False) -> torch.Tensor:
        """Forward, and backward of the loss over `divisor`. Returns the loss of this rank, summed: see Engine.accumulate."""
        losses = get_forward_backward_func()(
            forward_step_func=partial(self._forward, divisor),
            data_iterator=iter(steps),
            model=self.chunk,
            num_microbatches=len(steps),
            seq_length=steps[0][0].input_BS.shape[1],
            micro_batch_size=steps[0][0].input_BS.shape[0],
            forward_only=forward_only,
        )
        counts = self.model.post_process and parallel_state.get_tensor_model_parallel_rank() == 0
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((loss.double() for loss in losses), zero) if counts else zero

    def _forward(self, divisor: int, steps: Iterator[Step], chunk: nn.Module) -> tuple[torch.Tensor, Any]:
        batch, self.record.tokens = next(steps)
        position_BS = torch.arange(batch.input_BS.shape[1], device=self.device).expand_as(batch.input_BS)
        output = chunk(batch.input_BS, position_BS, document_mask(batch.document_BS))
        return output, partial(self._loss, batch, divisor)

    def _loss(self, batch: Batch, divisor: int, logits_BSV: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The loss to differentiate, Megatron's count of tokens, which `_without_division` ignores, and what it reports."""
        logits_BSV = logits_BSV.float()
        first = parallel_state.get_tensor_model_parallel_rank() * logits_BSV.shape[-1]
        if first + logits_BSV.shape[-1] > self.vocab_size:  # columns that only pad the vocabulary
            column_V = torch.arange(first, first + logits_BSV.shape[-1], device=self.device)
            logits_BSV = logits_BSV.masked_fill(column_V >= self.vocab_size, torch.finfo(torch.float32).min)
        counts_BS = batch.target_BS != IGNORED
        loss_BS = vocab_parallel_cross_entropy(logits_BSV, torch.where(counts_BS, batch.target_BS, 0))
        loss = torch.where(counts_BS, loss_BS, 0).sum()
        return loss / divisor, torch.ones((), dtype=torch.int, device=self.device), loss.detach()

    def _moments(self) -> list[str]:
        return optimizers.moments(optimizers.parts(self.optimizer)[0])

    def _write(self, prefix: str, state: dict[str, torch.Tensor], targets: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter, parts in self.pieces.items():
            for piece in parts:
                piece.write(targets[parameter], state[f"{prefix}.{piece.name}"])


def _without_division(model: list[nn.Module], num_tokens: Any = None, *args: Any, **kwargs: Any) -> None:
    """Reduces the gradients over all ranks; the loss has been divided by the targets of the step already."""
    finalize_model_grads(model, None, *args, **kwargs)


def _unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return group if group.size() > 1 else None


def _mesh(group: dist.ProcessGroup, device: torch.device) -> DeviceMesh | None:
    return DeviceMesh.from_group(group, device.type) if group.size() > 1 else None


def _on_cpu(value: Any) -> Any:
    return {name: tensor.cpu() for name, tensor in value.items()} if isinstance(value, dict) else value.cpu()
