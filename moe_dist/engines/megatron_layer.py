"""moe_dist's MoE layer as a part of Megatron-Core's transformer layer, in place of its `mlp`.

Megatron passes hidden states only, in [s, b, h]; what routers know of the tokens reaches the layer by a TokenRecord. Ranks of
a tensor-parallel group hold the same tokens: all of them route all tokens, alike, and each moves and computes its share.

Shape letters: S tokens of a sequence, B sequences, H hidden, T = S B tokens, U = T / tensor-parallel ranks, P pairs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch.exchange import Exchange
from moe_dist.layer import MoELayer
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing, Tokens
from moe_dist.routing.balance import sum_over_ranks
from moe_dist.routing.types import keep_pairs


@dataclass
class TokenRecord:
    """What the layers know of the micro-batch whose forward runs. Set it in each forward step, before the model is called.

    Schedules interleave micro-batches, but a forward runs as a whole, so one record serves all layers; a recomputation has
    to set it to what it was (`CheckpointedLayer` does).
    """

    tokens: Tokens | None = None


@dataclass(frozen=True)
class LayerOptions:
    """What a layer is built with beside its config, the same for all layers."""

    moe: MoEConfig
    routing: RoutingConfig
    record: TokenRecord = field(default_factory=TokenRecord)
    vocab_size: int | None = None
    expert_map: ExpertMap | None = None
    exchange: Exchange | None = None
    num_chunks: int = 1
    seed: int = 0
    """Of the initial weights and the routers' random numbers."""


