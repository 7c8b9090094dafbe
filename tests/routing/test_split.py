"""A layer whose ranks hold parts of each sequence gives what one rank gives: outputs, gradients, loads, drops and losses.

Shape letters: B sequences, S their length, H hidden, E experts.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.layer import MoELayer
from moe_dist.routing import Tokens
from moe_dist.routing.split import TokenSplit
from tests.support.distributed import run_ranks

B, S, H, E = 4, 8, 6, 4
VOCABULARY = 9
CHUNKS = {"halves": ((0,), (1,)), "zigzag": ((0, 3), (1, 2))}

LOSSES = {
    "losses": {
        "load_balance": {"coefficient": 0.3, "scope": "sequence"},
        "z": {"coefficient": 0.1},
        "importance": {"coefficient": 0.2},
        "orthogonality": {"coefficient": 0.5},
    }
}
ROUTINGS: dict[str, Any] = {
    "top-k": LOSSES | {"score": "sigmoid", "bias": {"rule": "sign"}, "input_jitter": 0.2},
    "random drops": LOSSES | {"capacity": {"factor": 0.8, "policy": "random", "renormalise": True}},
    "padded capacity of two sequences": {
        "capacity": {"factor": 0.8, "policy": "weight", "pad": True},
        "group": {"sequences": 2},
    },
    "noisy": LOSSES | {"method": "noisy_top_k", "losses": {**LOSSES["losses"], "load": {"coefficient": 0.4}}},
    "expert choice": {"method": "expert_choice"},
    "expert choice over all": {"method": "expert_choice", "group": "global"},
    "Sinkhorn": {"method": "sinkhorn"},
    "optimal transport": {"method": "optimal_transport", "group": {"sequences": 2}},
    "BASE": {"method": "base", "top_k": 1},
    "GatePro": LOSSES | {"method": "gatepro"},
    "GatePro-OT": {"method": "gatepro_ot"},
    "threshold": {"method": "expert_threshold"},
    "hash": {"method": "hash", "hash": {"weights": "learned"}},
    "zero experts": {"zero_experts": {"count": 2, "target": 1.0}, "bias": {"rule": "proportional"}},
}


def run(routing: dict[str, Any], padded: bool, chunks: tuple[tuple[int, ...], ...] | None) -> dict[str, torch.Tensor]:
    """On each rank: what the layer gives, whole; gradients are summed over the ranks as an engine does."""
    config = RoutingConfig.model_validate({"top_k": 2, "init_std": 1.0, **routing})
    moe = MoEConfig(num_experts=E, ffn_size=5, num_shared_experts=1, shared_gate=True)
    layer = MoELayer(H, moe, config, vocab_size=VOCABULARY).double()
    layer.initialise(0, "layers.1", 0.5)
    generator = torch.Generator().manual_seed(1)
    hidden_BSH = torch.randn(B, S, H, dtype=torch.float64, generator=generator)
    padding_BS = torch.arange(S) >= torch.tensor([S, S - 3, S, 1])[:, None]
    tokens = Tokens(
        id_T=torch.randint(VOCABULARY, (B * S,), generator=generator),
        sequence_T=torch.arange(B).repeat_interleave(S),
        position_T=torch.arange(S).repeat(B),
        global_index_T=100 + torch.arange(B * S),
        padding_T=padding_BS.flatten() if padded else None,
        num_sequences=B,
        step=3,
        share=0.5,
    )
    position_S = torch.arange(S)
    if chunks is not None:
        layer.router.split = TokenSplit(dist.group.WORLD, chunks)
        position_S = torch.cat([position_S.chunk(4 if len(chunks[0]) == 2 else 2)[i] for i in chunks[dist.get_rank()]])
    own_BsH = hidden_BSH[:, position_S].requires_grad_()
    out_BsH = layer(own_BsH, tokens)
    (out_BsH * out_BsH.cos()).sum().backward()
    assert own_BsH.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    whole = {"out": torch.zeros_like(hidden_BSH), "hidden gradient": torch.zeros_like(hidden_BSH)}
    whole["out"][:, position_S] = out_BsH.detach()
    whole["hidden gradient"][:, position_S] = own_BsH.grad
    for value in (whole | gradients).values():
        if chunks is not None:
            dist.all_reduce(value)
    counters = {name: value.clone() for name, value in layer.router.balance.counters().items() if name != "slots"}
    with torch.no_grad():
        layer.eval()
        layer.router.as_trained = True
        whole["evaluation"] = torch.zeros_like(hidden_BSH)
        whole["evaluation"][:, position_S] = layer(own_BsH, tokens)
        if chunks is not None:
            dist.all_reduce(whole["evaluation"])
    return whole | gradients | counters


@pytest.mark.parametrize("name", ROUTINGS)
def test_parts_of_sequences_give_what_whole_ones_give(name: str) -> None:
    for padded, chunks in ((False, "halves"), (True, "zigzag")):
        expected = run(ROUTINGS[name], padded, None)
        for of_rank in run_ranks(2, run, ROUTINGS[name], padded, CHUNKS[chunks]):
            assert of_rank.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(of_rank[key], value, rtol=1e-9, atol=1e-10, msg=lambda m: f"{key}: {m}")  # noqa: B023
