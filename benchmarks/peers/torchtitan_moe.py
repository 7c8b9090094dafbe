"""torchtitan 0.3.0's MoE layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from . import emulation
from .competitor import Competitor, Source
from .problem import Problem


class TorchTitan(Competitor):
    """With its all-to-all dispatcher. Its experts cast to bfloat16; in float32 that cast is left out."""

    def build(self, problem: Problem) -> nn.Module:
        emulation.import_torchtitan_without_triton()
        from torchtitan.distributed.utils import set_spmd_backend
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
        from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

        shape = problem.shape
        own = shape.experts // problem.ranks
        experts = GroupedExperts.Config(dim=shape.hidden, hidden_dim=shape.ffn, num_experts=own)
        layer = MoE.Config(
            num_experts=shape.experts,
            routed_experts=RoutedExperts.Config(
                inner_experts=experts,
                token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=shape.experts,
                gate=Linear.Config(in_features=shape.hidden, out_features=shape.experts),
                top_k=shape.top_k,
                score_func="softmax",
                route_norm=True,
            ),
            load_balance_coeff=None,
        ).build()
        if problem.dtype == torch.float32:
            layer.routed_experts.inner_experts = _float32_experts(experts)
        set_spmd_backend("full_dtensor")  # collectives by torch; the other backend wants meshes for a whole model
        if problem.ranks > 1:
            mesh = init_device_mesh(problem.device.type, (problem.ranks,), mesh_dim_names=("ep",))
            layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
        return layer

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH[None])[0]

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.gate.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        experts = self.layer.routed_experts.inner_experts
        gate, down, up = (source(weight)[place].T for weight in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD))
        return gate, up, down


def _float32_experts(config) -> nn.Module:
    """GroupedExperts, whose products take what they are given."""
    from torchtitan.models.common.moe import GroupedExperts

    class Float32Experts(GroupedExperts):
        def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
            ends_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
            gate_RF = self._grouped_mm(A=x_RD, B_t=self.w1_EFD.mT, offs=ends_E)
            active_RF = F.silu(gate_RF) * self._grouped_mm(A=x_RD, B_t=self.w3_EFD.mT, offs=ends_E)
            return self._grouped_mm(A=active_RF, B_t=self.w2_EDF.mT, offs=ends_E)

    return Float32Experts(config)
