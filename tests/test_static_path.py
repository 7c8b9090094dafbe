"""The static path: where `pairs_per_expert` is set, dispatch, experts and combine wait for nothing and trace whole.

The meta device stands for a GPU here: it takes the same path through the code, and as its tensors have no values, whatever
the host would wait for raises an error.

Shape letters: T tokens, H hidden, E experts, P pairs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch import AllToAllDispatcher
from moe_dist.experts import Experts
from moe_dist.experts.backends import BACKENDS, choose_backend
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing, Tokens, build_router, real_pairs
from tests.support.distributed import run_ranks
from tests.support.host import HostReads

B, S, H, E, K, F = 4, 6, 16, 4, 2, 8
T = B * S
PADDED = {"factor": 1.0, "pad": True}
LOSSES = {"load_balance": {"coefficient": 0.1}, "z": {"coefficient": 0.1}}
STATIC: dict[str, dict[str, Any]] = {
    **{policy: {"capacity": {**PADDED, "policy": policy}} for policy in ("position", "weight", "random")},
    "batch_priority": {"capacity": {**PADDED, "policy": "batch_priority"}, "weight_on": "input"},
    "renormalised": {"capacity": {**PADDED, "renormalise": True}, "renormalise": True, "losses": LOSSES},
    "loss-free": {"capacity": PADDED, "score": "sigmoid", "bias": {"rule": "sign"}},
    "zero experts": {"capacity": PADDED, "zero_experts": {"count": 2, "target": 1.5}, "bias": {"rule": "sign"}},
    "expert_threshold": {"method": "expert_threshold", "capacity": PADDED},
    "expert_choice": {"method": "expert_choice"},
}
"""Routings that the router, too, decides without waiting."""
COMPILED = ("renormalised", "random", "expert_choice")


def make_layer(routing: dict[str, Any], backend: str = "auto", group: Any = None) -> MoELayer:
    config = RoutingConfig.model_validate({"top_k": K, "init_std": 1.0, **routing})
    moe = MoEConfig.model_validate({"num_experts": E, "ffn_size": F, "backend": backend, "num_shared_experts": 1})
    layer = MoELayer(H, moe, config, group)
    layer.router.tolerates_nonfinite = True  # as the engine does; a router on a CPU would look
    return layer


def make_tokens(padded: bool) -> Tokens:
    padding_T = torch.arange(T) % S >= torch.arange(1, B + 1).repeat_interleave(S) + 2
    return Tokens(num_sequences=B, padding_T=padding_T if padded else None)


def make_hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, S, H, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# Vacant pairs.


def random_routing(seed: int, weight_on: Any = "output") -> Routing:
    """Tokens with 0 to E pairs, the first with all, slots to spare, and three vacant pairs."""
    generator = torch.Generator().manual_seed(seed)
    taken_TE = torch.rand(T, E, generator=generator) < 0.5
    taken_TE[0], taken_TE[1] = True, False
    token_P, expert_P = taken_TE.nonzero().unbind(1)
    weight_P = torch.rand(len(token_P), generator=generator, dtype=torch.float64)
    return Routing(
        torch.cat([token_P, torch.full((3,), T)]),
        torch.cat([expert_P, torch.full((3,), E)]),
        torch.cat([weight_P, torch.zeros(3)]).requires_grad_(),
        load_E=taken_TE.sum(0),
        weight_on=weight_on,
        pairs_per_expert=T,
    )


def travel(layer: MoELayer, hidden_TH: torch.Tensor, routing: Routing) -> list[torch.Tensor]:
    """The output, and the gradients of the tokens, the weights of pairs and those of the experts."""
    hidden_TH = hidden_TH.detach().clone().requires_grad_()
    weight_P = routing.weight_P.detach().clone().requires_grad_()
    routing = replace(routing, weight_P=weight_P)
    with patch.object(layer.router, "forward", lambda *_: routing):
        out_TH = layer(hidden_TH)
    target_TH = torch.linspace(-1, 1, out_TH.numel(), dtype=torch.float64).view_as(out_TH)
    parameters = [hidden_TH, weight_P, *layer.experts.parameters()]
    return [out_TH.detach(), *torch.autograd.grad(out_TH, parameters, target_TH)]


def with_and_without_vacant_pairs(weight_on: str, backend: str) -> list[list[torch.Tensor]]:
    group, rank = (dist.group.WORLD, dist.get_rank()) if dist.is_initialized() else (None, 0)
    layer, routing = make_layer({}, backend, group).double(), random_routing(rank, weight_on)
    hidden_TH = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return [travel(layer, hidden_TH, r) for r in (routing, real_pairs(routing))]


@pytest.mark.parametrize("backend", ["loop", "cpu", "grouped_mm"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_vacant_pairs_change_no_bit(weight_on: str, backend: str) -> None:
    alone = with_and_without_vacant_pairs(weight_on, backend)
    for vacant, real in [alone, *run_ranks(2, with_and_without_vacant_pairs, weight_on, backend)]:
        assert not vacant[2][-3:].any()
        vacant[2] = vacant[2][:-3]
        assert all(torch.equal(a, b) for a, b in zip(vacant, real, strict=True))


@pytest.mark.parametrize("backend", ["loop", "cpu", "grouped_mm"])
def test_nothing_leaks_through_vacant_pairs(backend: str) -> None:
    """Token 0 stands at the slot that they share."""
    hidden_TH = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden_TH[0] = torch.nan
    out_TH, d_hidden_TH, d_weight_P, *_ = travel(make_layer({}, backend).double(), hidden_TH, random_routing(0))
    assert out_TH[0].isnan().all()
    assert out_TH[1:].isfinite().all()
    assert d_hidden_TH[1:].isfinite().all()
    assert d_weight_P[E:].isfinite().all()


@pytest.mark.parametrize("backend", ["loop", "cpu"])
def test_an_output_may_be_changed_in_place(backend: str) -> None:
    layer, hidden = make_layer({"capacity": PADDED}, backend), make_hidden()
    layer.shared = None
    layer(hidden).mul_(2).sum().backward()
    twice, hidden.grad = hidden.grad, None
    layer(hidden).sum().backward()
    torch.testing.assert_close(twice, 2 * hidden.grad)


def test_more_pairs_than_slots_are_refused() -> None:
    routing = replace(random_routing(0), pairs_per_expert=2)
    with pytest.raises(RuntimeError, match="more pairs for an expert than slots"):
        AllToAllDispatcher(ExpertMap.contiguous(E, 1), None).plan(routing, T)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("name", STATIC)
def test_the_number_of_pairs_follows_from_shapes(name: str, padded: bool) -> None:
    """And the pairs that are real are those of the same routing without padded slots."""
    found = []
    for seed in range(3):
        routing = make_layer(STATIC[name]).router(make_hidden(seed).view(T, H), make_tokens(padded))
        found.append(len(routing.token_P))
        slots = routing.pairs_per_expert * E
        assert found[-1] <= min(slots, T * (E if "expert_" in name else K))
        vacant_P = routing.expert_P == E
        assert torch.equal(vacant_P, routing.token_P == T)
        assert not routing.weight_P[vacant_P].any()
        assert torch.equal(vacant_P, vacant_P.sort().values)
        packed = {**STATIC[name]}
        if "capacity" in packed:
            packed["capacity"] = {**packed["capacity"], "pad": False}
            other = make_layer(packed).router(make_hidden(seed).view(T, H), make_tokens(padded))
            assert other.pairs_per_expert is None
            for a, b in zip(fields(real_pairs(routing)), fields(other), strict=True):
                assert torch.equal(a, b)
    assert len(set(found)) == 1


def fields(routing: Routing) -> list[torch.Tensor]:
    return [routing.token_P, routing.expert_P, routing.weight_P, routing.load_E, routing.dropped_E]


# Waits and collectives.


class Watch(TorchDispatchMode):
    """Notes collectives, and copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.collectives += [func._opname] * (func.namespace == "c10d")
        if func._opname in ("_to_copy", "copy_") and result.is_meta:
            self.copies += [func._opname for x in args if isinstance(x, torch.Tensor) and not x.is_meta]
        return result


