"""The language model as one process sees it, its initial weights on every layout, and parity with Hugging Face models."""

import functools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from moe_dist.config import build_config
from moe_dist.config.size import size_of
from moe_dist.model import Transformer
from moe_dist.model.names import global_tensors
from moe_dist.routing import Tokens
from tests.support.distributed import run_ranks
from tests.support.equality import BASE, VOCABULARY, Tree, build_engine, changed, train_step, whole
from tests.support.precision import float32_means_float64

B, S = 3, 16


def make_model(*changes: Tree, randomised: bool = True, vocab_size: int = VOCABULARY) -> Transformer:
    """float64; norm weights differ from 1 where randomised."""
    model = Transformer(build_config(changed(BASE, *changes)), vocab_size).double()
    if randomised:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_input(seed: int = 0, num_sequences: int = B) -> torch.Tensor:
    return torch.randint(VOCABULARY, (num_sequences, S), generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, input_BS: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    return model(input_BS, Tokens(num_sequences=len(input_BS)), **more)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# What a position may see.

CAPACITY = {"routing": {"capacity": {"factor": 0.8, "renormalise": True}}}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, CAPACITY, {"model": {"qk_norm": "width"}}])
def test_the_future_changes_nothing(changes: Tree, training: bool) -> None:
    """With capacity by position neither, though it drops."""
    model = make_model(changes).train(training)
    before = logits_of(model, make_input())
    for cut in (1, 7, S - 1):
        other = torch.cat([make_input()[:, :cut], make_input(1)[:, cut:]], dim=1)
        after = logits_of(model, other)
        assert_same(after[:, :cut], before[:, :cut])
        assert not torch.allclose(after[:, cut:], before[:, cut:])


def test_other_sequences_change_nothing() -> None:
    model = make_model(CAPACITY)
    together = logits_of(model, make_input())
    for number in range(B):
        assert_same(together[number : number + 1], logits_of(model, make_input()[number : number + 1]))


def test_other_documents_change_nothing() -> None:
    """Documents of one sequence are as if each stood alone: positions count by their distance only."""
    model = make_model().eval()
    lengths = [5, 1, 8, 2]
    document = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(B, S)
    together = logits_of(model, make_input(), document_BS=document)
    for part, alone in zip(together.split(lengths, dim=1), make_input().split(lengths, dim=1), strict=True):
        assert_same(part, logits_of(model, alone))
    crossing = logits_of(model, make_input())
    assert_same(together[:, :5], crossing[:, :5])
    assert not torch.allclose(together[:, 5:], crossing[:, 5:])


def test_one_document_is_no_mask() -> None:
    model = make_model().eval()
    document = torch.full((B, S), 3)
    assert_same(logits_of(model, make_input(), document_BS=document), logits_of(model, make_input()))


# Structure.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"num_layers": 4, "num_dense_layers": 0}, [0, 1, 2, 3]),
        ({"num_layers": 4, "num_dense_layers": 1}, [1, 2, 3]),
        ({"num_layers": 5, "num_dense_layers": 0, "moe_every": 2}, [0, 2, 4]),
        ({"num_layers": 6, "num_dense_layers": 1, "moe_every": 3}, [1, 4]),
        ({"num_layers": 3, "num_dense_layers": 2}, [2]),
    ],
)
def test_which_layers_have_experts(model: dict[str, Any], expected: list[int]) -> None:
    transformer = make_model({"model": model})
    assert list(transformer.moe_layers) == expected
    assert len(transformer.blocks()) == model["num_layers"]
    for number, block in enumerate(transformer.blocks()):
        assert (block.moe is None, block.ffn is None) == (number not in expected, number in expected)
        assert block.ffn is None or block.ffn.w_up.weight.shape[0] == BASE["model"]["ffn_size"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"tie_embeddings": False, "qk_norm": "width", "num_kv_heads": None, "head_size": 6}},
        {"model": {"moe_every": 2, "num_dense_layers": 0}, "moe": {"activation": "gelu", "num_shared_experts": 2}},
        {"moe": {"num_shared_experts": 0, "shared_gate": False}, "model": {"qk_norm": "none"}},
    ],
)
def test_it_has_as_many_parameters_as_the_config_says(changes: Tree) -> None:
    model = make_model(changes, vocab_size=257)
    size = size_of(model.config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".moe.experts." in name)
    assert experts == size.experts
    assert sum(p.numel() for p in model.parameters()) - experts == size.rest


