"""Hash routing: look-up, permutation by layer, MultiHash, constant and learned weights, mistakes.

Shape letters: T tokens, H hidden, E experts, K experts per token, V vocabulary.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_dist.config.errors import ConfigError
from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.tables import balanced_table, random_table

V, T, H, E, K = 50, 30, 4, 8, 2


def make_router(name: str = "layers.0", seed: int = 0, **settings: Any) -> nn.Module:
    """What concerns hash: itself is given by `hash`."""
    config = RoutingConfig.model_validate({"method": "hash", "top_k": K, "init_std": 1.0, **settings})
    router = build_router(H, E, config, vocab_size=V).double()
    router.initialise(seed, name)
    return router


def make_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))


def make_hidden(seed: int = 1) -> torch.Tensor:
    return torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def experts_of(router: nn.Module) -> torch.Tensor:
    """[V, K] by routing every id."""
    routing = router(torch.zeros(V, H, dtype=torch.float64), Tokens(id_T=torch.arange(V)))
    return routing.expert_P.view(V, K)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("weights", ["constant", "learned"])
def test_experts_are_those_of_the_id_and_of_nothing_else(weights: str, mode: str) -> None:
    router = make_router(hash={"weights": weights})
    getattr(router, mode)()
    table = router.balance.table_VK
    for seed in range(2):
        routing = router(make_hidden(seed), Tokens(id_T=make_ids(), step=seed, num_sequences=seed + 1))
        assert torch.equal(routing.expert_P.view(T, K), table[make_ids()])
        assert routing.load_E.tolist() == table[make_ids()].flatten().bincount(minlength=E).tolist()
    assert (table.sort(1).values.diff(dim=1) > 0).all()  # K different experts


@pytest.mark.parametrize("multi", [False, True])
def test_every_layer_renames_the_experts_of_the_one_table(multi: bool) -> None:
    """By another permutation in each; of MultiHash inside its blocks."""
    blocks = K if multi else 1
    table = random_table(V, E, K, seed=4)
    if multi:
        table = np.stack([table[:, 0] % (E // K), table[:, 1] % (E // K) + E // K], axis=1)
    names = []
    for layer in range(4):
        router = make_router(f"layers.{layer}", hash={"multi": multi})
        router.set_table(table)
        own, new_name = experts_of(router).tolist(), {}
        for before, after in zip(table.tolist(), own, strict=True):
            for a, b in zip(before, after, strict=True):
                assert new_name.setdefault(a, b) == b
        assert sorted(new_name) == sorted(new_name.values()) == list(range(E))
        assert all(a * blocks // E == b * blocks // E for a, b in new_name.items())
        names.append(tuple(new_name[e] for e in range(E)))
    assert len(set(names)) == 4


def test_the_table_at_the_start_is_random_by_the_seed() -> None:
    one, same, other = make_router(seed=1), make_router(seed=1), make_router(seed=2)
    assert torch.equal(experts_of(one), experts_of(same))
    assert not torch.equal(experts_of(one), experts_of(other))
    assert experts_of(one).flatten().bincount(minlength=E).min() > 0


def test_a_balanced_table_balances_what_it_was_made_from() -> None:
    counts = np.random.default_rng(0).integers(1, 30, V)
    router = make_router()
    router.set_table(balanced_table(counts, E, K))
    ids = torch.arange(V).repeat_interleave(torch.from_numpy(counts))
    load = router(torch.zeros(len(ids), H, dtype=torch.float64), Tokens(id_T=ids)).load_E
    assert load.max() - load.min() <= 30


def test_multi_hash_chooses_one_expert_of_each_block() -> None:
    table = np.stack([np.arange(V) % 4, np.arange(V) // 4 % 4 + 4], axis=1)
    router = make_router(hash={"multi": True})
    router.set_table(table)
    assert (experts_of(router) // (E // K)).tolist() == [[0, 1]] * V


# Weights.


@pytest.mark.parametrize(("multi", "weight"), [(False, 1 / K), (True, 1.0)])
def test_constant_weights_have_no_parameters(multi: bool, weight: float) -> None:
    router = make_router(hash={"multi": multi}, scaling_factor=1.5)
    hidden = make_hidden().requires_grad_()
    routing = router(hidden, Tokens(id_T=make_ids()))
    assert routing.weight_P.dtype == torch.float64
    assert routing.weight_P.tolist() == [1.5 * weight] * (T * K)
    assert not routing.weight_P.requires_grad
    assert list(router.parameters()) == []
    assert [name for name in router.state_dict() if "table" in name] == ["balance.table_VK"]
    assert router(hidden.float(), Tokens(id_T=make_ids())).weight_P.dtype == torch.float32


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_learned_weights_are_the_scores_at_the_experts_of_the_table(score: str, renormalise: bool) -> None:
    """DeepSeek-V4: sqrt_softplus, renormalised."""
    router = make_router(hash={"weights": "learned"}, score=score, renormalise=renormalise, scaling_factor=1.5)
    routing = router(make_hidden(), Tokens(id_T=make_ids()))
    for token, weights in enumerate(routing.weight_P.view(T, K).tolist()):
        logits = (router.weight @ make_hidden()[token]).tolist()
        value = {
            "softmax": lambda z, logits=logits: math.exp(z) / sum(map(math.exp, logits)),
            "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
            "sqrt_softplus": lambda z: math.sqrt(math.log1p(math.exp(z))),
        }[score]
        raw = [value(logits[e]) for e in router.balance.table_VK[make_ids()[token]].tolist()]
        assert weights == pytest.approx([1.5 * r / (sum(raw) if renormalise else 1) for r in raw], rel=1e-11)


def test_learned_weights_train_the_router() -> None:
    router = make_router(hash={"weights": "learned"})
    router(make_hidden(), Tokens(id_T=make_ids())).weight_P.square().sum().backward()
    assert router.weight.grad.abs().min() > 0


# Mistakes, and what is kept.


def test_tokens_without_ids_are_refused() -> None:
    router = make_router("layers.7")
    with pytest.raises(
        ValueError, match=r"^layers\.7: routing\.method: hash looks tokens up by their ids; give Tokens"
    ):
        router(make_hidden(), Tokens())


def test_a_vocabulary_is_needed() -> None:
    config = RoutingConfig.model_validate({"method": "hash", "top_k": K})
    with pytest.raises(ConfigError, match=r"^routing\.method: hash needs the size of the vocabulary; give vocab_size$"):
        build_router(H, E, config)


def test_the_table_is_in_the_checkpoint_and_survives_casts() -> None:
    router, other = make_router(seed=1), make_router(seed=2)
    other.load_state_dict(router.state_dict())
    assert torch.equal(experts_of(other), experts_of(router))
    router.half().double()
    assert router.balance.table_VK.dtype == torch.int64
    assert torch.equal(experts_of(other), experts_of(router))


def test_padding_is_not_routed() -> None:
    padding = torch.arange(T) % 3 == 0
    routing = make_router()(make_hidden(), Tokens(id_T=make_ids(), padding_T=padding))
    assert not padding[routing.token_P].any()
    assert len(routing.token_P) == (~padding).sum() * K