def moe_layer_spec(
    moe: MoEConfig,
    routing: RoutingConfig,
    record: TokenRecord | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> ModuleSpec:
    """What to put into the `mlp` field of a Megatron layer spec.

    Args:
        moe: the experts; moe.num_experts is over all ranks.
        routing: the router and its balancing.
        record: what is known of the tokens of each micro-batch. Auxiliary losses need its `share`.
        vocab_size: token ids are 0 to this less 1; only routing.method: hash needs it.
        seed: of the initial weights, which are the same for every layout, and of the routers' random numbers.
    """
    return layer_spec(LayerOptions(moe, routing, record or TokenRecord(), vocab_size, seed=seed))


def layer_spec(options: LayerOptions) -> ModuleSpec:
    """`moe_layer_spec` with everything that an engine decides."""
    return ModuleSpec(module=MegatronMoELayer, params={"options": options})


class MegatronMoELayer(MegatronModule):
    """The module of `moe_layer_spec`; `moe` is the moe_dist.MoELayer. It fits Megatron-Core 0.16.1 and later.

    Megatron reads from its weights: `allreduce = False` says that the gradient of an expert is reduced over the ranks that hold
    it, and not over the data-parallel group; `tensor_model_parallel` that every rank's values count in the gradient norm.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        options: LayerOptions,
        **ignored: Any,
    ) -> None:
        """Raises ValueError where Megatron's config asks for what the layer does not do."""
        super().__init__(config=config)
        _check(config, is_mtp_layer)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.options, self.data_group = options, groups.dp
        num_slices = groups.expt_tp.size()
        experts_group = groups.tp_ep if groups.tp_ep.size() > 1 else None
        several = experts_group is not None or groups.dp.size() > 1
        expert_map = options.expert_map or ExpertMap.contiguous(options.moe.num_experts, groups.ep.size())
        exchange = options.exchange
        if groups.tp.size() > 1:
            exchange = TensorShare(expert_map.sliced(num_slices), experts_group, groups.tp)
        self.moe = MoELayer(
            config.hidden_size,
            options.moe,
            options.routing,
            experts_group,
            groups.dp if several else None,
            expert_map,
            options.vocab_size,
            num_slices,
            exchange,
            options.num_chunks,
        )
        for parameter in self.moe.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim, parameter.partition_stride = 0, 1  # type: ignore[attr-defined]
        self.set_layer_number(layer_number or 1)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron counts from 1, over all pipeline stages. Initial weights and the router's random numbers depend on it."""
        self.layer_number = layer_number
        std = self.config.init_method_std
        output_std = std / math.sqrt(2 * self.config.num_layers)
        self.moe.initialise(self.options.seed, f"layers.{layer_number - 1}", std, output_std)

    def forward(
        self,
        hidden: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, H] -> the same shape, and no bias.

        Args:
            padding_mask: bool [B, S], True where there is no token; used where the record says nothing.

        Raises ValueError if auxiliary losses have no share of the step.
        """
        hidden_BSH = hidden.transpose(0, 1)
        out_BSH = self.moe(hidden_BSH, self._tokens(hidden_BSH, padding_mask))
        return out_BSH.transpose(0, 1).contiguous(), None

    def _tokens(self, hidden_BSH: torch.Tensor, padding_BS: torch.Tensor | None) -> Tokens:
        tokens = self.options.record.tokens
        if tokens is not None:
            return tokens
        losses = self.options.routing.losses
        if self.training and any(getattr(losses, name).coefficient for name in _names(losses)):
            raise ValueError(
                "routing.losses: an auxiliary loss needs the weight of each micro-batch; set `tokens` of the TokenRecord that "
                "moe_layer_spec was given, with its share, before each forward"
            )
        return Tokens(
            num_sequences=len(hidden_BSH), padding_T=None if padding_BS is None else padding_BS.reshape(-1), share=0.0
        )


def _names(losses: Any) -> list[str]:
    return [name for name in type(losses).model_fields if name != "scaling"]


def _check(config: Any, is_mtp_layer: bool) -> None:
    if is_mtp_layer:
        raise ValueError("moe_dist's layer is not offered in a layer of multi-token prediction; use another mlp there")
    if config.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size: {config.context_parallel_size} would split the sequences over which moe_dist's routers "
            "decide; use 1"
        )
    if config.sequence_parallel:
        raise ValueError(
            "sequence_parallel: true would give each tensor-parallel rank a part of the tokens that moe_dist's routers decide "
            "over; use false"
        )
    granularity, modules = config.recompute_granularity, config.recompute_modules or []
    if granularity == "full" or (granularity == "selective" and "mlp" in modules):
        raise ValueError(
            "recompute_granularity: Megatron's recomputation would run the router without gradients first, and its loads "
            "would not be counted; use moe_dist.engines.megatron.CheckpointedLayer as the module of the layer spec"
        )


class TensorShare(nn.Module):
    """An Exchange (moe_dist.dispatch.exchange) between ranks that hold the same tokens: each goes on with its share of them.

    Every rank has made the same routing, and gets the whole gradient of its hidden states and weights, so the gradients of all
    that is before are equal on these ranks, as Megatron expects of what it does not split.
    """

    def __init__(self, expert_map: ExpertMap, group: dist.ProcessGroup | None, tensor_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner_map, self.inner_group, self.tensor_group = expert_map, group, tensor_group

    def send(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing, None]:
        """[U, H] tokens and the pairs of these.

        Raises ValueError if the ranks do not divide the tokens.
        """
        ranks, rank = self.tensor_group.size(), self.tensor_group.rank()
        if len(hidden_TH) % ranks:
            raise ValueError(
                f"a micro-batch of {len(hidden_TH)} tokens does not divide over {ranks} tensor-parallel ranks; change "
                "training.micro_batch_size or training.sequence_length"
            )
        share = len(hidden_TH) // ranks
        first = rank * share
        weight_P = copy_to_tensor_model_parallel_region(routing.weight_P, self.tensor_group)
        own_P = (routing.token_P >= first) & (routing.token_P < first + share)
        # Equal numbers of slots were promised of all tokens together, not of a share of them.
        own = keep_pairs(replace(routing, weight_P=weight_P, pairs_per_expert=None), own_P, share, None)
        hidden_UH = scatter_to_sequence_parallel_region(hidden_TH, self.tensor_group)
        return hidden_UH, replace(own, token_P=own.token_P - first), None

    def bring_back(self, out_UH: torch.Tensor, ticket: None) -> torch.Tensor:
        """[T, H] on every rank."""
        return gather_from_sequence_parallel_region(out_UH, False, self.tensor_group)

    def hop(self, ticket: None) -> None:
        """No row moves: each rank had all of them."""


def update_balance(model_chunks: Iterable[nn.Module], bias_rate: float) -> None:
    """Let the balancers of all layers follow the loads of the step; collective. Call it once after each global batch."""
    layers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, MegatronMoELayer)]
    if not layers:
        return
    totals = sum_over_ranks([layer.moe.router.balance for layer in layers], layers[0].data_group)
    for layer, totals_of_layer in zip(layers, totals, strict=True):
        layer.moe.router.update(totals_of_layer, bias_rate)


def finalize_with_balance(bias_rate: float) -> Callable[..., None]:
    """For `config.finalize_model_grads_func`: Megatron's own, and then `update_balance`."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, *args, **kwargs)
        update_balance(model, bias_rate)

    return finalize
