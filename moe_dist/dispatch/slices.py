"""Routing to experts -> routing to slices of them, for expert tensor parallelism.

SwiGLU and GELU act on each value of the FFN width alone. So an expert that is cut along its width into n slices is the sum
of n narrower experts, and a pair (token, expert) is n pairs (token, slice) of the same weight.

Shape letters: P pairs of tokens and experts, n slices of each expert.
"""

from dataclasses import replace

import torch

from moe_dist.routing.types import Routing


def to_slices(routing: Routing, num_slices: int) -> Routing:
    """The routing with n P pairs, whose `expert_P` are numbers of slices: e * n + j for slice j of expert e.

    Every slice of an expert gets the same rows, so `pairs_per_expert` holds for each slice. Loads, drops and losses stay
    those of experts. The gradients of a pair's n weights add up to that of its weight.
    """
    slice_n = torch.arange(num_slices, device=routing.expert_P.device)
    num_all = len(routing.load_E) * num_slices  # also the number of a vacant pair's slice
    return replace(
        routing,
        token_P=_repeat(routing.token_P, num_slices),
        expert_P=(routing.expert_P[:, None] * num_slices + slice_n).flatten().clamp_(max=num_all),
        weight_P=_repeat(routing.weight_P, num_slices),
    )


def _repeat(value_P: torch.Tensor, times: int) -> torch.Tensor:
    return value_P[:, None].expand(-1, times).flatten()