def on_meta() -> AbstractContextManager[Any]:
    """Autocast does not know the meta device."""
    stack = ExitStack()
    stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
    stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))
    return stack


def step(layer: MoELayer, hidden: torch.Tensor, tokens: Tokens) -> None:
    layer(hidden, tokens).sum().backward()


@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
@pytest.mark.parametrize(("backend", "dtype"), [("auto", torch.bfloat16), ("auto", torch.float32), ("loop", None)])
@pytest.mark.parametrize("name", STATIC)
def test_nothing_waits(name: str, backend: str, dtype: torch.dtype | None, padded: bool) -> None:
    layer = make_layer(STATIC[name], backend).to("meta", dtype)
    tokens = make_tokens(padded)
    if padded:
        tokens = replace(tokens, padding_T=tokens.padding_T.to("meta"))
    hidden = torch.empty(B, S, H, dtype=dtype, device="meta", requires_grad=True)
    with on_meta():
        step(layer, hidden, tokens)
        with Watch() as watch:  # what is made once has been made
            step(layer, hidden, tokens)
    assert watch.copies == []


def test_the_meta_device_shows_what_waits_and_what_is_copied() -> None:
    layer, hidden = make_layer({}).to("meta"), torch.empty(B, S, H, device="meta")
    with on_meta(), pytest.raises(NotImplementedError, match="meta tensor"):
        layer(hidden)
    with Watch() as watch:
        torch.arange(3).to("meta", non_blocking=True)
    assert watch.copies == ["_to_copy"]


