"""moe_dist's own layer."""

import torch.distributed as dist
from torch import Tensor, nn

from .competitor import Competitor, Source
from .problem import Problem


class Ours(Competitor):
    """moe_dist.MoELayer."""

    def build(self, problem: Problem, **moe) -> nn.Module:
        from moe_dist import MoELayer
        from moe_dist.config import MoEConfig, RoutingConfig

        shape = problem.shape
        return MoELayer(
            shape.hidden,
            MoEConfig(num_experts=shape.experts, ffn_size=shape.ffn, **moe),
            RoutingConfig(score="softmax_top_k", top_k=shape.top_k),
            expert_parallel_group=dist.group.WORLD if problem.ranks > 1 else None,
        )

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH)

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.layer.experts.weights_of(place, source)
        return weights["w_gate"], weights["w_up"], weights["w_down"]
