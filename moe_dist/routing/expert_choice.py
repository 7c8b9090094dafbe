"""Expert choice (arXiv 2202.09368): each expert takes the C = n k / E tokens of a routing group that score highest for it.

A token is used by any number of experts, or by at most `expert_choice.max_experts`. The paper solves that cap by an entropic
program and rounds it by top-k, which may exceed the cap; here it is the assignment problem with the roles of tokens and
experts exchanged, which keeps it exactly (C is rounded down where the cap needs that, else up). Not causal in training. In
evaluation a token takes the k experts by whose threshold (the least score that they took in training, averaged) it has most
to spare.

Shape letters: T tokens, E experts, G routing groups, N tokens of a routing group.
"""

import torch

from moe_dist.routing.assignment import assign
from moe_dist.routing.batch import ExactRouter, all_experts
from moe_dist.routing.types import Choice, Tokens

CAP_ITERATIONS = 4
"""Sweeps of coordinate descent for the capped variant."""


class ExpertChoiceRouter(ExactRouter):
    """Prices are the thresholds: the affinity of the last token that an expert takes."""

    def affinity(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor) -> torch.Tensor:
        """See BatchRouter."""
        return scores_TE

    def solve(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """See BatchRouter."""
        cap = self.routing.expert_choice.max_experts
        chosen_GNE = self._uncapped(affinity_GNE, real_GN) if cap is None else self._capped(affinity_GNE, real_GN, cap)
        last_GE = (
            affinity_GNE.masked_fill(~chosen_GNE, torch.inf).amin(1) if affinity_GNE.shape[1] else affinity_GNE.sum(1)
        )
        return chosen_GNE, torch.where(last_GE.isinf(), 0, last_GE)

    def _uncapped(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None) -> torch.Tensor:
        num_tokens = affinity_GNE.shape[1]
        capacity = self.capacity(num_tokens)
        if real_GN is None:
            token_GCE = affinity_GNE.topk(capacity, dim=1).indices
            return torch.zeros_like(affinity_GNE, dtype=torch.bool).scatter_(1, token_GCE, True)
        # A group with padding has fewer tokens to share out.
        token_GCE = affinity_GNE.masked_fill(~real_GN[..., None], -torch.inf).topk(capacity, dim=1).indices
        capacity_G = (real_GN.sum(1) * self.routing.top_k + self.num_experts - 1) // self.num_experts
        taken_GC = torch.arange(capacity, device=capacity_G.device) < capacity_G[:, None]
        taken_GCE = taken_GC[..., None].expand_as(token_GCE)
        return torch.zeros_like(affinity_GNE, dtype=torch.bool).scatter_(1, token_GCE, taken_GCE)

    def _capped(self, affinity_GNE: torch.Tensor, real_GN: torch.Tensor | None, cap: int) -> torch.Tensor:
        if real_GN is not None:  # groups then have different numbers of tokens, and capacities
            chosen_GNE = torch.zeros_like(affinity_GNE, dtype=torch.bool)
            for group, real_N in enumerate(real_GN):
                chosen_GNE[group, real_N] = self._capped(affinity_GNE[group, real_N][None], None, cap)[0]
            return chosen_GNE
        num_tokens = affinity_GNE.shape[1]
        # Rounding up may ask for more than the cap allows.
        capacity = min(self.capacity(num_tokens), num_tokens * cap // self.num_experts)
        if not capacity:
            return torch.zeros_like(affinity_GNE, dtype=torch.bool)
        chosen_GEN, _ = assign(affinity_GNE.transpose(1, 2), capacity, cap, CAP_ITERATIONS)
        return chosen_GEN.transpose(1, 2)

    def as_choice(self, chosen_TE: torch.Tensor, affinity_TE: torch.Tensor, tokens: Tokens) -> Choice:
        """See BatchRouter."""
        return all_experts(chosen_TE, self.slots(len(chosen_TE), tokens))
