"""DeepSpeed 0.19.8's two layers."""

import contextlib
import io
import logging

from torch import Tensor, nn

from .competitor import Competitor, Source
from .problem import Problem, Shape, swiglu


class DeepSpeed(Competitor):
    """Its native MoE without drops: every expert is padded to the fullest one."""

    def build(self, problem: Problem) -> nn.Module:
        _start(problem)
        from deepspeed.moe.layer import MoE

        shape = problem.shape
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its groups by print
            layer = MoE(
                shape.hidden,
                _SwiGLUExpert(shape),
                num_experts=shape.experts,
                ep_size=problem.ranks,
                k=shape.top_k,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,  # the default draws the second expert at random
            )
            layer.set_deepspeed_parallelism()
        return layer

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH)[0]

    def router_weight(self) -> nn.Parameter:
        return self.layer.deepspeed_moe.gate.wg.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        expert = self.layer.deepspeed_moe.experts.deepspeed_experts[place]
        return *source(expert.gate_up.weight).T.chunk(2, dim=1), source(expert.down.weight).T


class _SwiGLUExpert(nn.Module):
    """The expert that DeepSpeed's layer copies."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class AutoEP(Competitor):
    """The layer that AutoEP puts in place of Hugging Face's: grouped GEMM on a GPU, its loop over experts on a CPU."""

    def build(self, problem: Problem) -> nn.Module:
        _start(problem)
        from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        from .hugging_face import sparse_block

        shape = problem.shape
        spec = MoELayerSpec(
            moe_module_name="mlp",
            model_family="qwen3_moe",
            router_name="gate",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_up_proj",
            expert_w2_name="down_proj",
            expert_w3_name=None,
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            ffn_hidden_size=shape.ffn,
            score_func="softmax",
            score_apply="post",
            route_norm=True,
            gate_bias=False,
            return_router_logits=False,
            router_logits_capture_target="none",
            router_logits_capture_index=None,
            router_logits_capture_layer_name=None,
            has_shared_experts=False,
            shared_experts_name="",
        )
        config = AutoEPConfig(enabled=True, autoep_size=problem.ranks, use_grouped_mm=problem.device.type == "cuda")
        layer = AutoEPMoELayer(spec, sparse_block(shape, "eager"), problem.ranks, problem.rank, config)
        layer.set_deepspeed_parallelism()
        return layer

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH[None])[0]

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.gate.weight

    def expert(self, place: int, source: Source) -> tuple[Tensor, Tensor, Tensor]:
        experts = self.layer.experts
        gate, down, up = (source(weight)[place].T for weight in (experts.w1, experts.w2, experts.w3))
        return gate, up, down


def _start(problem: Problem) -> None:
    """Wrap the running process group, quietly and without building DeepSpeed's C++ extension for inference."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if problem.device.type == "cpu" else "nccl", verbose=False)
