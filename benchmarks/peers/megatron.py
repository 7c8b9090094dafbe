"""Megatron-Core 0.16.1's MoELayer without TransformerEngine."""

import shutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import emulation
from .competitor import Competitor, Source, UnavailableError
from .problem import Problem


class Megatron(Competitor):
    """Its local experts; bfloat16 is Megatron's own mode of that name."""

    def build(self, problem: Problem, dispatcher: str = "alltoall", fused: bool = False, grouped: bool = False):
        """Build the layer.

        Args:
            dispatcher: Megatron's moe_token_dispatcher_type.
            fused: SwiGLU through torch.compile.
            grouped: GroupedMLP, which always fuses its SwiGLU, instead of SequentialMLP.
        """
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        if (fused or grouped) and not shutil.which("g++"):
            raise UnavailableError("torch.compile finds no C++ compiler")
        emulation.mend_megatron()
        if problem.device.type == "cpu":
            emulation.run_megatron_on_cpu()
        if grouped:
            emulation.give_megatron_grouped_gemm()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=problem.ranks)
        spec = get_moe_module_spec(use_te=False, num_experts=problem.shape.experts, moe_grouped_gemm=grouped)
        self.grouped = grouped
        return MoELayer(_config(problem, dispatcher, fused, grouped), spec.submodules)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH[:, None])[0][:, 0]  # Megatron's layout is [sequence, batch, hidden]

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        experts = self.layer.experts
        if self.grouped:
            gate_up_HG = source(experts.weight1).view(experts.num_local_experts, experts.config.hidden_size, -1)[place]
            down_FH = source(experts.weight2).view(experts.num_local_experts, -1, experts.config.hidden_size)[place]
        else:
            linears = experts.local_experts[place]
            gate_up_HG, down_FH = source(linears.linear_fc1.weight).T, source(linears.linear_fc2.weight).T
        return *gate_up_HG.chunk(2, dim=1), down_FH


def _config(problem: Problem, dispatcher: str, fused: bool, grouped: bool):
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = problem.shape
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        moe_grouped_gemm=grouped,
        expert_model_parallel_size=problem.ranks,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=fused,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=problem.dtype,
        bf16=grouped
        or problem.dtype == torch.bfloat16,  # GroupedMLP asserts the flag; what it computes in is params_dtype
    )
