"""Balance as numbers, from counts. What needs the choices or scores of each token is in statistics.py, importable from here.

`load` is int64 counts [..., E] before anything is dropped, of experts or of ranks (`rank_load`); all results drop the last
dimension. No load at all, and a single expert (E = 1), count as perfect balance.

Shape letters: B consecutive micro-batches, S batch sizes, E experts.
"""

import math
from collections.abc import Sequence

import torch

from moe_dist.routing.statistics import (
    changed_by_bias,
    coactivation,
    coactivation_rate,
    entropy,
    expert_specialisation,
    margin,
    marginal_entropy,
    mask_saturation,
    mutual_information,
    router_entropy,
    saturation,
    vocabulary_counts,
    vocabulary_specialisation,
)

__all__ = [
    "avg_vio",
    "changed_by_bias",
    "coactivation",
    "coactivation_rate",
    "coefficient_of_variation",
    "dead_experts",
    "drop_rate",
    "effective_experts",
    "expert_specialisation",
    "gini",
    "load_entropy",
    "margin",
    "marginal_entropy",
    "mask_saturation",
    "max_over_mean",
    "max_vio",
    "max_vio_by_batch_size",
    "min_vio",
    "mutual_information",
    "noise_floor",
    "normalised_load_entropy",
    "pad_rate",
    "rank_load",
    "relative_max_vio",
    "router_entropy",
    "saturation",
    "vocabulary_counts",
    "vocabulary_specialisation",
]


def max_vio(load: torch.Tensor) -> torch.Tensor:
    """(max - mean) / mean (arXiv 2408.15664, Eq. 5); 0 is perfect balance, E - 1 is all on one expert."""
    return (load.amax(-1) - load.double().mean(-1)) / _mean(load)


def min_vio(load: torch.Tensor) -> torch.Tensor:
    """1 - min / mean; 0 is perfect balance, 1 an expert that got nothing."""
    return (load.double().mean(-1) - load.amin(-1)) / _mean(load)


def avg_vio(load: torch.Tensor) -> torch.Tensor:
    """mean |load - mean| / mean; 0 is perfect balance, 2 - 2 / E is all on one expert."""
    load = load.double()
    return (load - load.mean(-1, keepdim=True)).abs().mean(-1) / _mean(load)


def max_over_mean(load: torch.Tensor) -> torch.Tensor:
    """max / mean = 1 + MaxVio: how much longer the busiest works than if all had the same (1 where there is no load)."""
    return 1 + max_vio(load)


def coefficient_of_variation(load: torch.Tensor) -> torch.Tensor:
    """Population standard deviation / mean."""
    return load.double().std(-1, correction=0) / _mean(load)


def load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Entropy of the shares of the load, in nats: log E is perfect balance (also where there is no load), 0 all on one."""
    total = load.sum(-1, keepdim=True).double()
    return entropy(torch.where(total > 0, load / total.clamp(min=1), 1 / load.shape[-1]))


def normalised_load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Load entropy / log E: 1 is perfect balance (also for E = 1), 0 all on one expert."""
    num_experts = load.shape[-1]
    return load_entropy(load) / math.log(num_experts) if num_experts > 1 else load_entropy(load) + 1


def effective_experts(load: torch.Tensor) -> torch.Tensor:
    """exp(load entropy): the number of equally loaded experts of the same entropy, 1 to E (E where there is no load)."""
    return load_entropy(load).exp()


def gini(load: torch.Tensor) -> torch.Tensor:
    """sum_ij |load_i - load_j| / (2 E^2 mean), by sorting; 0 is perfect balance, 1 - 1 / E is all on one expert."""
    num_experts = load.shape[-1]
    # In integers, so that equal loads give exactly 0: rank i of 1 to E is above i - 1 loads and below E - i.
    above_less_below_E = 2 * torch.arange(num_experts, device=load.device) - num_experts + 1
    differences = (above_less_below_E * load.sort(-1).values).sum(-1)
    return differences / (num_experts * load.sum(-1)).clamp(min=1).double()


