"""The MoE layer: route, dispatch, compute, combine.

Shape letters: T tokens on this rank, H hidden, R rows received by this rank's experts.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.config.routing_checks import check_routing
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import AllToAllDispatcher, to_slices
from moe_dist.dispatch.exchange import Exchange
from moe_dist.dispatch.types import Hop, Journey
from moe_dist.experts import Experts, FeedForward
from moe_dist.experts.journey import Stage, untimed
from moe_dist.initial import draw_normal
from moe_dist.parallel.collectives import global_ranks
from moe_dist.parallel.traffic import Traffic, counting
from moe_dist.placement import WIDTH_DIMENSION, ExpertMap
from moe_dist.routing import Routing, Tokens, build_router
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
        expert_tensor: int = 1,
        exchange: Exchange | None = None,
        num_chunks: int = 1,
    ) -> None:
        """Build the layer; weights are the same for every layout (see `initialise`).

        Args:
            hidden_size: H.
            moe: the experts.
            routing: the router and its balancing.
            expert_parallel_group: ranks over which the experts are spread; None: all are here.
            data_parallel_group: all ranks that hold different tokens, for decisions and statistics over all of them.
                Default: expert_parallel_group.
            expert_map: which rank owns which expert; default contiguous blocks. With expert_tensor above 1, consecutive
                ranks of the group count as one.
            vocab_size: token ids are 0 to this less 1; only routing.method: hash needs it.
            expert_tensor: slices of each expert, on as many consecutive ranks of the group.
            exchange: brings tokens to the node or rank of their experts before they are dispatched there (see
                moe_dist.dispatch.exchange). Default: one all-to-all over the whole group.
            num_chunks: see `set_num_chunks`.

        Raises:
            ValueError: if the routing does not fit the experts, the group does not divide them and no map is given, or
                expert_tensor does not divide the group and the FFN width.
        """
        super().__init__()
        check_routing(routing, moe.num_experts)
        ranks = dist.get_world_size(expert_parallel_group) if expert_parallel_group is not None else 1
        rank = dist.get_rank(expert_parallel_group) if expert_parallel_group is not None else 0
        self.expert_map = _checked_map(expert_map, moe, ranks, expert_tensor)
        self.own_experts = self.expert_map.experts_of_rank[rank // expert_tensor]
        self.num_slices, self.own_slice = expert_tensor, rank % expert_tensor
        self.routing = routing
        all_tokens_group = data_parallel_group or expert_parallel_group
        self.router = build_router(hidden_size, moe.num_experts, routing, all_tokens_group, vocab_size)
        self.exchange = exchange
        self.expert_parallel_group = expert_parallel_group
        self.set_num_chunks(num_chunks)
        slice_of_moe = moe.model_copy(update={"ffn_size": moe.ffn_size // expert_tensor})
        self.experts = Experts(hidden_size, slice_of_moe, len(self.own_experts))
        self.shared: FeedForward | None = None
        if moe.num_shared_experts:
            width = moe.num_shared_experts * moe.ffn_size
            self.shared = FeedForward(hidden_size, width, moe.activation, moe.shared_gate)
        self.recorder: LayerRecorder | None = None
        self.initialise(seed=0, name="moe")

    def set_num_chunks(self, num_chunks: int) -> None:
        """Divide each rank's experts into chunks, so that the rows of one travel while those of another are computed.

        The results are the same bits for any number.
        """
        expert_map, group = self.expert_map.sliced(self.num_slices), self.expert_parallel_group
        if self.exchange is not None:
            expert_map, group = self.exchange.inner_map, self.exchange.inner_group
        device = next(self.router.buffers()).device
        self.dispatcher = AllToAllDispatcher(expert_map, group, num_chunks).to(device)

    def forward(self, hidden: torch.Tensor, tokens: Tokens | None = None) -> torch.Tensor:
        """[B, S, H] or [T, H] -> the same shape.

        Args:
            hidden: tokens, batch-major.
            tokens: what is known of them; by default each row of [B, S, H] is a sequence, and nothing is padding.
        """
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        tokens = tokens or Tokens(num_sequences=max(1, hidden.shape[0]) if hidden.dim() == 3 else 1)
        recorder = self.recorder if self.recorder is not None and self.router.balance.counts_now() else None
        stage = recorder.stage if recorder is not None and recorder.timed else untimed
        with stage("route"):
            chosen = self.router(hidden_TH, tokens)
            routing = attach_losses(chosen, tokens.share * tokens.gradient_scale)
            if self.num_slices > 1:
                routing = to_slices(routing, self.num_slices)
        input_TH = _to_compute_dtype(hidden_TH)
        shared = _Meanwhile(self.shared, input_TH)
        with nullcontext() if recorder is None else counting(recorder.ranks_per_node) as traffic:
            out_TH, journey, first_hop = self._travel(input_TH, routing, stage, shared)
        if shared.out_TH is not None:
            out_TH = out_TH + shared.out_TH
        if routing.identity_weight_T is not None:
            out_TH = out_TH + input_TH * routing.identity_weight_T.to(input_TH.dtype)[:, None]
        if recorder is not None:
            assert traffic is not None
            with recorder.measured():
                row_bytes = input_TH.shape[1] * input_TH.element_size()
                _record(recorder, chosen, journey, first_hop, row_bytes, traffic)
                recorder.add_losses(chosen.losses, tokens.share)
        return out_TH.view(hidden.shape)

    def _travel(
        self, input_TH: torch.Tensor, routing: Routing, stage: Stage, meanwhile: "_Meanwhile"
    ) -> tuple[torch.Tensor, Journey, Hop | None]:
        """[T, H] to the node of their experts where there is an exchange, to the experts, and back."""
        if self.exchange is None:
            return *self._apply_experts(input_TH, routing, stage, meanwhile), None
        with stage("dispatch"):
            hidden_UH, routing_U, ticket = self.exchange.send(input_TH, routing)
        out_UH, journey = self._apply_experts(hidden_UH, routing_U, stage, meanwhile)
        with stage("combine"):
            return self.exchange.bring_back(out_UH, ticket), journey, self.exchange.hop(ticket)

    def _apply_experts(
        self, input_TH: torch.Tensor, routing: Routing, stage: Stage, meanwhile: "_Meanwhile"
    ) -> tuple[torch.Tensor, Journey]:
        """[T, H] dispatch, experts and combine: as one function where the backend can, else one after the other."""
        backend = self.experts.backend(input_TH, routing.pairs_per_expert is not None)
        fused = backend.kernels is not None and not torch.compiler.is_compiling()
        if fused and routing.weight_on == "output":
            with stage("dispatch"):
                journey = self.dispatcher.plan(routing, len(input_TH))
            return self.experts(input_TH, journey, routing.weight_P, stage, meanwhile), journey
        with stage("dispatch"):
            rows_RH, segments, ticket = self.dispatcher.dispatch(input_TH, routing)
        meanwhile()
        with stage("experts"):
            rows_RH = self.experts(rows_RH, segments)
        with stage("combine"):
            return self.dispatcher.combine(rows_RH, ticket), ticket.journey

    def initialise(self, seed: int, name: str, std: float = 0.02, output_std: float | None = None) -> None:
        """Draw all weights, each from (seed, name, expert): the same for every number of ranks, every map and any slices.

        Args:
            name: prefix of the weights' names, such as `layers.3`.
            std: of the projections into the experts.
            output_std: of the projections out of them; default `std`.
        """
        output_std = std if output_std is None else output_std
        self.router.initialise(seed, name)
        for place, expert in enumerate(self.own_experts):
            for key, weight in self.experts.weights_of(place, lambda p: p.data).items():
                part = (WIDTH_DIMENSION[key], self.own_slice, self.num_slices)
                draw_normal(
                    weight, f"{name}.experts.{expert}.{key}", seed, output_std if key == "w_down" else std, *part
                )
        for key, parameter in self.shared.named_parameters() if self.shared is not None else ():
            draw_normal(parameter, f"{name}.shared.{key}", seed, output_std if key.startswith("w_down") else std)


def _checked_map(expert_map: ExpertMap | None, moe: MoEConfig, ranks: int, expert_tensor: int) -> ExpertMap:
    """The map, or the default one; see MoELayer for the errors."""
    if ranks % expert_tensor or moe.ffn_size % expert_tensor:
        raise ValueError(
            f"expert_tensor: {expert_tensor} must divide the {ranks} ranks of expert_parallel_group and "
            f"moe.ffn_size = {moe.ffn_size}"
        )
    owners = ranks // expert_tensor
    expert_map = expert_map or ExpertMap.contiguous(moe.num_experts, owners)
    if expert_map.num_experts != moe.num_experts or len(expert_map.experts_of_rank) != owners:
        by_slices = f", by {expert_tensor} slices" if expert_tensor > 1 else ""
        raise ValueError(
            f"expert_map: places {expert_map.num_experts} experts on {len(expert_map.experts_of_rank)} ranks; "
            f"it must place moe.num_experts = {moe.num_experts} on the {owners} ranks of expert_parallel_group{by_slices}"
        )
    return expert_map


def _record(
    recorder: LayerRecorder,
    routing: Routing,
    journey: Journey,
    first_hop: Hop | None,
    row_bytes: int,
    traffic: Traffic,
) -> None:
    """Write down one forward; `routing` is the router's own, of experts and not of slices of them."""
    padded = routing.pairs_per_expert is not None
    recorder.add_pairs(routing.load_E, routing.dropped_E, routing.expert_P if padded else None)
    segments = journey.segments
    recorder.add_computed(segments.experts, segments.sizes)
    for hop in (first_hop, journey.hop):
        if hop is not None:
            recorder.add_rows(global_ranks(hop.group), hop.send, hop.receive, row_bytes)
    recorder.add_bytes(traffic.inside_node.total(), traffic.between_nodes.total())
    recorder.own_seconds += traffic.seconds


class _Meanwhile:
    """What is computed while rows are on their way: the shared experts."""

    def __init__(self, shared: FeedForward | None, input_TH: torch.Tensor) -> None:
        self.shared, self.input_TH = shared, input_TH
        self.with_gradients = torch.is_grad_enabled()
        self.out_TH: torch.Tensor | None = None

    def __call__(self) -> None:
        if self.shared is not None:
            with torch.set_grad_enabled(self.with_gradients):  # inside an autograd function they are switched off
                self.out_TH = self.shared(self.input_TH)


def _to_compute_dtype(hidden: torch.Tensor) -> torch.Tensor:
    """Rows travel and are computed in the autocast dtype where autocast is on."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
