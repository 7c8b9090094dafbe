"""The same outputs and gradients as the MoE blocks of Hugging Face transformers, on random weights.

Their routers compute scores in float32 whatever the model's format, ours in float64 where hidden is. So each block is
compared twice, both in float64: as it is, to what float32 scores allow, and with its router's casts lifted to float64,
to 1e-11.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from tests.support.precision import float32_means_float64

pytest.importorskip("transformers")

from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

B, S, H, F, E, K = 3, 7, 12, 10, 8, 3


@dataclass(frozen=True)
class Block:
    """A block of theirs and the configuration of ours that means the same."""

    theirs: Callable[[], nn.Module]
    routing: dict[str, Any]
    shared: int = 0


def mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    return MixtralSparseMoeBlock(config)


def qwen3(norm_topk_prob: bool) -> nn.Module:
    sizes = {"hidden_size": H, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, norm_topk_prob=norm_topk_prob))


def deepseek(norm_topk_prob: bool) -> nn.Module:
    sizes = {"hidden_size": H, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}
    groups = {"n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(
        **sizes, **groups, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=norm_topk_prob
    )
    return DeepseekV3MoE(config)


DEEPSEEK = {"score": "sigmoid", "scaling_factor": 2.5, "bias": {"rule": "sign"}}
BLOCKS = {
    "Mixtral": Block(mixtral, {"score": "softmax_top_k"}),
    "Mixtral as softmax renormalised": Block(mixtral, {"score": "softmax", "renormalise": True}),
    "Qwen3-MoE": Block(lambda: qwen3(True), {"score": "softmax", "renormalise": True}),
    "Qwen3-MoE not renormalised": Block(lambda: qwen3(False), {"score": "softmax"}),
    "DeepSeek-V3": Block(lambda: deepseek(True), {**DEEPSEEK, "renormalise": True}, shared=2),
    "DeepSeek-V3 not renormalised": Block(lambda: deepseek(False), DEEPSEEK, shared=2),
}


def make_theirs(block: Block) -> nn.Module:
    torch.manual_seed(0)
    theirs = block.theirs().double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    if block.shared:
        # Enough to change the choice of most tokens.
        theirs.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, E))
    # transformers sets this when it builds a whole model.
    theirs.experts.config._experts_implementation = "eager"
    return theirs


def make_ours(block: Block) -> MoELayer:
    moe = MoEConfig(num_experts=E, ffn_size=F, num_shared_experts=block.shared)
    return MoELayer(H, moe, RoutingConfig.model_validate({"top_k": K, **block.routing})).double()


def pair_up(
    ours: MoELayer, theirs: nn.Module, source: Callable[[nn.Parameter], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, ours, theirs, of every weight (or gradient, as `source` says), both in our orientation."""
    yield "router", source(ours.router.weight), source(theirs.gate.weight)
    for expert in range(E):
        mine = ours.experts.weights_of(expert, source)
        gate, up = source(theirs.experts.gate_up_proj)[expert].chunk(2)
        down = source(theirs.experts.down_proj)[expert]
        for key, right in (("w_gate", gate), ("w_up", up), ("w_down", down)):
            yield f"expert {expert} {key}", mine[key], right.T
    if ours.shared is not None:
        for key in ("gate", "up", "down"):
            mine = getattr(ours.shared, f"w_{key}").weight
            yield f"shared {key}", source(mine), source(getattr(theirs.shared_experts, f"{key}_proj").weight)


def run(block: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient; gradients of the weights stay in the block."""
    generator = torch.Generator().manual_seed(1)
    hidden, target = torch.randn(2, B, S, H, generator=generator, dtype=torch.float64).unbind()
    hidden = hidden.clone().requires_grad_()
    out = block(hidden)
    (out - target).square().sum().backward()
    return out.detach(), hidden.grad


@pytest.mark.parametrize(("lifted", "tolerance"), [(False, 3e-6), (True, 1e-11)])
@pytest.mark.parametrize("name", BLOCKS)
def test_parity(name: str, lifted: bool, tolerance: float) -> None:
    theirs, ours = make_theirs(BLOCKS[name]), make_ours(BLOCKS[name])
    with torch.no_grad():
        for _, mine, right in pair_up(ours, theirs, lambda p: p.data):
            mine.copy_(right)
    if BLOCKS[name].shared:
        ours.router.balance.bias_E.copy_(theirs.gate.e_score_correction_bias)
    with float32_means_float64() if lifted else nullcontext():
        right = run(theirs)
    compare = [("output", *pair) for pair in zip(run(ours), right, strict=True)]
    compare += pair_up(ours, theirs, lambda p: p.grad)
    assert len(compare) == 2 + 1 + 3 * E + 3 * bool(BLOCKS[name].shared)
    for number, mine, right in compare:
        scale = right.abs().max()
        assert scale > 0.1, f"{number}: nothing to compare"
        error = ((mine - right).abs().max() / scale).item()
        assert error < tolerance, f"{number}: {error}"


def test_the_correction_bias_matters_here() -> None:
    ours, hidden = make_ours(BLOCKS["DeepSeek-V3"]), torch.randn(B * S, H, dtype=torch.float64)
    nn.init.normal_(ours.router.weight, std=0.4)
    without = ours(hidden)
    ours.router.balance.bias_E.copy_(torch.linspace(-0.2, 0.2, E))
    changed = (ours(hidden) != without).any(1)
    assert changed.sum() > B * S / 3
