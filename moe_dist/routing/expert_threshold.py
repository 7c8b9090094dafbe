"""Expert threshold (arXiv 2603.11535): expert choice made causal by thresholds that are known beforehand.

An expert takes the tokens whose score for it is above its threshold, a moving average of the quantile above which k / E of all
tokens lay in earlier steps (histograms, summed over ranks). The number of experts varies by token. Causal; training and
evaluation route alike.

Shape letters: T tokens, E experts, B bins.
"""

import torch

from moe_dist.routing.balance import Totals
from moe_dist.routing.batch import all_experts
from moe_dist.routing.histograms import BINS, histogram, quantile
from moe_dist.routing.router import Router
from moe_dist.routing.scores import score_reach
from moe_dist.routing.types import Choice, Tokens


class ExpertThresholdRouter(Router):
    """Before the first update there is no threshold: tokens take their top k."""

    def build(self) -> None:
        """See Router."""
        super().build()
        self.balance.add_value("threshold_E", torch.zeros(self.num_experts))
        self.balance.add_value("threshold_updates", torch.zeros((), dtype=torch.int64))
        self.balance.add_counter("scores_EB", self.num_experts, BINS)

    def choose(self, logits_TE: torch.Tensor, scores_TE: torch.Tensor, tokens: Tokens, counts: bool) -> Choice:
        """See Router."""
        if counts:
            real_T = None if tokens.padding_T is None else ~tokens.padding_T
            self.balance.scores_EB += histogram(scores_TE, *self._range(), real_T)
        best_TK = scores_TE.topk(self.routing.top_k, dim=1).indices
        best_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, best_TK, True)
        above_TE = scores_TE > self.balance.threshold_E.to(scores_TE.dtype)
        return all_experts(torch.where(self.balance.threshold_updates > 0, above_TE, best_TE), slots=None)

    def update(self, totals: Totals, bias_rate: float) -> None:
        """See Router."""
        super().update(totals, bias_rate)
        counts_EB = totals["scores_EB"]
        below_E1 = counts_EB.sum(1, keepdim=True).double() * (1 - self.routing.top_k / self.num_experts)
        threshold_E = quantile(counts_EB, below_E1, *self._range()).to(self.balance.threshold_E.dtype)
        decay = torch.where(self.balance.threshold_updates > 0, self.routing.expert_threshold.decay, 0.0)
        new_E = decay * self.balance.threshold_E + (1 - decay) * threshold_E
        seen = counts_EB.sum() > 0
        self.balance.threshold_E.copy_(torch.where(seen, new_E, self.balance.threshold_E))
        self.balance.threshold_updates += seen

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        reach = score_reach(self.routing.score, self.num_experts)
        return self.balance.threshold_E.min() - reach, self.balance.threshold_E.max() + reach
