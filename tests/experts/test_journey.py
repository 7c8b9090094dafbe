"""The fused journey against its parts: dispatch, the plain loop of experts, combine; outputs and all gradients.

Shape letters: T tokens, H hidden, E experts, F FFN width, P pairs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe_dist.dispatch import AllToAllDispatcher
from moe_dist.experts import backward_over_ranks, cpu, journey, whole
from moe_dist.experts.backends import Activation, compute_loop
from moe_dist.experts.journey import travel
from moe_dist.experts.types import Kernels, Weights
from moe_dist.kernels import onednn
from moe_dist.parallel.collectives import start_all_to_all
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing
from moe_dist.routing.router import count_per_expert
from tests.dispatch.test_dispatcher import MAPS, num_ranks_of
from tests.support.distributed import run_ranks

E, H, F = 8, 8, 16
ACTIVATIONS: list[Activation] = ["swiglu", "gelu"]
FEW_MAPS = ["unequal of 2", "an idle rank of 4"]


@dataclass(frozen=True)
class Share:
    """What one rank has, in float64; `slots` for every expert where the routing is static."""

    hidden_TH: torch.Tensor
    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor
    target_TH: torch.Tensor
    slots: int | None = None


@dataclass(frozen=True)
class Way:
    """How a journey is computed."""

    expert_map: ExpertMap
    kernels: Kernels = cpu.KERNELS
    activation: Activation = "swiglu"
    dtype: torch.dtype = torch.float64
    recompute: bool = False
    num_chunks: int = 1


def make_share(seed: int, num_tokens: int, width: int = H) -> Share:
    """Tokens with 0 to E pairs, few experts that have many and many that have few, and some weights of zero."""
    draw: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    take_TE = torch.rand(num_tokens, E, **draw) < torch.rand(num_tokens, 1, **draw) * torch.linspace(0.02, 1, E)
    token_P, expert_P = take_TE.nonzero().unbind(1)
    weight_P = torch.rand(len(token_P), **draw)
    weight_P[::5] = 0
    hidden_TH, target_TH = (torch.randn(num_tokens, width, **draw).bfloat16().double() for _ in range(2))
    return Share(hidden_TH, token_P, expert_P, weight_P, target_TH)


def uneven(num_ranks: int, width: int = H, scale: int = 1) -> list[Share]:
    return [make_share(rank, scale * (9 + 4 * rank), width) for rank in range(num_ranks)]


def padded(shares: list[Share]) -> list[Share]:
    """The same pairs in slots, of which one an expert or more is empty, and vacant pairs behind them."""
    slots = 1 + max(int(count_per_expert(share.expert_P, E).max()) for share in shares)

    def with_vacant(share: Share) -> Share:
        def add(value_P: torch.Tensor, vacant: int) -> torch.Tensor:
            return torch.cat([value_P, value_P.new_full((3,), vacant)])

        token_P, expert_P = add(share.token_P, len(share.hidden_TH)), add(share.expert_P, E)
        return replace(share, token_P=token_P, expert_P=expert_P, weight_P=add(share.weight_P, 0), slots=slots)

    return [with_vacant(share) for share in shares]


def weights_of(expert_map: ExpertMap, width: int, activation: Activation, dtype: torch.dtype) -> list[torch.Tensor]:
    """The stacks of this rank's experts."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    stacks = []
    for shape in ((width, 2 * F if activation == "swiglu" else F), (F, width)):
        drawn_E = torch.randn(E, *shape, generator=torch.Generator().manual_seed(7)) / shape[0] ** 0.5
        stacks.append(drawn_E[list(expert_map.experts_of_rank[rank])].bfloat16().to(dtype).requires_grad_())
    return stacks


def output(share: Share, way: Way, *inputs: torch.Tensor, **others: Any) -> torch.Tensor:
    """Of the journey; `inputs` are tokens, weights of the pairs, and the stacks."""
    hidden, weight, w_in, w_out = inputs
    dispatcher, routing = make_dispatcher(way), routing_of(share, weight)
    plan, weights = dispatcher.plan(routing, len(hidden)), Weights(w_in, w_out, way.activation)
    return travel(hidden, weight, plan, weights, way.kernels, way.recompute, **others)


def output_of_parts(share: Share, way: Way, *inputs: torch.Tensor) -> torch.Tensor:
    hidden, weight, w_in, w_out = inputs
    dispatcher = make_dispatcher(way)
    rows, segments, ticket = dispatcher.dispatch(hidden, routing_of(share, weight))
    return dispatcher.combine(compute_loop(rows, segments, w_in, w_out, way.activation), ticket)


