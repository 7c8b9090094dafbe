"""Scratch memory is shared by all layers of a thread: nothing of a layer is lost to another, or to itself.

Every comparison is with layers whose experts are the plain loop, by autograd, in float64 to 1e-12.

Shape letters: T tokens, H hidden, E experts, K choices of a token, F FFN width.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch.rows import weighted_sum
from moe_dist.experts import journey
from moe_dist.parallel.memory import release_workspaces, workspace
from tests.support.distributed import run_ranks

H, E, K, F = 6, 4, 2, 5


def make_layers(count: int, group: dist.ProcessGroup | None, **moe: Any) -> nn.ModuleList:
    config = MoEConfig(num_experts=E, ffn_size=F, num_shared_experts=1, **moe)
    routing = RoutingConfig.model_validate({"top_k": K, "score": "sigmoid", "init_std": 0.7})
    layers = nn.ModuleList(MoELayer(H, config, routing, group, num_chunks=2) for _ in range(count))
    for number, layer in enumerate(layers):
        layer.initialise(seed=1, name=f"layers.{number}", std=0.5)
    return layers.double()


def make_tokens(count: int, seed: int = 0) -> torch.Tensor:
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(100 * rank + seed)
    return torch.randn(count + rank, H, dtype=torch.float64, generator=generator).requires_grad_()


def four_stacked(layers: nn.ModuleList) -> list[torch.Tensor]:
    first = x = make_tokens(9)
    for layer in layers:
        x = x + layer(x)
    x.square().sum().backward()
    return [x, first.grad]


def two_forwards(layers: nn.ModuleList, order: int) -> list[torch.Tensor]:
    inputs = [make_tokens(9), make_tokens(14, seed=1)]
    outputs = [layers[0](x) for x in inputs]
    for out in outputs[::order]:
        out.square().sum().backward()
    return [*outputs, *(x.grad for x in inputs)]


def checkpointed(layers: nn.ModuleList, reentrant: bool) -> list[torch.Tensor]:
    first = x = make_tokens(9)
    for layer in layers:
        x = x + checkpoint(layer, x, use_reentrant=reentrant)
    x.square().sum().backward()
    return [x, first.grad]


def an_evaluation_in_between(layers: nn.ModuleList, mode: Callable[[], Any]) -> list[torch.Tensor]:
    """Of more rows than the workspaces have room for, and of fewer."""
    x = make_tokens(9)
    out = layers[0](x)
    with mode():
        seen = [layers[0](make_tokens(count, seed=2)).clone() for count in (40, 3)]
    out.square().sum().backward()
    return [out, *seen, x.grad]


def used_twice(layers: nn.ModuleList) -> list[torch.Tensor]:
    x = make_tokens(9)
    out = layers[0](layers[0](x))
    out.square().sum().backward()
    return [out, x.grad]


def two_backwards(layers: nn.ModuleList) -> list[torch.Tensor]:
    x = make_tokens(9)
    out = layers[0](x)
    out.square().sum().backward(retain_graph=True)
    out.square().sum().backward()
    return [out, x.grad]


def strided(layers: nn.ModuleList) -> list[torch.Tensor]:
    """Tokens and gradients that are not contiguous, or expanded."""
    x = make_tokens(9)
    out = layers[0](x.mT.contiguous().mT)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape[::-1]).mT
    out.backward(weight, retain_graph=True)
    out.sum().backward()
    return [out, x.grad]


SCENARIOS: dict[str, tuple[Callable[..., list[torch.Tensor]], tuple[Any, ...]]] = {
    "four stacked layers": (four_stacked, ()),
    "two forwards, first backward first": (two_forwards, (1,)),
    "two forwards, last backward first": (two_forwards, (-1,)),
    "recomputed": (checkpointed, (False,)),
    "recomputed by a backward inside": (checkpointed, (True,)),
    "an evaluation in between": (an_evaluation_in_between, (torch.no_grad,)),
    "an inference in between": (an_evaluation_in_between, (torch.inference_mode,)),
    "one layer used twice": (used_twice, ()),
    "two backwards": (two_backwards, ()),
    "strided": (strided, ()),
}


def run(name: str, **moe: Any) -> list[torch.Tensor]:
    """What the scenario gives, and the gradients of all parameters."""
    release_workspaces()
    layers = make_layers(4, dist.group.WORLD if dist.is_initialized() else None, **moe)
    scenario, arguments = SCENARIOS[name]
    results = [x.detach() for x in scenario(layers, *arguments)]
    return results + [p.grad for p in layers.parameters() if p.grad is not None]


def equals_the_loop(name: str) -> None:
    for activation in ("swiglu", "gelu"):
        expected = run(name, activation=activation, backend="loop")
        for recompute in ("activation", "experts"):
            actual = run(name, activation=activation, recompute=recompute)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", SCENARIOS)
def test_gradients_equal_the_loops(name: str, num_ranks: int) -> None:
    if num_ranks == 1:
        equals_the_loop(name)
    else:
        run_ranks(num_ranks, equals_the_loop, name)


def test_memory_made_in_inference_mode_serves_training() -> None:
    release_workspaces()
    (layer,) = make_layers(1, None)
    with torch.inference_mode():
        expected = layer(make_tokens(30)).clone()
    out = layer(make_tokens(30))
    out.sum().backward()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("recompute", ["activation", "experts"])
def test_one_rank_keeps_tokens_weights_and_the_first_product(recompute: str) -> None:
    """Neither gathered inputs nor outputs of the experts."""
    (layer,) = make_layers(1, None, recompute=recompute)
    layer.shared = None
    tokens, routings, kept = make_tokens(50), [], []
    layer.router.register_forward_hook(lambda *call: routings.append(call[2]))
    travel = journey._Travel.apply

    def noted(*args: Any) -> torch.Tensor:
        with saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            return travel(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journey._Travel, "apply", noted)
        layer(tokens)
    products = [x for x in kept if x.shape[1:] == (2 * F,)]
    others = {(x.data_ptr(), *x.shape) for x in kept if x.shape[1:] != (2 * F,)}
    weights = [tokens, routings[0].weight_P, layer.experts.w_gate_up, layer.experts.w_down]
    assert others == {(x.data_ptr(), *x.shape) for x in weights}
    assert sum(len(x) for x in products) == (0 if recompute == "experts" else 50 * K)


@pytest.mark.parametrize("frozen", ["experts", "tokens", "all but the router"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    def gradients(backend: str) -> list[torch.Tensor | None]:
        (layer,) = make_layers(1, None, backend=backend)
        tokens = make_tokens(9).detach().requires_grad_(frozen == "experts")
        if frozen != "tokens":
            layer.experts.requires_grad_(False)
        layer(tokens).square().sum().backward()
        return [tokens.grad, *(p.grad for p in layer.parameters())]

    actual, expected = gradients("auto"), gradients("loop")
    assert [x is None for x in actual] == [x is None for x in expected]
    pairs = [(x, y) for x, y in zip(actual, expected, strict=True) if x is not None]
    torch.testing.assert_close(*map(list, zip(*pairs, strict=True)), rtol=1e-12, atol=1e-12)


def test_frozen_experts_cost_no_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("moe_dist.experts.cpu._weight_gradients", fail)
    (layer,) = make_layers(1, None)
    layer.experts.requires_grad_(False)
    layer(make_tokens(9)).sum().backward()


def test_backward_under_autocast_computes_in_the_format_of_forward() -> None:
    """A careless `with autocast` around backward changes no bit."""
    (layer,) = make_layers(1, None)
    layer.float()

    def gradients(autocast: bool) -> list[torch.Tensor]:
        x = make_tokens(9).detach().float().requires_grad_()
        loss = layer(x).square().sum()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        return [p.grad.clone() for p in layer.experts.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


@pytest.mark.parametrize("backend", ["cpu", "grouped_mm"])
def test_under_autocast_the_journey_is_close_to_the_loop(backend: str) -> None:
    """Both round to bfloat16 at the same places but one: the weighted rows."""
    config = {"num_experts": E, "ffn_size": 16}
    results = []
    for name in (backend, "loop"):
        layer = MoELayer(16, MoEConfig(**config, backend=name), RoutingConfig(top_k=K, init_std=0.7))
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        results.append([out.detach().float(), x.grad, *(p.grad for p in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 0.03 * expected.abs().max()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    (layer,) = make_layers(1, None)
    layer.shared, x = None, make_tokens(5)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.experts.w_down, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_threads_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have their rows in a workspace before either adds them up, forward and backward."""

    def step(number: int) -> None:
        (layer,) = make_layers(1, None)
        x = make_tokens(9, seed=number)
        out = layer(x)
        out.square().sum().backward()
        results.setdefault(number, []).append([out.detach(), x.grad])

    results: dict[int, list[list[torch.Tensor]]] = {}
    for number in (1, 2):
        step(number)
    meeting = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(journey, "weighted_sum", lambda *call: (meeting.wait(), weighted_sum(*call))[1])
    threads = [threading.Thread(target=step, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone, together in results.values():
        torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_a_workspace_is_one_memory_until_it_is_released() -> None:
    release_workspaces()
    like = torch.zeros(0)
    first = workspace("one", 6, 2, like)
    first.fill_(3)
    assert workspace("one", 4, 3, like).data_ptr() == first.data_ptr()
    assert workspace("two", 4, 3, like).data_ptr() != first.data_ptr()
    assert workspace("one", 4, 3, like.double()).dtype == torch.float64
    assert workspace("one", 5, 3, like).shape == (5, 3)
    assert first.unique().tolist() == [3.0]  # who holds it still has it
    release_workspaces()
