"""Quantiles over all tokens of a step and all ranks, from histograms whose counts are summed as integers.

The mean of per-rank quantiles would not do: where ranks hold different domains, it is far from the quantile of all.

Shape letters: T tokens, E experts, B bins.
"""

import torch

BINS = 1000
"""As in arXiv 2607.24653; the error of a quantile is at most the width of a bin."""


def histogram(
    value_TE: torch.Tensor, low: torch.Tensor, high: torch.Tensor, real_T: torch.Tensor | None
) -> torch.Tensor:
    """int64 [E, B]: how often the values of each column fall into each of B equal bins from `low` to `high`.

    Values outside count in the first or last bin.
    """
    num_tokens, num_experts = value_TE.shape
    bin_TE = ((value_TE - low) / (high - low) * BINS).nan_to_num().clamp(0, BINS - 1).long()
    bin_TE = bin_TE + torch.arange(num_experts, device=value_TE.device) * BINS
    one_TE = torch.ones_like(bin_TE) if real_T is None else real_T.long()[:, None].expand(num_tokens, num_experts)
    counts = torch.zeros(num_experts * BINS, dtype=torch.int64, device=value_TE.device)
    return counts.scatter_add_(0, bin_TE.flatten(), one_TE.flatten()).view(num_experts, BINS)


def quantile(counts_EB: torch.Tensor, rank: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """float64 [E]: the value that `rank` of a column's values lie below, interpolated inside its bin."""
    rank, cumulated_EB = rank.double(), counts_EB.cumsum(1)
    bin_E1 = (cumulated_EB < rank).sum(1, keepdim=True).clamp(max=BINS - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    below_E1 = cumulated_EB.gather(1, bin_E1) - inside_E1
    place_E1 = bin_E1 + ((rank - below_E1) / inside_E1.clamp(min=1)).clamp(0, 1)
    return (low + place_E1 * (high - low) / BINS).squeeze(1)
