"""Auxiliary losses of a router, and how their gradient joins the main loss.

All are means over the tokens of the micro-batch that are not padding, and are normalised so that uniform routing gives
exactly the coefficient, for every number of experts E and of experts per token K.

Shape letters: T tokens, E experts, B sequences of the micro-batch.
"""

from typing import Any

import torch


def load_balance_loss(probability_TE: torch.Tensor, load_E: torch.Tensor, real_T: torch.Tensor | None) -> torch.Tensor:
    """sum_i f_i P_i with f_i = E load_i / sum(load), P_i the mean probability of i (arXiv 2101.03961, Eq. 4-6; any k).

    Args:
        probability_TE: probabilities of each token, which sum to 1; they carry the gradient.
        load_E: counts of the tokens that the loss is about, maybe more than these T.
        real_T: False for padding; None where there is none.
    """
    fraction_E = load_E.to(probability_TE.dtype) / load_E.sum().clamp(min=1) * load_E.shape[0]
    per_token_T = probability_TE @ fraction_E
    return _mean(per_token_T, real_T)


def sequence_load_balance_loss(
    probability_TE: torch.Tensor, chosen_TE: torch.Tensor, num_sequences: int, real_T: torch.Tensor | None
) -> torch.Tensor:
    """The load-balance loss of each sequence on its own (arXiv 2412.19437, Eq. 17-20), averaged by their tokens.

    Args:
        probability_TE: as above.
        chosen_TE: 1 where the token is routed to the expert, all 0 for padding.
        num_sequences: B, with T / B tokens each.
    """
    num_tokens, num_experts = probability_TE.shape
    load_BE = chosen_TE.view(num_sequences, -1, num_experts).sum(1).to(probability_TE.dtype)
    fraction_BE = num_experts * load_BE / load_BE.sum(1, keepdim=True).clamp(min=1)
    probability_BSE = probability_TE.view(num_sequences, -1, num_experts)
    per_token_T = torch.einsum("bse,be->bs", probability_BSE, fraction_BE).reshape(num_tokens)
    return _mean(per_token_T, real_T)


def z_loss(logits_TE: torch.Tensor, real_T: torch.Tensor | None) -> torch.Tensor:
    """mean(logsumexp(logits)^2) (arXiv 2202.08906, Eq. 5)."""
    return _mean(logits_TE.logsumexp(-1).square(), real_T)


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
