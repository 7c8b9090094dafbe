"""The numbers of parameters that a config means are those of the model that is built from it."""

import pytest

from moe_dist.config import build_config
from moe_dist.config.size import ModelSize, size_of
from moe_dist.model.transformer import Transformer

MODEL = {"hidden_size": 8, "num_layers": 3, "num_heads": 2}
MOE = {"num_experts": 4, "ffn_size": 3}


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        ({}, {}),
        ({"num_dense_layers": 1, "ffn_size": 5}, {}),
        ({"moe_every": 2, "ffn_size": 5}, {}),
        ({"num_kv_heads": 1, "head_size": 6, "qk_norm": "head"}, {}),
        ({"num_kv_heads": 1, "head_size": 6, "qk_norm": "width"}, {}),
        ({"tie_embeddings": False}, {}),
        ({}, {"activation": "gelu", "num_shared_experts": 2}),
        ({}, {"num_shared_experts": 2, "shared_gate": True}),
    ],
)
def test_the_model_has_as_many(model, moe):
    config = build_config({"model": {**MODEL, **model}, "moe": {**MOE, **moe}})
    experts = rest = 0
    for name, parameter in Transformer(config, vocab_size=257).named_parameters():
        if ".experts." in name:
            experts += parameter.numel()
        else:
            rest += parameter.numel()
    assert size_of(config) == ModelSize(experts=experts, active_experts=experts * 2 // 4, rest=rest)


def test_the_embedding_may_be_larger_than_the_data_needs():
    sizes = [size_of(build_config({"model": {**MODEL, "vocab_size": size}})).rest for size in (257, 300)]
    assert sizes[1] - sizes[0] == 43 * 8
