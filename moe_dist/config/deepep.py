"""What DeepEP 1.2.1 can carry: the limits of its high-throughput kernels, for the checks and for the backend itself."""

from collections.abc import Iterator

from moe_dist.config.methods import METHODS
from moe_dist.config.schema import Config

RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Those that its `get_dispatch_config` and `get_combine_config` know."""
_RANKS_OF_A_NODE = 8
_MOST_CHOICES = 32
_LEAST_TOO_WIDE = 8192


def most_choices(config: Config) -> int:
    """The most experts that one token can have, or slices of them."""
    varies = METHODS[config.routing.method].varies
    return (config.moe.num_experts if varies else config.routing.top_k) * config.parallel.expert_tensor


def deepep_problems(hidden_size: int, num_ranks: int, num_choices: int) -> Iterator[str]:
    """Why `parallel.dispatch: deepep` cannot be, one message for each reason.

    Args:
        num_ranks: of an expert-parallel group.
        num_choices: the most experts that one token can have, or slices of them.
    """
    if num_ranks not in RANKS:
        yield (
            f"parallel.dispatch: deepep has no settings for expert-parallel groups of {num_ranks} ranks; "
            f"use one of {', '.join(map(str, RANKS))}, or flat or hierarchical"
        )
    multiple = 16 if num_ranks <= _RANKS_OF_A_NODE else 256
    if hidden_size % multiple or hidden_size >= _LEAST_TOO_WIDE:
        yield (
            f"parallel.dispatch: deepep needs a multiple of {multiple} below {_LEAST_TOO_WIDE} as model.hidden_size "
            f"for groups of {num_ranks} ranks, not {hidden_size}; use flat or hierarchical"
        )
    if num_choices > _MOST_CHOICES:
        yield (
            f"parallel.dispatch: deepep sends a token to at most {_MOST_CHOICES} experts, and here one may have "
            f"{num_choices}; use flat or hierarchical"
        )
