"""Balance as numbers. `load` is int64 counts, [..., E]; all results drop the last dimension."""

import math

import torch


def max_vio(load: torch.Tensor) -> torch.Tensor:
    """(max - mean) / mean (arXiv 2408.15664, Eq. 5); 0 is perfect balance."""
    return (load.amax(-1) - load.double().mean(-1)) / _mean(load)


def coefficient_of_variation(load: torch.Tensor) -> torch.Tensor:
    """Population standard deviation / mean."""
    return load.double().std(-1, correction=0) / _mean(load)


def dead_experts(load: torch.Tensor) -> torch.Tensor:
    """Experts that got nothing."""
    return (load == 0).sum(-1)


def drop_rate(load: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Share of the pairs that capacity removed."""
    return dropped.sum(-1) / load.sum(-1).clamp(min=1)


def noise_floor(num_experts: int, num_pairs: float) -> float:
    """MaxVio to expect of `num_pairs` pairs that choose experts uniformly at random: sqrt(2 ln E * E / pairs)."""
    return math.sqrt(2 * math.log(num_experts) * num_experts / num_pairs) if num_pairs else math.inf


def _mean(load: torch.Tensor) -> torch.Tensor:
    return load.double().mean(-1).clamp(min=1e-12)
