"""Exactly balanced routing: the assignment of highest total score in which every expert has the same number of slots.

max sum M A over M in {0, 1}, k experts for each token and at most C = ceil(n k / E) tokens for each expert of a routing group
of n tokens. Prices come from coordinate descent on the dual, warm-started; rounding makes the balance exact
(`moe_dist.routing.assignment`). Where the group lies on one rank, every rank sends the same number of rows to every expert:
no counts are exchanged. Not causal in training.

Shape letters: T tokens, E experts, G routing groups, N tokens of a routing group.
"""

import torch

from moe_dist.routing.assignment import assign
from moe_dist.routing.batch import ExactRouter


class OptimalTransportRouter(ExactRouter):
    """The affinities are the scores: the choice maximises the sum of the weights (before they are normalised)."""

    def affinity(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
        """See BatchRouter."""
        return scores_TE

    def solve(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See BatchRouter."""
        return assign(
            affinity_GNE,
            self.routing.top_k,
            self.capacity(affinity_GNE.shape[1]),
            self.routing.optimal_transport.iterations,
            self.start_prices(affinity_GNE),
            real_GN,
        )
