"""What the parts of the fused journey hand each other.

Shape letters: U rows of a buffer, R rows of this rank's experts, Q the same rows as kernels lay them out, H hidden, L
experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from moe_dist.dispatch.types import Plan, Segments

Activation = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class Weights:
    """The experts of a rank."""

    w_in_LHG: torch.Tensor
    w_out_LFH: torch.Tensor
    activation: Activation


@dataclass(frozen=True)
class Rows:
    """The rows of the segments, wherever they are; they are fetched when they are used."""

    buffer_UH: torch.Tensor
    starts: list[int]
    """For each segment its first row: of `index_R` if there is one, else of the buffer. Nothing stands behind the last."""
    index_R: torch.Tensor | None = None
    """int64: rows of the buffer. None: the rows stand in the buffer as they are."""


@dataclass(frozen=True)
class Incoming:
    """What backward starts from."""

    grad: Rows
    """Gradients of the outputs, before their weights."""
    weight_R: torch.Tensor | None
    """Weights of the outputs, at the places that `grad.starts` speaks of. None: 1."""
    kept: list[torch.Tensor]
    """What forward kept; without anything, backward computes it again."""


@dataclass(frozen=True)
class Result:
    """Rows in an order of the kernels' own."""

    rows_QH: torch.Tensor
    """May live in a workspace."""
    place_R: torch.Tensor | None
    """int64: for each row in the order of the segments its place in Q. None: the same order."""
    d_weight_Q: torch.Tensor | None = None
    """Of backward: the gradients of the rows' weights."""

    def in_order(self, value_Q: torch.Tensor) -> torch.Tensor:
        """Values of Q in the order of the segments."""
        return value_Q if self.place_R is None else value_Q.index_select(0, self.place_R)

    def place(self, plan: Plan) -> Plan:
        """The plan with places in Q for its slots, of which the rows are."""
        return plan if self.place_R is None else replace(plan, slot_P=self.place_R[plan.slot_P])


@dataclass(frozen=True)
class WeightGradients:
    """Stacks that backward fills, each expert once."""

    d_w_in_LHG: torch.Tensor
    d_w_out_LFH: torch.Tensor


RowsDone = Callable[[Result], None]
"""Called with the gradients of the rows and their weights, while those of the experts are still to come."""


@dataclass(frozen=True)
class Kernels:
    """One way to compute experts, forward and backward, without autograd."""

    forward: Callable[[Rows, Segments, Weights, str], tuple[Result, list[torch.Tensor]]]
    """(rows, segments, weights, name) -> the outputs, and what backward wants to have kept. The result may live in the
    workspace `name`."""
    backward: Callable[[Rows, Incoming, Segments, Weights, WeightGradients | None, str, RowsDone], None]
    """(rows, incoming, segments, weights, gradients to fill or None for frozen experts, name, rows_done)"""
