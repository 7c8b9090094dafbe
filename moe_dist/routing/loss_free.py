"""The rules of loss-free balancing: how a bias for selection follows the loads, once per optimiser step.

Shape letters: T tokens, E experts (here with zero-computation experts, whose bias stays 0), B bins.
"""

import torch

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing.balance import BalanceState, Totals
from moe_dist.routing.histograms import BINS, histogram, quantile
from moe_dist.routing.scores import score_reach


def add_state(state: BalanceState, routing: RoutingConfig, num_experts: int) -> None:
    """The counters and values that the rule needs beside the bias."""
    if routing.bias.rule == "multiplicative":
        state.bias_E.fill_(1)
    if routing.bias.rule == "momentum":
        state.add_value("momentum_E", torch.zeros(num_experts))
    if routing.bias.rule == "quantile":
        state.add_counter("wanted_bias_EB", num_experts, BINS)


def apply_bias(scores_TE: torch.Tensor, state: BalanceState, routing: RoutingConfig) -> torch.Tensor:
    """[T, E] what selection compares."""
    if routing.bias.rule == "none":
        return scores_TE
    bias_E = state.bias_E.to(scores_TE.dtype)
    return scores_TE * bias_E if routing.bias.rule == "multiplicative" else scores_TE + bias_E


def observe(
    scores_TE: torch.Tensor,
    selection_TE: torch.Tensor,
    state: BalanceState,
    routing: RoutingConfig,
    real_T: torch.Tensor | None,
) -> None:
    """Count what the quantile rule needs: for each token and expert the bias from which on the token would choose it."""
    if routing.bias.rule != "quantile" or routing.top_k == selection_TE.shape[1]:
        return
    best_TK = selection_TE.topk(routing.top_k + 1, dim=1).values
    # What a further choice would have to beat. Where the number of routed choices is free (zero-computation experts), the
    # middle between the last choice and the next: at the next one's own value any load below the target would stay.
    threshold_T1 = best_TK[:, -1:] if routing.zero_experts is None else best_TK[:, -2:].mean(1, keepdim=True)
    # Outside the groups that a token chooses from no bias would bring an expert in.
    excluded_TE = selection_TE[:, : scores_TE.shape[1]] == -torch.inf
    low, high = _range(state.bias_E, routing)
    wanted_TE = torch.where(excluded_TE, high + 1, threshold_T1 - scores_TE)
    state.wanted_bias_EB += histogram(wanted_TE, low, high, real_T)


def update_bias(state: BalanceState, totals: Totals, routing: RoutingConfig, rate: float) -> None:
    """One step of the rule.

    sign (arXiv 2408.15664, Algorithm 1) compares integers, so that no rounding can turn a sign. Centring changes no choice
    and keeps the mean from drifting.
    """
    rule = routing.bias.rule
    if rule == "none":
        return
    if rule == "quantile":
        _follow_quantile(state, totals, routing)
    else:
        load_E = totals["load_E"]
        pairs = (
            load_E.sum() if routing.zero_experts is None else totals["tokens"].double() * routing.zero_experts.target
        )
        _follow_error(state, load_E, pairs, routing, rate)
    if routing.bias.centre and routing.zero_experts is None:
        if rule == "multiplicative":
            state.bias_E /= state.bias_E.mean()
        else:
            state.bias_E -= state.bias_E.mean()


def _follow_error(
    state: BalanceState, load_E: torch.Tensor, pairs: torch.Tensor, routing: RoutingConfig, rate: float
) -> None:
    config = routing.bias
    excess_E = len(load_E) * load_E - pairs  # of the load over the mean, times E
    if config.rule in ("sign", "multiplicative"):
        state.bias_E -= torch.sign(excess_E).to(state.bias_E.dtype) * rate
        return
    error_E = -excess_E.double() / pairs.clamp(min=1)
    if config.rule == "momentum":
        step_E = rate * torch.tanh(config.slope * error_E)
        state.momentum_E.mul_(config.momentum).add_((1 - config.momentum) * step_E)
        state.bias_E += state.momentum_E
    else:
        state.bias_E += rate * error_E


def _follow_quantile(state: BalanceState, totals: Totals, routing: RoutingConfig) -> None:
    counts_EB = totals["wanted_bias_EB"]
    per_token = routing.top_k if routing.zero_experts is None else routing.zero_experts.target
    tokens_E1 = counts_EB.sum(1, keepdim=True)
    share_E1 = tokens_E1.double() * (per_token / len(counts_EB))  # of the tokens, for each expert
    bias_E = quantile(counts_EB, share_E1, *_range(state.bias_E, routing)).to(state.bias_E.dtype)
    bias_E = torch.where(tokens_E1[:, 0] > 0, bias_E, state.bias_E)
    state.bias_E.lerp_(bias_E, 1 - routing.bias.decay)


def _range(bias_E: torch.Tensor, routing: RoutingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next bias is looked for: as far around the present ones as scores reach (arXiv 2607.24653 for sigmoid)."""
    reach = score_reach(routing.score, len(bias_E))
    return bias_E.min() - reach, bias_E.max() + reach