def test_tied_embeddings_are_one_weight_with_both_gradients() -> None:
    tied, untied = make_model(), make_model({"model": {"tie_embeddings": False}})
    assert tied.output is None
    assert "output.weight" not in tied.state_dict()
    assert not torch.equal(untied.output.weight, untied.embedding.weight)
    untied.output.weight.data.copy_(tied.embedding.weight)
    for model in (tied, untied):
        logits_of(model, make_input()).square().mean().backward()
    assert_same(logits_of(tied, make_input()), logits_of(untied, make_input()))
    assert untied.output.weight.grad.any()
    assert_same(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.output.weight.grad)


# Activation checkpointing.


@pytest.mark.parametrize("layers", ["all", [1], [0, 2]])
@pytest.mark.parametrize("changes", [{}, CAPACITY])
def test_recomputed_layers_give_the_same_gradients_and_counts(layers: str | list[int], changes: Tree) -> None:
    plain, recomputed = make_model(changes), make_model(changes, {"model": {"activation_checkpointing": layers}})
    calls = dict.fromkeys(range(3), 0)

    def count(number: int, *args: object) -> None:
        calls[number] += 1

    for number, block in enumerate(recomputed.blocks()):
        block.attention.register_forward_hook(functools.partial(count, number))
    for model in (plain, recomputed):
        nn.functional.cross_entropy(logits_of(model, make_input()).flatten(0, 1), make_input(1).flatten()).backward()
    assert calls == {number: 2 if layers == "all" or number in layers else 1 for number in range(3)}
    for (name, parameter), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, parameter.grad, rtol=1e-12, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}"
        )
    for number, layer in plain.moe_layers.items():
        for name, buffer in layer.router.balance.named_buffers():
            assert torch.equal(getattr(recomputed.moe_layers[number].router.balance, name), buffer), name
        assert layer.router.balance.load_E.sum() == B * S * 2


def test_evaluation_recomputes_nothing() -> None:
    model = make_model({"model": {"activation_checkpointing": "all"}}).eval()
    with patch("moe_dist.model.transformer.checkpoint", side_effect=AssertionError):
        logits_of(model, make_input())


# Initial weights.


def initial_weights(tree: Tree) -> dict[str, np.ndarray]:
    engine, _ = build_engine(tree)
    return whole(dict(global_tensors(engine.model)))


