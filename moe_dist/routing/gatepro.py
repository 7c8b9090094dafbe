"""GatePro (arXiv 2510.13079): before top-k, each expert competes with the one most similar to it, token by token.

S_ij = cos(w_i, w_j) of the rows of the router weight; j*(i) is the most similar other expert. Where z_i < z_j*(i), the logit
loses a penalty. Causal; it balances nothing by itself and is used together with a balance loss or bias. Not to be confused
with gatepro_ot.

Shape letters: T tokens, E experts.
"""

import torch
from torch.nn import functional

from moe_dist.routing.router import Router
from moe_dist.routing.types import Tokens

HARD_MARGIN = 30.0
"""Logit between winners and losers for penalty: hard; exp(-30) is 1e-13."""


class GateProRouter(Router):
    """Can be switched on and off at any step: it has no state."""

    def logits(self, hidden_TH: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """See Router."""
        logits_TE = super().logits(hidden_TH, tokens)
        if not self._is_on(tokens):
            return logits_TE
        loses_TE = self._loses(logits_TE.detach())
        penalty = self.routing.gatepro.penalty
        if penalty != "hard":
            return logits_TE - penalty * loses_TE
        # Below every expert that wins, in unchanged order and with a weight of almost 0, however large the logits are.
        height_T1 = logits_TE.detach().amax(1, keepdim=True) - logits_TE.detach().amin(1, keepdim=True)
        return logits_TE - (height_T1 + HARD_MARGIN) * loses_TE

    def _is_on(self, tokens: Tokens) -> bool:
        config = self.routing.gatepro
        return config.start_step <= tokens.step and (config.stop_step is None or tokens.step < config.stop_step)

    @torch.no_grad()
    def _loses(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """1 for each token and expert whose most similar expert has a higher logit, else 0."""
        assert self.weight is not None
        if self.num_experts == 1:
            return torch.zeros_like(logits_TE)
        row_EH = functional.normalize(self.weight.to(logits_TE.dtype), dim=1)
        similarity_EE = (row_EH @ row_EH.t()).fill_diagonal_(-torch.inf)
        return (logits_TE < logits_TE[:, similarity_EE.argmax(1)]).to(logits_TE.dtype)
