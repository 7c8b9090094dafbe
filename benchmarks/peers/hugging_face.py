"""Hugging Face transformers' sparse block."""

from torch import Tensor, nn

from .competitor import Competitor, Source
from .problem import Problem, Shape


class HuggingFace(Competitor):
    """Qwen3-MoE's block, which is OLMoE's with the weights of a token normalised to 1."""

    one_rank_only = True

    def build(self, problem: Problem, implementation: str) -> nn.Module:
        """Build the block.

        Args:
            implementation: transformers' `experts_implementation`.
        """
        return sparse_block(problem.shape, implementation)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH[None])[0]

    def router_weight(self) -> nn.Parameter:
        return self.layer.gate.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        experts = self.layer.experts
        return *source(experts.gate_up_proj)[place].T.chunk(2, dim=1), source(experts.down_proj)[place].T


def sparse_block(shape: Shape, implementation: str) -> nn.Module:
    """Raises ImportError without transformers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    return Qwen3MoeSparseMoeBlock(config)