LAYOUTS = {
    "2 ranks, data, sharded": (2, {"engine": {"sharding": "full"}}),
    "2 ranks, expert 2": (2, {"parallel": {"expert": 2}}),
    "4 ranks, expert 4, shuffled": (4, {"parallel": {"expert": 4, "expert_map": [3, 0, 2, 1, 0, 3, 1, 2]}}),
    "4 ranks, expert 2, unequal, sharded": (
        4,
        {"parallel": {"expert": 2, "expert_map": [1, 0, 1, 1, 1, 0, 1, 1]}, "engine": {"sharding": "full"}},
    ),
    "4 ranks, slices 2, sharded": (4, {"parallel": {"expert_tensor": 2}, "engine": {"sharding": "full"}}),
    "4 ranks, expert 2, slices 2": (4, {"parallel": {"expert": 2, "expert_tensor": 2}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_do_not_depend_on_the_layout(layout: str) -> None:
    num_ranks, changes = LAYOUTS[layout]
    tree = changed(BASE, {"model": {"tie_embeddings": False}})
    expected = whole(dict(global_tensors(Transformer(build_config(tree), VOCABULARY))))
    found: dict[str, np.ndarray] = {}
    for weights in run_ranks(num_ranks, initial_weights, changed(tree, changes)):
        for name, weight in weights.items():
            assert np.array_equal(weight, expected[name]), name
        found |= weights
    assert found.keys() == expected.keys()


def test_initial_weights_have_their_spread() -> None:
    changes = {"model": {"hidden_size": 64, "ffn_size": 64, "tie_embeddings": False, "init_std": 0.1}}
    model = make_model(changes, {"moe": {"ffn_size": 64}}, randomised=False, vocab_size=257)
    weights = dict(global_tensors(model))
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif "output_gate" not in name:  # too few values
            down = "w_out" in name or "w_down" in name
            std = 0.5 if "router" in name else 0.1 / math.sqrt(6) if down else 0.1
            assert weight.std().item() == pytest.approx(std, rel=0.1), name
    drawn = [weight.flatten()[0].item() for weight in weights.values() if weight.dim() == 2]
    assert len(set(drawn)) == len(drawn)  # no two weights are the same draw
    other = make_model(changes, {"moe": {"ffn_size": 64}, "training": {"seed": 1}}, vocab_size=257)
    assert not any(torch.equal(weight, weights[n]) for n, weight in global_tensors(other) if weight.dim() == 2)


# Hugging Face models.


def shared_weights(ours: Transformer, theirs: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Their name, our parameter and their parameter; stacks of experts are transposed."""
    for name, parameter in theirs.named_parameters():
        own = name.removeprefix("model.").removesuffix(".weight")
        for theirs_part, ours_part in (
            ("embed_tokens", "embedding"),
            ("lm_head", "output"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attention.w_query"),
            ("self_attn.k_proj", "attention.w_key"),
            ("self_attn.v_proj", "attention.w_value"),
            ("self_attn.o_proj", "attention.w_out"),
            ("self_attn.q_norm", "attention.query_norm"),
            ("self_attn.k_norm", "attention.key_norm"),
            ("mlp.gate_proj", "ffn.w_gate"),
            ("mlp.up_proj", "ffn.w_up"),
            ("mlp.down_proj", "ffn.w_down"),
            ("mlp.experts.gate_up_proj", "moe.experts.w_gate_up"),
            ("mlp.experts.down_proj", "moe.experts.w_down"),
            ("mlp.gate", "moe.router"),
        ):
            own = own.replace(theirs_part, ours_part)
        yield name, ours.get_parameter(own if ".experts." in own else f"{own}.weight"), parameter


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
OURS: Tree = {
    "model": {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "rope_theta": 500.0,
        "norm_epsilon": 1e-5,
        "tie_embeddings": False,
    },
    "moe": {"num_experts": 8, "ffn_size": 12},
}


def qwen3_moe() -> tuple[nn.Module, Tree]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    moe = {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 12}
    config = Qwen3MoeConfig(**SIZES, **moe, head_dim=6, intermediate_size=20, mlp_only_layers=[0])
    model = {"head_size": 6, "qk_norm": "head", "num_dense_layers": 1, "ffn_size": 20}
    tree = changed(OURS, {"model": model, "routing": {"top_k": 3, "renormalise": True}})
    return Qwen3MoeForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager"), tree


def mixtral() -> tuple[nn.Module, Tree]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, intermediate_size=12)
    tree = changed(OURS, {"routing": {"top_k": 2, "score": "softmax_top_k"}})
    return MixtralForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager"), tree


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("build", [qwen3_moe, mixtral])
def test_it_is_the_hugging_face_model(build: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Logits, and the gradient of every weight. In float64, their float32 islands are lifted to float64."""
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    with float32_means_float64() if dtype == torch.float64 else nullcontext():
        theirs, tree = build()
        theirs.to(dtype)
        ours = Transformer(build_config(tree), VOCABULARY).to(dtype)
        pairs = list(shared_weights(ours, theirs))
        for _, own, other in pairs:
            other.data = 0.3 * torch.randn(other.shape, generator=generator, dtype=torch.float64).to(dtype)
            own.data = other.data.transpose(1, 2).contiguous() if other.dim() == 3 else other.data.clone()
        assert len({id(own) for _, own, _ in pairs}) == len(list(ours.parameters()))
        expected = theirs(make_input()).logits
        actual = logits_of(ours, make_input())
        for logits in (expected, actual):
            nn.functional.cross_entropy(logits.flatten(0, 1), make_input(1).flatten()).backward()
    assert expected.dtype == actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    for name, own, other in pairs:
        grad = own.grad.transpose(1, 2) if other.dim() == 3 else own.grad
        error, size = (grad - other.grad).abs().max(), other.grad.abs().max()
        assert error <= tolerance * max(size, 1e-3), (
            f"gradient of {name}: off by {error:.1e}, its largest is {size:.1e}"
        )


# torch.compile.


def compiled_losses(tree: Tree) -> tuple[list[float], bool]:
    """Losses of two steps, and whether attention is compiled."""
    eager = functools.partial(torch.compile, backend="eager")
    with patch.object(torch, "compile", eager):
        engine, data = build_engine(tree)
        losses = [train_step(engine, data, step).loss for step in range(2)]
    return losses, all(b.attention._compiled_call_impl is not None for b in engine.model.blocks())


def test_compiled_it_trains_the_same() -> None:
    """The graphs are captured, and run by PyTorch: inductor's C++ takes half a minute to build, and is not ours."""
    ((expected, is_compiled),) = run_ranks(1, compiled_losses, BASE)
    assert not is_compiled
    ((losses, is_compiled),) = run_ranks(1, compiled_losses, changed(BASE, {"model": {"compile": True}}))
    assert is_compiled
    assert losses == pytest.approx(expected, abs=1e-12)
