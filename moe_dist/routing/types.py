"""The records of the routing contract.

Shape letters: T tokens on this rank, E experts (global), K choices of a token, P routed (token, expert) pairs on this rank.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Tokens:
    """What is known of each token of a micro-batch, batch-major. Most routers need none of it."""

    id_T: torch.Tensor | None = None
    """int64: vocabulary ids."""
    sequence_T: torch.Tensor | None = None
    """int64: which sequence of this micro-batch, non-decreasing."""
    position_T: torch.Tensor | None = None
    """int64: place in the sequence."""
    global_index_T: torch.Tensor | None = None
    """int64: place in the global batch."""
    padding_T: torch.Tensor | None = None
    """bool: True for tokens that are not there. They are not routed and count nowhere."""
    num_sequences: int = 1
    """Sequences of this micro-batch, all of the same number of tokens."""
    step: int = 0
    """Optimiser steps done before this one: what random numbers and schedules depend on."""
    share: float | torch.Tensor = 1.0
    """Weight of this micro-batch's auxiliary losses: its tokens over those of the optimiser step, on all ranks."""
    gradient_scale: float = 1.0
    """What the engine multiplies its loss by before backward: the gradients of auxiliary losses, which do not pass through that
    loss, are multiplied by it too. Their values are not."""


@dataclass(frozen=True)
class Choice:
    """What a method chose, before weights."""

    expert_TK: torch.Tensor
    """int64: experts of each token, in the order of its preference where it has one."""
    valid_TK: torch.Tensor | None = None
    """bool: False where there is no choice after all (padding; methods whose number of choices varies). None: all hold."""
    slots: int | None = None
    """The most valid choices of any expert, where the method guarantees a number that is equal on all ranks."""


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and with what weight. Pairs stand in token order."""

    token_P: torch.Tensor
    """int64, non-decreasing: the token of each pair."""
    expert_P: torch.Tensor
    """int64: the global id of its expert."""
    weight_P: torch.Tensor
    """float32 or float64, differentiable: the weight of the expert for the token."""
    load_E: torch.Tensor
    """int64: pairs per expert on this rank before anything is dropped, padding excluded."""
    dropped_E: torch.Tensor | None = None
    """int64: pairs that capacity removed; None where nothing can be."""
    weight_on: Literal["output", "input"] = "output"
    """Whether the weight multiplies what leaves the expert or what enters it (Llama 4)."""
    identity_weight_T: torch.Tensor | None = None
    """Weight of the token itself in its output (zero-computation experts, which never travel)."""
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Auxiliary losses of this micro-batch, coefficients included: means over its tokens."""
    pairs_per_expert: int | None = None
    """Set only where every rank sends exactly this many slots to every expert; slots without a pair are empty rows. Ranks of
    an expert-parallel group must then agree on it, so hold equally many tokens (padding counts).

    Then P follows from shapes as well, so that nothing waits for the device: places that no pair fills stand last, as vacant
    pairs of token T, expert E and weight 0. `real_pairs` leaves them out."""


def keep_pairs(routing: Routing, kept_P: torch.Tensor, num_tokens: int, places: int | None) -> Routing:
    """The routing with those of its pairs that are kept, in order.

    Args:
        kept_P: bool; False for vacant pairs.
        num_tokens: T.
        places: P of the result, with vacant pairs at the end; pairs beyond it would be lost. None: as many as are kept,
            and the host waits for their number.
    """
    if places is None:
        kept_Q = kept_P.nonzero().squeeze(1)
    else:
        kept_Q = torch.nonzero_static(kept_P, size=places, fill_value=len(kept_P)).squeeze(1)

    def keep(value_P: torch.Tensor, vacant: int) -> torch.Tensor:
        if places is not None:
            value_P = torch.cat([value_P, value_P.new_full((1,), vacant)])
        return value_P.index_select(0, kept_Q)

    token_Q, expert_Q = keep(routing.token_P, num_tokens), keep(routing.expert_P, len(routing.load_E))
    return replace(routing, token_P=token_Q, expert_P=expert_Q, weight_P=keep(routing.weight_P, 0))


def real_pairs(routing: Routing) -> Routing:
    """The routing without vacant pairs, for whoever reads pairs; the host waits for their number."""
    return keep_pairs(routing, routing.expert_P < len(routing.load_E), 0, None)
