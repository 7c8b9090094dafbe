"""The routed experts of one rank as stacked weights, and the shared expert that every token uses.

Shape letters: R rows, H hidden, L experts on this rank, F FFN width, G width of the first GEMM (2F for SwiGLU).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch.types import Journey, Segments
from moe_dist.experts.backends import Backend, choose_backend
from moe_dist.experts.journey import Stage, travel, untimed
from moe_dist.experts.types import Activation, Weights


class Experts(nn.Module):
    """`experts(rows_RH, segments) -> rows_RH`. Without rows every weight still gets a gradient, of zeros."""

    def __init__(self, hidden_size: int, moe: MoEConfig, num_local_experts: int) -> None:
        super().__init__()
        self.moe = moe
        width = moe.ffn_size
        if moe.activation == "swiglu":  # gate columns, then up columns
            self.w_gate_up = nn.Parameter(torch.empty(num_local_experts, hidden_size, 2 * width))
        else:
            self.w_up = nn.Parameter(torch.empty(num_local_experts, hidden_size, width))
        self.w_down = nn.Parameter(torch.empty(num_local_experts, width, hidden_size))

    def weights_of(self, place: int, source: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views of one expert's weights by their unpacked names: w_gate [H, F], w_up [H, F], w_down [F, H].

        Args:
            place: place of the expert in the stack.
            source: what to view of each parameter: itself, its gradient, a moment.
        """
        down = source(self.w_down)[place]
        if self.moe.activation == "gelu":
            return {"w_up": source(self.w_up)[place], "w_down": down}
        gate, up = source(self.w_gate_up)[place].chunk(2, dim=1)
        return {"w_gate": gate, "w_up": up, "w_down": down}

    def forward(
        self,
        rows: torch.Tensor,
        where: Segments | Journey,
        weight_P: torch.Tensor | None = None,
        stage: Stage = untimed,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Compute rows that are here, or take tokens on their whole journey.

        Args:
            rows: [R, H] rows of `where`, which are Segments; or [T, H] tokens, of a Journey.
            weight_P: weights of the outputs; of a Journey only.
            stage: times the parts of a Journey.
            meanwhile: called once while the first rows are on their way.

        Returns:
            [R, H] outputs of the rows; or [T, H] the weighted sums of the tokens.
        """
        w_in_LHG = self.w_gate_up if self.moe.activation == "swiglu" else self.w_up
        weights = Weights(w_in_LHG.to(rows.dtype), self.w_down.to(rows.dtype), self.moe.activation)
        backend = self.backend(rows, where.equal)
        if isinstance(where, Segments):
            return backend.compute(rows, where, weights.w_in_LHG, weights.w_out_LFH, weights.activation)
        assert backend.kernels is not None
        assert weight_P is not None
        return travel(
            rows, weight_P, where, weights, backend.kernels, self.moe.recompute == "experts", stage, meanwhile
        )

    def backend(self, rows: torch.Tensor, equal: bool) -> Backend:
        """What computes rows of this width, dtype and device; `equal`: with equally many for each expert."""
        widths = rows.shape[1], self.moe.ffn_size
        return choose_backend(self.moe.backend, rows.device, rows.dtype, widths, self.moe.activation, equal)


class FeedForward(nn.Module):
    """An ordinary FFN: of the dense layers, and of the shared experts, which are fused into one.

    `gated`: the output is multiplied by sigmoid(x w), as Qwen2-MoE's shared expert is.
    """

    def __init__(self, hidden_size: int, ffn_size: int, activation: Activation = "swiglu", gated: bool = False) -> None:
        super().__init__()
        self.w_gate = nn.Linear(hidden_size, ffn_size, bias=False) if activation == "swiglu" else None
        self.w_up = nn.Linear(hidden_size, ffn_size, bias=False)
        self.w_down = nn.Linear(ffn_size, hidden_size, bias=False)
        self.output_gate = nn.Linear(hidden_size, 1, bias=False) if gated else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        up = self.w_up(hidden)
        active = functional.gelu(up) if self.w_gate is None else functional.silu(self.w_gate(hidden)) * up
        out = self.w_down(active)
        return out if self.output_gate is None else functional.sigmoid(self.output_gate(hidden)) * out
