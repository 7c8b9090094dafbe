"""Parameter-free routing: exact balance by optimal transport on a fixed random projection of the tokens.

A = x W with W ~ N(0, 1 / H) drawn once and never trained; k experts for each token, n k / E tokens for each expert of a
routing group. It is known under the name of GatePro, but that paper (arXiv 2510.13079, see gatepro.py) does something else.
Tokens are scaled to a root mean square of 1 first, so that no token's norm decides. Gradients reach the tokens only, through
the weights. Not causal in training.

Shape letters: T tokens, H hidden, E experts, G routing groups, N tokens of a routing group.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moe_dist.initial import draw_normal
from moe_dist.routing.assignment import assign, dual_prices
from moe_dist.routing.batch import ExactRouter
from moe_dist.routing.greedy import assign_greedily
from moe_dist.routing.scores import router_logits
from moe_dist.routing.types import Choice, Tokens


class GateProOTRouter(ExactRouter):
    """The projection is a part of the balancer state, so in the checkpoint."""

    def build(self) -> None:
        """See Router."""
        super().build()
        self.weight = self.bias = None
        self.balance.add_value("projection_EH", torch.zeros(self.num_experts, self.hidden_size))

    def initialise(self, seed: int, name: str) -> None:
        """See Router."""
        super().initialise(seed, name)
        draw_normal(self.balance.projection_EH, f"{name}.router.projection", seed, self.hidden_size**-0.5)

    def logits(self, hidden_TH: Tensor, tokens: Tokens) -> Tensor:
        """See Router."""
        normed_TH = functional.rms_norm(hidden_TH, hidden_TH.shape[1:])
        return router_logits(normed_TH, self.balance.projection_EH.to(hidden_TH.dtype), None, self.routing)

    def affinity(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """See BatchRouter."""
        return logits_TE

    def solve(self, affinity_GNE: Tensor, real_GN: Tensor | None) -> tuple[Tensor, Tensor]:
        """See BatchRouter."""
        top_k, capacity = self.routing.top_k, self.capacity(affinity_GNE.shape[1])
        iterations, start_GE = self.routing.optimal_transport.iterations, self.start_prices(affinity_GNE)
        if self.routing.gatepro_ot.matching == "optimal_transport":
            return assign(affinity_GNE, top_k, capacity, iterations, start_GE, real_GN)
        # Greedy matching has no prices; evaluation needs them.
        price_GE = dual_prices(affinity_GNE, top_k, capacity, iterations, start_GE, real_GN)
        return assign_greedily(affinity_GNE, top_k, capacity, real_GN), price_GE

    def weights(self, logits_TE: Tensor, scores_TE: Tensor, choice: Choice) -> Tensor:
        """See Router."""
        if self.routing.gatepro_ot.weights == "score":
            return super().weights(logits_TE, scores_TE, choice)
        return torch.full_like(
            choice.expert_TK, self.routing.scaling_factor / self.routing.top_k, dtype=logits_TE.dtype
        )
