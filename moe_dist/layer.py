"""The MoE layer: route, dispatch, compute, combine.

Shape letters: T tokens on this rank, H hidden, R rows received by this rank's experts.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.config.routing_checks import check_routing
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import AllToAllDispatcher
from moe_dist.experts import Experts, FeedForward
from moe_dist.initial import draw_normal
from moe_dist.placement import ExpertMap
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.balance import is_recomputation
from moe_dist.routing.losses import attach_losses
from moe_dist.telemetry.recorder import LayerRecorder


class MoELayer(nn.Module):
    """A mixture-of-experts layer, on one rank or with its experts spread over a process group.

    Gradients of the experts are complete on their owner with respect to the tokens of the expert-parallel group; dense
    parameters (router, shared experts) still need the ordinary data-parallel reduction.
    """

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        routing: RoutingConfig,
        expert_parallel_group: dist.ProcessGroup | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        expert_map: ExpertMap | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Build the layer; weights are the same for every layout (see `initialise`).

        Args:
            hidden_size: H.
            moe: the experts.
            routing: the router and its balancing.
            expert_parallel_group: ranks over which the experts are spread; None: all are here.
            data_parallel_group: all ranks that hold different tokens, for decisions and statistics over all of them.
                Default: expert_parallel_group.
            expert_map: which rank owns which expert; default contiguous blocks.
            vocab_size: token ids are 0 to this less 1; only routing.method: hash needs it.

        Raises:
            ValueError: if the routing does not fit the experts, or the group does not divide them and no map is given.
        """
        super().__init__()
        check_routing(routing, moe.num_experts)
        ranks = dist.get_world_size(expert_parallel_group) if expert_parallel_group is not None else 1
        rank = dist.get_rank(expert_parallel_group) if expert_parallel_group is not None else 0
        self.expert_map = expert_map or ExpertMap.contiguous(moe.num_experts, ranks)
        if self.expert_map.num_experts != moe.num_experts or len(self.expert_map.experts_of_rank) != ranks:
            raise ValueError(
                f"expert_map: places {self.expert_map.num_experts} experts on {len(self.expert_map.experts_of_rank)} ranks; "
                f"it must place moe.num_experts = {moe.num_experts} on the {ranks} ranks of expert_parallel_group"
            )
        self.own_experts = self.expert_map.experts_of_rank[rank]
        self.routing = routing
        all_tokens_group = data_parallel_group or expert_parallel_group
        self.router = build_router(hidden_size, moe.num_experts, routing, all_tokens_group, vocab_size)
        self.dispatcher = AllToAllDispatcher(self.expert_map, expert_parallel_group)
        self.experts = Experts(hidden_size, moe, len(self.own_experts))
        self.shared: FeedForward | None = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.ffn_size
            self.shared = FeedForward(hidden_size, width, moe.activation, moe.shared_gate)
        self.recorder: LayerRecorder | None = None
        self.initialise(seed=0, name="moe")

    def forward(self, hidden: torch.Tensor, tokens: Tokens | None = None) -> torch.Tensor:
        """[B, S, H] or [T, H] -> the same shape.

        Args:
            hidden: tokens, batch-major.
            tokens: what is known of them; by default each row of [B, S, H] is a sequence, and nothing is padding.
        """
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        tokens = tokens or Tokens(num_sequences=max(1, hidden.shape[0]) if hidden.dim() == 3 else 1)
        recorder = self.recorder if self.training and not is_recomputation() else None
        with _stage(recorder, "route"):
            routing = self.router(hidden_TH, tokens)
            routing = attach_losses(routing, tokens.share)
        input_TH = _to_compute_dtype(hidden_TH)
        with _stage(recorder, "dispatch"):
            rows_RH, segments, ticket = self.dispatcher.dispatch(input_TH, routing)
        with _stage(recorder, "experts"):
            rows_RH = self.experts(rows_RH, segments)
        with _stage(recorder, "combine"):
            out_TH = self.dispatcher.combine(rows_RH, ticket)
        if self.shared is not None:
            out_TH = out_TH + self.shared(input_TH)
        if routing.identity_weight_T is not None:
            out_TH = out_TH + input_TH * routing.identity_weight_T.to(input_TH.dtype)[:, None]
        if recorder is not None:
            row_bytes = rows_RH.shape[1] * rows_RH.element_size()
            recorder.add_rows(segments.experts, segments.sizes, ticket.send, ticket.receive, row_bytes)
            recorder.add_losses(routing.losses, tokens.share)
        return out_TH.view(hidden.shape)

    def initialise(self, seed: int, name: str, std: float = 0.02, output_std: float | None = None) -> None:
        """Draw all weights, each from (seed, name, expert): the same for every number of ranks and every expert map.

        Args:
            name: prefix of the weights' names, such as `layers.3`.
            std: of the projections into the experts.
            output_std: of the projections out of them; default `std`.
        """
        output_std = std if output_std is None else output_std
        self.router.initialise(seed, name)
        for place, expert in enumerate(self.own_experts):
            for key, weight in self.experts.weights_of(place, lambda p: p.data).items():
                draw_normal(weight, f"{name}.experts.{expert}.{key}", seed, output_std if key == "w_down" else std)
        for key, parameter in self.shared.named_parameters() if self.shared is not None else ():
            draw_normal(parameter, f"{name}.shared.{key}", seed, output_std if key.startswith("w_down") else std)


def _stage(recorder: LayerRecorder | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if recorder is None else recorder.stage(name)


def _to_compute_dtype(hidden: torch.Tensor) -> torch.Tensor:
    """Rows travel and are computed in the autocast dtype where autocast is on."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