def make_dispatcher(way: Way) -> AllToAllDispatcher:
    return AllToAllDispatcher(way.expert_map, dist.group.WORLD if dist.is_initialized() else None, way.num_chunks)


def routing_of(share: Share, weight_P: torch.Tensor) -> Routing:
    load_E = count_per_expert(share.expert_P[share.expert_P < E], E)
    return Routing(share.token_P, share.expert_P, weight_P, load_E, pairs_per_expert=share.slots)


def run(share: Share, way: Way, compute: Callable[..., torch.Tensor] = output, **others: Any) -> list[torch.Tensor]:
    """Output, and the gradients of tokens, pair weights and the experts' stacks, on this rank."""
    weight_dtype = torch.promote_types(way.dtype, torch.float32)
    inputs = [share.hidden_TH.to(way.dtype), share.weight_P.to(weight_dtype)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    inputs += weights_of(way.expert_map, share.hidden_TH.shape[1], way.activation, way.dtype)
    out = compute(share, way, *inputs, **others)
    grads = torch.autograd.grad(out, inputs, share.target_TH.to(way.dtype), materialize_grads=True, allow_unused=True)
    return [out.detach(), *grads]


def on_ranks(shares: list[Share], function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(share, *args)` on every rank."""
    return (
        [function(shares[0], *args)] if len(shares) == 1 else run_ranks(len(shares), _on_rank, shares, function, args)
    )


def _on_rank(shares: list[Share], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(shares[dist.get_rank()], *args)


def close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for number, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(number, right, rtol=tolerance, atol=tolerance)


def equals_the_parts(share: Share, expert_map: ExpertMap) -> None:
    for activation, recompute, num_chunks in itertools.product(ACTIVATIONS, (False, True), (1, 3)):
        way = Way(expert_map, cpu.KERNELS, activation, torch.float64, recompute, num_chunks)
        expected = run(share, way, output_of_parts)
        close(run(share, way), expected, 1e-12)
        grouped = replace(way, kernels=whole.KERNELS)
        if share.slots:  # with equally many rows, any format
            close(run(share, grouped), expected, 1e-12)
        for narrow in (way, grouped):
            close([x.double() for x in run(share, replace(narrow, dtype=torch.float32))], expected, 1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", MAPS)
def test_the_journey_equals_its_parts(name: str, layout: str) -> None:
    shares = uneven(num_ranks_of(name))
    on_ranks(padded(shares) if layout == "padded" else shares, equals_the_parts, MAPS[name])


@pytest.mark.parametrize("name", ["contiguous of 1", *FEW_MAPS])
@pytest.mark.parametrize("num_tokens", [(0, 7, 0, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_ranks_without_tokens(name: str, num_tokens: tuple[int, ...], layout: str) -> None:
    shares = [make_share(rank, num_tokens[rank]) for rank in range(num_ranks_of(name))]
    on_ranks(padded(shares) if layout == "padded" else shares, equals_the_parts, MAPS[name])


@pytest.mark.parametrize("name", ["contiguous of 1", "unequal of 2"])
def test_tokens_without_pairs(name: str) -> None:
    share = make_share(0, 5)
    none = replace(share, token_P=share.token_P[:0], expert_P=share.expert_P[:0], weight_P=share.weight_P[:0])
    on_ranks([none] * num_ranks_of(name), equals_the_parts, MAPS[name])


def is_close_to_float32(share: Share, expert_map: ExpertMap) -> None:
    for kernels, activation, num_chunks in itertools.product((cpu.KERNELS, whole.KERNELS), ACTIVATIONS, (1, 3)):
        way = Way(expert_map, kernels, activation, torch.bfloat16, num_chunks=num_chunks)
        for number, right in zip(run(share, way), run(share, replace(way, dtype=torch.float32)), strict=True):
            scale = right.abs().max().clamp(min=1e-6) if right.numel() else 1
            torch.testing.assert_close(number.float() / scale, right / scale, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["contiguous of 1", *FEW_MAPS])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_bfloat16_is_close_to_float32(name: str, layout: str) -> None:
    """Within a few of its roundings of 2^-8, relative to the largest number of each tensor."""
    shares = uneven(num_ranks_of(name))
    on_ranks(padded(shares) if layout == "padded" else shares, is_close_to_float32, MAPS[name])


def equals_the_parts_at_any_byte(share: Share, expert_map: ExpertMap) -> None:
    way = Way(expert_map, dtype=torch.bfloat16)
    for number, right in zip(run(share, way), run(share, way, output_of_parts), strict=True):
        torch.testing.assert_close(number.float(), right.float(), rtol=0.02, atol=0.05)


def test_float32_weights_travel_behind_rows_of_six_bytes() -> None:
    """Where a number may begin at any second byte."""
    on_ranks(uneven(2, width=3), equals_the_parts_at_any_byte, MAPS["unequal of 2"])


def passes_finite_differences(share: Share, expert_map: ExpertMap) -> None:
    """Ranks go in step: each varies a number of its own, on which no other rank's output depends."""
    alone = not dist.is_initialized()
    inputs = [x.clone().requires_grad_() for x in (share.hidden_TH, share.weight_P)]  # ranks share what they are sent
    kernels_of_layout = (cpu.KERNELS, whole.KERNELS) if share.slots else (cpu.KERNELS,)
    for kernels, activation, recompute in itertools.product(kernels_of_layout, ACTIVATIONS, (False, True)):
        way = Way(expert_map, kernels, activation, torch.float64, recompute, num_chunks=2)
        stacks = [x.requires_grad_(alone) for x in weights_of(expert_map, 3, activation, torch.float64)]
        assert torch.autograd.gradcheck(partial(output, share, way), (*inputs, *stacks), fast_mode=True)


@pytest.mark.parametrize("name", ["shuffled of 1", "unequal of 2"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_are_finite_differences(name: str, layout: str) -> None:
    shares = [make_share(0, 3, width=3)] * num_ranks_of(name)
    on_ranks(padded(shares) if layout == "padded" else shares, passes_finite_differences, MAPS[name])


def is_the_same_for_any_number_of_chunks(share: Share, way: Way, num_chunks: list[int]) -> None:
    for by_onednn in {False, onednn.AVAILABLE}:
        choice = patch.multiple(onednn, FASTER=by_onednn, FASTER_TRANSPOSED=by_onednn)
        with choice, patch.object(cpu, "_LARGE_PRODUCT", 2**20):
            expected = run(share, way)
            for number in num_chunks:
                for part, right in zip(run(share, replace(way, num_chunks=number)), expected, strict=True):
                    assert torch.equal(part, right)


@pytest.mark.parametrize("name", FEW_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", [cpu.KERNELS, whole.KERNELS], ids=["cpu", "whole"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_chunks_change_no_bit(name: str, dtype: torch.dtype, kernels: Kernels, layout: str) -> None:
    """2 and 3 chunks, and more than any rank has experts."""
    shares = uneven(num_ranks_of(name), width=32, scale=20)
    way = Way(MAPS[name], kernels, dtype=dtype)
    shares = padded(shares) if layout == "padded" else shares
    on_ranks(shares, is_the_same_for_any_number_of_chunks, way, [2, 3, 20])


def collectives(share: Share, way: Way) -> int:
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        run(share, way)
    return exchange.call_count


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_two_all_to_alls_a_chunk_each_way_and_one_of_counts(num_chunks: int) -> None:
    way = Way(MAPS["contiguous of 2"], num_chunks=num_chunks)
    assert on_ranks(uneven(2), collectives, way) == [1 + 4 * num_chunks] * 2
    assert on_ranks(padded(uneven(2)), collectives, way) == [4 * num_chunks] * 2


def trace(share: Share, way: Way) -> list[str]:
    """What one journey does, in order: 1> is the first all-to-all that is issued, 1. when it is waited for."""
    seen: list[str] = []

    class Waited:
        def __init__(self, work: dist.Work, number: int) -> None:
            self.work, self.number = work, number

        def wait(self) -> None:
            seen.append(f"{self.number}.")
            self.work.wait()

    def start(*args: Any) -> Waited:
        number = 1 + sum(entry.endswith(">") for entry in seen)
        seen.append(f"{number}>")
        return Waited(start_all_to_all(*args), number)

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append(name)
            return function(*args)

        return call

    kernels = Kernels(noted("experts", way.kernels.forward), noted("experts", way.kernels.backward))
    with (
        patch.object(journey, "start_all_to_all", start),
        patch.object(backward_over_ranks, "start_all_to_all", start),
        patch.object(cpu, "_weight_gradients", noted("weights", cpu._weight_gradients)),
    ):
        run(share, replace(way, kernels=kernels), meanwhile=lambda: seen.append("shared"))
    return seen


def test_rows_of_the_next_chunk_are_sent_before_experts_compute() -> None:
    """And shared experts once the first are on their way, and weight gradients once the gradients of rows are."""
    forward = "1> shared 2> 1. experts 3> 4> 2. experts 5> 4. experts 6> 3. 5. 6."
    backward = "7> 8> 7. experts 9> weights 10> 8. experts 11> weights 10. experts 12> weights 9. 11. 12."
    for seen in on_ranks(uneven(2, scale=9), trace, Way(MAPS["contiguous of 2"], num_chunks=3)):
        assert " ".join(seen) == f"{forward} {backward}"
