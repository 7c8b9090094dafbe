"""Auxiliary losses of a router, and how their gradient joins the main loss.

Those that are means over tokens leave padding out. Load-balance losses are normalised so that uniform routing gives exactly
the coefficient, for every number of experts E and of experts per token K; squared coefficients of variation and similarities
are 0 at their best.

Shape letters: T tokens, E experts, B sequences of the micro-batch.
"""

from dataclasses import replace
from typing import Any

import torch

from moe_dist.routing.types import Routing


def load_balance_loss(
    probability_TE: torch.Tensor,
    load_E: torch.Tensor,
    real_T: torch.Tensor | None,
    divisor: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i f_i P_i with f_i = E load_i / divisor, P_i the mean probability of i (arXiv 2101.03961, Eq. 4-6; any k).

    The same form serves groups of experts (devices, arXiv 2401.06066, Eq. 15-17): E is then the number of groups.

    Args:
        probability_TE: probabilities of each token, which sum to 1; they carry the gradient.
        load_E: counts of the tokens that the loss is about, maybe more than these T.
        real_T: False for padding; None where there is none.
        divisor: default the sum of the loads, so that uniform routing gives 1.
    """
    divisor = load_E.sum().clamp(min=1) if divisor is None else divisor
    fraction_E = load_E.to(probability_TE.dtype) / divisor * load_E.shape[0]
    return _mean(probability_TE @ fraction_E, real_T)


def sequence_load_balance_loss(
    probability_TE: torch.Tensor,
    chosen_TE: torch.Tensor,
    num_sequences: int,
    real_T: torch.Tensor | None,
    per_token: float | None = None,
) -> torch.Tensor:
    """The load-balance loss of each sequence on its own (arXiv 2412.19437, Eq. 17-20), averaged by their tokens.

    Args:
        probability_TE: as above.
        chosen_TE: 1 where the token is routed to the expert, all 0 for padding.
        num_sequences: B, with T / B tokens each.
        per_token: the divisor, in choices of a token; default what there are, so that uniform routing gives 1.
    """
    num_tokens, num_experts = probability_TE.shape
    load_BE = chosen_TE.view(num_sequences, -1, num_experts).sum(1).to(probability_TE.dtype)
    divisor_B1 = load_BE.sum(1, keepdim=True)
    if per_token is not None:
        real = probability_TE.new_ones(num_tokens) if real_T is None else real_T.to(probability_TE.dtype)
        divisor_B1 = per_token * real.view(num_sequences, -1).sum(1, keepdim=True)
    fraction_BE = num_experts * load_BE / divisor_B1.clamp(min=1)
    probability_BSE = probability_TE.view(num_sequences, -1, num_experts)
    per_token_T = torch.einsum("bse,be->bs", probability_BSE, fraction_BE).reshape(num_tokens)
    return _mean(per_token_T, real_T)


def squared_cv(value_E: torch.Tensor) -> torch.Tensor:
    """(standard deviation / mean)^2 over experts, of their importance or load (arXiv 1701.06538, Eq. 7 and 11)."""
    return value_E.var(correction=0) / (value_E.mean().square() + 1e-10)


def smooth_load(
    clean_TE: torch.Tensor, noisy_TE: torch.Tensor, deviation_TE: torch.Tensor, top_k: int, real_T: torch.Tensor | None
) -> torch.Tensor:
    """[E] differentiable loads: sum_t P(the expert is among the top k of t when its own noise is drawn anew)
    (arXiv 1701.06538, Eq. 8-10).

    Args:
        clean_TE: logits without noise.
        noisy_TE: clean_TE + deviation_TE * normal noise.
        deviation_TE: standard deviation of the noise.
    """
    if top_k == clean_TE.shape[1]:  # every expert is always chosen
        return (clean_TE * 0 + 1).sum(0)
    top_TK = noisy_TE.topk(top_k + 1, dim=1).values
    kth_T1, next_T1 = top_TK[:, top_k - 1 : top_k], top_TK[:, top_k:]
    threshold_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)  # the k-th largest of the other experts
    probability_TE = torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE)
    return (probability_TE if real_T is None else torch.where(real_T[:, None], probability_TE, 0)).sum(0)


def simbal_loss(weight_EH: torch.Tensor, mean: bool) -> torch.Tensor:
    """|W W^T - I|_1 (arXiv 2506.14038): the sum over pairs of experts, or their mean."""
    distance_EE = (
        weight_EH @ weight_EH.t() - torch.eye(len(weight_EH), dtype=weight_EH.dtype, device=weight_EH.device)
    ).abs()
    return distance_EE.mean() if mean else distance_EE.sum()


def orthogonality_loss(weight_EH: torch.Tensor, mean: bool) -> torch.Tensor:
    """Squared cosines between different rows of the router weight: the sum over pairs of experts, or their mean."""
    row_EH = torch.nn.functional.normalize(weight_EH, dim=1)
    cosine_EE = row_EH @ row_EH.t()
    pairs = len(weight_EH) * (len(weight_EH) - 1)
    total = cosine_EE.square().sum() - cosine_EE.diagonal().square().sum()
    return total / max(1, pairs) if mean else total


def z_loss(logits_TE: torch.Tensor, real_T: torch.Tensor | None) -> torch.Tensor:
    """mean(logsumexp(logits)^2) (arXiv 2202.08906, Eq. 5)."""
    return _mean(logits_TE.logsumexp(-1).square(), real_T)


def attach_losses(routing: Routing, share: float | torch.Tensor) -> Routing:
    """The routing, whose weights carry the gradients of its losses, weighted by `share`.

    They ride on the weights, which every gradient of the routing passes; where no weight needs one (constant weights), the
    losses have no parameter to reach either.
    """
    for loss in routing.losses.values():
        routing = replace(routing, weight_P=attach(routing.weight_P, loss, share))
    return routing


def attach(carrier: torch.Tensor, loss: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """`carrier` unchanged, whose backward adds `share * loss` to the main loss.

    The loss thus needs no way up the call tree, and no engine has to know of it.
    """
    return _Attach.apply(carrier, loss, share)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
        ctx.share, ctx.dtype = share, loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        one = grads[0].new_ones((), dtype=ctx.dtype)
        return grads[0], one * ctx.share, None


def _mean(value_T: torch.Tensor, real_T: torch.Tensor | None) -> torch.Tensor:
    if real_T is None:
        return value_T.mean() if value_T.numel() else value_T.sum()
    return torch.where(real_T, value_T, 0).sum() / real_T.sum().clamp(min=1)
