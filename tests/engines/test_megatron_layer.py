"""What the layer refuses of a script's own TransformerConfig, and how it reads Megatron's padding mask."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from moe_dist.config import build_config
from moe_dist.engines.cuda_on_cpu import cuda_on_cpu
from moe_dist.layer import MoELayer
from moe_dist.routing import Tokens
from tests.support.distributed import run_ranks
from tests.support.equality import BASE, changed

ON_PARTS = changed(
    BASE,
    {
        "engine": {"name": "megatron", "sharding": "full", "emulate_cuda": True, "sequence_parallel": True},
        "model": {"num_heads": 2, "num_kv_heads": 2, "num_layers": 1, "num_dense_layers": 0},
        "parallel": {"tensor": 2},
        "training": {"precision": "float32"},
        "routing": {
            "losses": {"load_balance": {"coefficient": 0}, "z": {"coefficient": 0}},
            "capacity": {"factor": 0.7},
        },
    },
)

PLAIN = {
    "recompute_granularity": None,
    "recompute_modules": None,
}


@pytest.mark.parametrize(
    ("changes", "is_mtp_layer", "message"),
    [
        ({"recompute_granularity": "full"}, False, "recompute_granularity: .* use .*CheckpointedLayer"),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, False, "recompute_granularity: .*"),
        ({}, True, "multi-token prediction; use another mlp there"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, Any], is_mtp_layer: bool, message: str) -> None:
    with cuda_on_cpu():
        from moe_dist.engines.megatron_layer import _check
    _check(SimpleNamespace(**PLAIN), False)
    with pytest.raises(ValueError, match=message):
        _check(SimpleNamespace(**(PLAIN | changes)), is_mtp_layer)


def outputs(whole_mask: bool | None) -> torch.Tensor:
    """Of sequences with padding, whole [S, B, H]: on each of 2 ranks, from a part of them; None: from one rank's MoELayer."""
    config = build_config(ON_PARTS, 2)
    hidden_SBH = torch.randn(8, 3, config.model.hidden_size, generator=torch.Generator().manual_seed(0))
    padding_BS = torch.arange(8) >= torch.tensor([8, 3, 6])[:, None]
    if whole_mask is None:
        layer = MoELayer(config.model.hidden_size, config.moe, config.routing)
        layer.initialise(0, "layers.0", 0.02, 0.02 / 2**0.5)
        tokens = Tokens(num_sequences=3, padding_T=padding_BS.flatten())
        return layer(hidden_SBH.transpose(0, 1), tokens).transpose(0, 1).detach()
    from moe_dist.engines.megatron_groups import megatron_context

    with megatron_context(config)():
        from moe_dist.engines.megatron_layer import LayerOptions, MegatronMoELayer
        from moe_dist.engines.megatron_model import transformer_config

        options = LayerOptions(config.moe, config.routing)
        megatron = transformer_config(config, False)
        megatron.init_method_std = 0.02
        part_layer = MegatronMoELayer(megatron, layer_number=1, options=options)
        rank = dist.get_rank()
        mask = padding_BS if whole_mask else padding_BS.chunk(2, dim=1)[rank]
        out, _ = part_layer(hidden_SBH.chunk(2)[rank], padding_mask=mask)
        parts = [torch.empty_like(out) for _ in range(2)]
        dist.all_gather(parts, out.detach())
    return torch.cat(parts)


@pytest.mark.parametrize("whole_mask", [True, False])
def test_a_padding_mask_may_be_of_parts_of_sequences(whole_mask: bool) -> None:
    expected = outputs(None)
    for of_rank in run_ranks(2, outputs, whole_mask):
        torch.testing.assert_close(of_rank, expected)