def dead_experts(load: torch.Tensor) -> torch.Tensor:
    """Experts that got nothing."""
    return (load == 0).sum(-1)


def noise_floor(num_experts: int, num_pairs: float) -> float:
    """MaxVio to expect of `num_pairs` pairs that choose experts uniformly at random: sqrt(2 ln E * E / pairs)."""
    return math.sqrt(2 * math.log(num_experts) * num_experts / num_pairs) if num_pairs else math.inf


def relative_max_vio(load: torch.Tensor) -> torch.Tensor:
    """MaxVio / its noise floor for as many pairs: about 1 or below is as balanced as uniformly random choices are.

    Well above 1, some experts are preferred; well below, the choices are balanced by design. The floor is a formula for many
    experts and many pairs. Random choices give, on average, 0.5 for E = 2, 0.7 for 8, 0.8 for 64 and 0.9 for 1024; with only
    one pair per expert 1.0 for 64 and 1.2 for 1024. No load and E = 1 give 0.
    """
    return max_vio(load) / _noise_floor(load).clamp(min=1e-12)


def max_vio_by_batch_size(load_BE: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """MaxVio of computation batches: of the tokens that meet in one expert's GEMM (arXiv 2408.15664).

    Expert parallelism merges the micro-batches of its ranks into one computation batch. A method that balances all data on
    average keeps improving as that batch grows, along with the noise floor; what is left far above the floor is a lasting
    preference.

    Args:
        load_BE: int64 [B, ..., E], loads of consecutive micro-batches.
        sizes: how many consecutive micro-batches to merge; each 1 to B. Those left over at the end are not used.

    Returns:
        For each size, the MaxVio and the noise floor, both means over its merged batches: float64 [S, ...]. The floor is inf
        if a merged batch has no load.

    Raises:
        ValueError: if a size is not 1 to B.
    """
    num_batches = load_BE.shape[0]
    for size in sizes:
        if not 1 <= size <= num_batches:
            raise ValueError(f"sizes: {size} is not 1 to {num_batches}, the number of micro-batches")
    merged = [load_BE[: num_batches // s * s].unflatten(0, (-1, s)).sum(1) for s in sizes]
    max_vio_S, floor_S = ([metric(load).mean(0) for load in merged] for metric in (max_vio, _noise_floor))
    return torch.stack(max_vio_S), torch.stack(floor_S)


def drop_rate(load: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Share of the pairs that capacity removed."""
    return dropped.sum(-1) / load.sum(-1).clamp(min=1)


def pad_rate(kept: torch.Tensor, slots_per_expert: int) -> torch.Tensor:
    """Share of the slots of a buffer padded to capacity, `slots_per_expert` for each expert, that hold no pair.

    Args:
        kept: int64 [..., E], load - dropped: at most `slots_per_expert` each.
        slots_per_expert: C, at least 1; over all that `kept` counts, as ranks or micro-batches.
    """
    num_slots = slots_per_expert * kept.shape[-1]
    return (num_slots - kept.sum(-1)).double() / num_slots


def rank_load(load: torch.Tensor, owner_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """int64 [..., ranks]: pairs that each expert-parallel rank computes, for `max_vio` and the others of ranks.

    Args:
        load: int64 [..., E].
        owner_E: int64, the rank of each expert.
        num_ranks: more than any owner; a rank may own nothing.
    """
    return load.new_zeros(*load.shape[:-1], num_ranks).index_add_(-1, owner_E, load)


def _mean(load: torch.Tensor) -> torch.Tensor:
    return load.double().mean(-1).clamp(min=1e-12)


def _noise_floor(load: torch.Tensor) -> torch.Tensor:
    pairs = load.sum(-1)
    return torch.where(pairs > 0, noise_floor(load.shape[-1], 1) / pairs.clamp(min=1).double().sqrt(), math.inf)