@pytest.mark.parametrize("method", ["optimal_transport", "gatepro_ot"])
def test_behind_a_solver_nothing_waits(method: str) -> None:
    """The router of an exact method waits for its solver; its routing is as static as others."""
    layer = make_layer({"method": method}, "grouped_mm").to(torch.bfloat16)
    routing = layer.router(make_hidden().view(T, H), make_tokens(True))
    moved = {name: x.detach().to("meta") for name, x in vars(routing).items() if isinstance(x, torch.Tensor)}
    hidden = torch.empty(B, S, H, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer.to("meta")
    with on_meta(), patch.object(layer.router, "forward", lambda *_: replace(routing, **moved)):
        step(layer, hidden, make_tokens(False))


def watch_step(routing: dict[str, Any], backend: str) -> tuple[list[str], list[str], list[str]]:
    """Collectives forward and backward, and what the host reads."""
    layer, hidden = make_layer(routing, backend, dist.group.WORLD), make_hidden(dist.get_rank())
    with HostReads() as host:
        with Watch() as forward:
            out = layer(hidden, make_tokens(False)).sum()
        with Watch() as backward:
            out.backward()
    return forward.collectives, backward.collectives, host.seen


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"], ids=["fused", "one after the other"])
@pytest.mark.parametrize("name", STATIC)
def test_two_payload_exchanges_each_way_and_nothing_else(name: str, backend: str) -> None:
    two = ["alltoall_base_"] * 2
    assert run_ranks(2, watch_step, STATIC[name], backend) == [(two, two, [])] * 2


def test_dropless_also_tells_the_counts_and_reads_them() -> None:
    for forward, backward, host in run_ranks(2, watch_step, {}, "cpu"):
        assert (len(forward), len(backward)) == (3, 2)
        assert "tolist" in host


# Batched products.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_a_gpu_static_routings_take_batched_products(dtype: torch.dtype) -> None:
    """Of any dtype and width."""
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, dtype, (12, 10), equal=True) is BACKENDS["grouped_mm"]
    assert choose_backend("auto", cuda, dtype, (12, 10), equal=False) is BACKENDS["loop"]


@pytest.mark.parametrize("weight_on", ["output", "input"], ids=["fused", "one after the other"])
def test_batched_products_are_those_of_a_loop(weight_on: str) -> None:
    """In float64, which grouped_mm does not have."""
    hidden_TH = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = random_routing(0, weight_on)
    results = [travel(make_layer({}, name).double(), hidden_TH, routing) for name in ("grouped_mm", "loop")]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# torch.compile.


def differences(layer: Callable[..., torch.Tensor], compiled: Callable[..., torch.Tensor], parameters: Any) -> float:
    """The largest relative difference between outputs and gradients."""
    results = []
    for function in (layer, compiled):
        hidden = make_hidden(dist.get_rank() if dist.is_initialized() else 0)
        out = function(hidden)
        results.append([out, *torch.autograd.grad(out.square().sum(), [hidden, *parameters])])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True))


def compile_layers() -> list[float]:
    """Of whole layers, without graph breaks."""
    group, found = dist.group.WORLD if dist.is_initialized() else None, []
    for name in COMPILED:
        torch._dynamo.reset()
        layer = make_layer(STATIC[name], group=group)
        layer.router.tolerates_nonfinite = False
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        found.append(differences(layer, compiled, list(layer.parameters())))
    return found


def test_whole_layers_compile_without_graph_breaks() -> None:
    for found in [compile_layers(), *run_ranks(2, compile_layers)]:
        assert max(found) < 1e-5


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_dispatch_experts_and_combine_compile_without_graph_breaks(weight_on: str) -> None:
    torch._dynamo.reset()
    router = build_router(H, E, RoutingConfig(top_k=K, method="optimal_transport", weight_on=weight_on, init_std=1.0))
    routing = router(make_hidden(3).view(T, H), make_tokens(True))
    routing = replace(routing, weight_P=routing.weight_P.detach())
    dispatcher = AllToAllDispatcher(ExpertMap.from_owners([0] * E), None)
    experts = Experts(H, MoEConfig(num_experts=E, ffn_size=F), E)
    torch.nn.init.normal_(experts.w_gate_up)
    torch.nn.init.normal_(experts.w_down)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        rows_RH, segments, ticket = dispatcher.dispatch(hidden.view(T, H), routing)
        return dispatcher.combine(experts(rows_RH, segments), ticket)

    assert differences(run, torch.compile(run, fullgraph=True, backend="aot_eager"), list(experts.parameters())) < 1e-5
