"""The MoE layer: the same outputs, losses and gradients on every layout of ranks, and against a dense oracle.

Every comparison is of float64 to 1e-12, of the gradient of every parameter by its global name.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist import MoELayer
from moe_dist.config.routing import CoefficientConfig, LossesConfig, RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.dispatch.exchange import Exchange
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.parallel.groups import build_groups, build_node_groups
from moe_dist.placement import WIDTH_DIMENSION, ExpertMap
from moe_dist.routing import Routing, Tokens, real_pairs
from moe_dist.routing.balance import sum_over_ranks
from tests.support.distributed import run_ranks

B, S, H, E, K, F = 4, 6, 6, 8, 2, 4
ALL_ON = {
    "score": "sigmoid",
    "renormalise": True,
    "scaling_factor": 2.5,
    "bias": {"rule": "sign"},
    "losses": {"load_balance": {"coefficient": 0.3, "scope": "sequence"}, "z": {"coefficient": 0.05}},
}
SHARED = {"num_shared_experts": 2, "shared_gate": True}
GELU = {"activation": "gelu", "backend": "loop"}


def global_batch(score: str) -> dict[str, Any]:
    return {"score": score, "losses": {"load_balance": {"coefficient": 0.3, "scope": "global_batch"}}}


@dataclass(frozen=True)
class Case:
    moe: dict[str, Any]
    routing: dict[str, Any]
    checkpointed: bool = False


CASES = {
    "dropless": Case(SHARED, ALL_ON),
    "dropless, recomputed": Case(SHARED, ALL_ON, checkpointed=True),
    "global loss": Case(GELU, global_batch("softmax")),
    "global loss, recomputed": Case({}, global_batch("softmax_top_k"), checkpointed=True),
    "packed capacity": Case({}, {**ALL_ON, "capacity": {"factor": 0.8, "renormalise": True}}),
    "padded capacity": Case(SHARED, {**ALL_ON, "capacity": {"factor": 0.8, "policy": "weight", "pad": True}}),
    "padded, recomputed": Case({}, {**global_batch("sigmoid"), "capacity": {"factor": 1.2, "pad": True}}, True),
}


@dataclass(frozen=True)
class Layout:
    num_ranks: int
    expert: int
    owners: tuple[int, ...] | None = None
    expert_tensor: int = 1
    ranks_per_node: int | None = None
    """Of hierarchical dispatch; None: flat."""

    @property
    def expert_map(self) -> ExpertMap | None:
        return ExpertMap.from_owners(list(self.owners)) if self.owners else None


LAYOUTS = {
    "data 2": Layout(2, 1),
    "expert 2": Layout(2, 2),
    "expert 2, shuffled and unequal": Layout(2, 2, (1, 0, 0, 0, 1, 0, 1, 0)),
    "expert 4": Layout(4, 4),
    "expert 4, shuffled": Layout(4, 4, (3, 0, 2, 1, 0, 3, 1, 2)),
    "expert 2, data 2": Layout(4, 2),
    "expert 2, data 2, shuffled": Layout(4, 2, (1, 0, 0, 1, 1, 0, 1, 0)),
    "slices 2": Layout(2, 1, expert_tensor=2),
    "slices 4": Layout(4, 1, expert_tensor=4),
    "slices 2, data 2": Layout(4, 1, expert_tensor=2),
    "expert 2, slices 2": Layout(4, 2, expert_tensor=2),
    "expert 2, slices 2, shuffled and unequal": Layout(4, 2, (1, 0, 0, 0, 1, 0, 1, 0), expert_tensor=2),
    "expert 4, nodes of 2": Layout(4, 4, ranks_per_node=2),
    "expert 4, nodes of 1, shuffled": Layout(4, 4, (3, 0, 2, 1, 0, 3, 1, 2), ranks_per_node=1),
    "expert 2, data 2, nodes of 1": Layout(4, 2, (1, 0, 0, 0, 1, 0, 1, 0), ranks_per_node=1),
    "expert 2, slices 2, nodes of 2": Layout(4, 2, expert_tensor=2, ranks_per_node=2),
}


@dataclass(frozen=True)
class Batch:
    """`weight_BS`: of each token's output in the main loss, 0 where there is no target."""

    hidden_BSH: torch.Tensor
    target_BSH: torch.Tensor
    weight_BS: torch.Tensor
    padding_BS: torch.Tensor | None = None

    def part(self, rank: int, num_ranks: int) -> "Batch":
        rows = slice(rank * B // num_ranks, (rank + 1) * B // num_ranks)
        padding = None if self.padding_BS is None else self.padding_BS[rows]
        return Batch(self.hidden_BSH[rows], self.target_BSH[rows], self.weight_BS[rows], padding)

    @property
    def num_tokens(self) -> int:
        return self.weight_BS.numel() if self.padding_BS is None else int((~self.padding_BS).sum())


@dataclass(frozen=True)
class Result:
    """Of one rank, summed up by `whole` to those of the batch. Gradients by global name."""

    out_BSH: torch.Tensor
    d_hidden_BSH: torch.Tensor
    gradients: dict[str, torch.Tensor]
    losses: dict[str, float]
    load_E: torch.Tensor
    dropped_E: torch.Tensor
    bias_E: torch.Tensor


def make_batch(seed: int = 0, padded: bool = False) -> Batch:
    draw = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    padding = torch.arange(S) >= torch.tensor([[S], [3], [0], [S - 1]]) if padded else None
    weight = (torch.rand(B, S, **draw) < 0.6).double()  # another number of targets on each rank
    weight[B - 1] = 0  # and none on the last
    return Batch(torch.randn(B, S, H, **draw), torch.randn(B, S, H, **draw), weight, padding)


def make_layer(case: Case, **groups: Any) -> MoELayer:
    moe = MoEConfig(**{"num_experts": E, "ffn_size": F, **case.moe})
    routing = RoutingConfig.model_validate({"top_k": K, "init_std": 0.7, **case.routing})
    layer = MoELayer(H, moe, routing, **groups)
    layer.initialise(seed=1, name="layers.0", std=0.5)
    layer.router.balance.bias_E.copy_(torch.linspace(-0.05, 0.05, E))
    return layer.double()


def gradients_by_name(layer: MoELayer) -> dict[str, torch.Tensor]:
    gradients = {name: p.grad for name, p in layer.named_parameters() if not name.startswith("experts.")}
    for place, expert in enumerate(layer.own_experts):
        views = layer.experts.weights_of(place, lambda p: p.grad)
        gradients |= {f"experts.{expert}.{key}": whole_width(layer, key, grad) for key, grad in views.items()}
    return gradients


def whole_width(layer: MoELayer, key: str, part: torch.Tensor) -> torch.Tensor:
    """A rank's slice of an expert's weight among zeros, so that the sum over slices is whole."""
    parts = [torch.zeros_like(part) for _ in range(layer.num_slices)]
    parts[layer.own_slice] = part
    return torch.cat(parts, WIDTH_DIMENSION[key])


def step(layer: MoELayer, batch: Batch, case: Case, share: float = 1, group: dist.ProcessGroup | None = None) -> Result:
    """One optimiser step's forward and backward on one rank's part of the batch; `share` is its part of the tokens."""
    hidden, losses = batch.hidden_BSH.clone().requires_grad_(), {}
    padding = None if batch.padding_BS is None else batch.padding_BS.flatten()
    tokens = Tokens(num_sequences=len(hidden), padding_T=padding, share=share)
    layer.router.register_forward_hook(lambda _, __, routing: losses.update(routing.losses))
    out = checkpoint(layer, hidden, tokens, use_reentrant=False) if case.checkpointed else layer(hidden, tokens)
    (batch.weight_BS[..., None] * (out - batch.target_BSH) ** 2).sum().backward()
    balance = layer.router.balance
    (totals,) = sum_over_ranks([balance], group)
    layer.router.update(totals, bias_rate=0.01)
    return Result(
        out_BSH=out.detach(),
        d_hidden_BSH=hidden.grad,
        gradients=gradients_by_name(layer),
        losses={name: loss.item() * share for name, loss in losses.items()},
        load_E=totals["load_E"],
        dropped_E=totals["dropped_E"],
        bias_E=balance.bias_E,
    )


def exchange_of(layout: Layout, group: dist.ProcessGroup | None) -> Exchange | None:
    if layout.ranks_per_node is None:
        return None
    expert_map = layout.expert_map or ExpertMap.contiguous(E, layout.expert)
    node_groups = build_node_groups(group, layout.ranks_per_node)
    return HierarchicalExchange(expert_map.sliced(layout.expert_tensor), node_groups)


def step_of_rank(case: Case, layout: Layout, batch: Batch) -> Result:
    groups = build_groups(layout.expert, torch.device("cpu"), layout.expert_tensor)
    data = groups.data.get_group()
    layer = make_layer(
        case,
        expert_parallel_group=groups.expert_parallel_group,
        data_parallel_group=data,
        expert_map=layout.expert_map,
        expert_tensor=layout.expert_tensor,
        exchange=exchange_of(layout, groups.expert_parallel_group),
    )
    part = batch.part(dist.get_rank(), layout.num_ranks)
    return step(layer, part, case, part.num_tokens / batch.num_tokens, data)


def whole(results: list[Result]) -> Result:
    """Of the whole batch: token tensors joined, gradients and losses summed, counters as every rank has them."""
    gradients: dict[str, torch.Tensor] = {}
    for result in results:
        for name, grad in result.gradients.items():
            gradients[name] = gradients[name] + grad if name in gradients else grad
    first = results[0]
    for result in results:
        for name in ("load_E", "dropped_E", "bias_E"):
            assert torch.equal(getattr(result, name), getattr(first, name)), f"{name} differs between ranks"
    return dataclasses.replace(
        first,
        out_BSH=torch.cat([result.out_BSH for result in results]),
        d_hidden_BSH=torch.cat([result.d_hidden_BSH for result in results]),
        gradients=gradients,
        losses={name: sum(result.losses[name] for result in results) for name in first.losses},
    )


def assert_same(actual: Result, expected: Result, tolerance: float = 1e-12) -> None:
    assert actual.gradients.keys() == expected.gradients.keys()
    for field in dataclasses.fields(Result):
        torch.testing.assert_close(
            getattr(actual, field.name), getattr(expected, field.name), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_layout_gives_the_same(name: str, layout: str) -> None:
    """Outputs, losses, loads, drops, the next bias, and the gradient of the input and of every parameter."""
    case, batch = CASES[name], make_batch()
    alone = step(make_layer(case), batch, case)
    assert sum(not grad.any() for grad in alone.gradients.values()) <= 3  # of one expert without targets
    assert (alone.dropped_E.sum() > 0) == ("capacity" in case.routing)
    assert_same(whole(run_ranks(LAYOUTS[layout].num_ranks, step_of_rank, case, LAYOUTS[layout], batch)), alone)


@pytest.mark.parametrize("layout", ["data 2", "expert 2", "expert 4", "expert 2, slices 2"])
@pytest.mark.parametrize("name", ["dropless", "global loss", "packed capacity", "padded capacity"])
def test_another_number_of_real_tokens_on_each_rank(name: str, layout: str) -> None:
    """Of four ranks, one has nothing but padding. Losses are weighted by each rank's share of the real tokens."""
    case, batch = CASES[name], make_batch(padded=True)
    alone = step(make_layer(case), batch, case)
    assert_same(whole(run_ranks(LAYOUTS[layout].num_ranks, step_of_rank, case, LAYOUTS[layout], batch)), alone)


def step_with_an_idle_rank(case: Case, batch: Batch) -> Result:
    """All sequences on rank 1, none on rank 0."""
    groups = build_groups(2, torch.device("cpu"))
    layer = make_layer(case, expert_parallel_group=groups.expert_parallel_group)
    rows = slice(0, 0) if dist.get_rank() == 0 else slice(0, B)
    part = Batch(batch.hidden_BSH[rows], batch.target_BSH[rows], batch.weight_BS[rows])
    hidden = part.hidden_BSH.clone().requires_grad_()
    out = layer(hidden)  # by default each row is a sequence
    (part.weight_BS[..., None] * (out - part.target_BSH) ** 2).sum().backward()
    balance = layer.router.balance
    zeros_E = torch.zeros(E, dtype=torch.int64)
    return Result(out.detach(), hidden.grad, gradients_by_name(layer), {}, zeros_E, zeros_E, balance.bias_E)


def test_a_rank_with_no_tokens() -> None:
    case, batch = Case(SHARED, ALL_ON), make_batch()
    alone = step(make_layer(case), batch, case)
    shared = whole(run_ranks(2, step_with_an_idle_rank, case, batch))
    assert_same(
        dataclasses.replace(
            shared, losses=alone.losses, load_E=alone.load_E, dropped_E=alone.dropped_E, bias_E=alone.bias_E
        ),
        alone,
    )


# Against the definition.


def dense_output(layer: MoELayer, hidden_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """sum over pairs of weight * expert(token), plus the shared expert."""
    rows = [x * 0 for x in hidden_TH]
    for t, e, weight in zip(routing.token_P.tolist(), routing.expert_P.tolist(), routing.weight_P, strict=True):
        w = layer.experts.weights_of(e, lambda p: p)
        gate = hidden_TH[t] @ w["w_gate"]
        rows[t] = rows[t] + weight * ((gate * gate.sigmoid() * (hidden_TH[t] @ w["w_up"])) @ w["w_down"])
    out_TH = torch.stack(rows)
    return out_TH if layer.shared is None else out_TH + layer.shared(hidden_TH)


@pytest.mark.parametrize("name", [name for name in CASES if "recomputed" not in name and "global" not in name])
def test_the_layer_is_the_dense_sum_with_its_losses(name: str) -> None:
    case, batch = CASES[name], make_batch()
    results = []
    for dense in (False, True):
        layer, hidden = make_layer(case), batch.hidden_BSH.clone().requires_grad_()
        if dense:
            routing = real_pairs(layer.router(hidden.flatten(0, 1), Tokens(num_sequences=B)))
            out = dense_output(layer, hidden.flatten(0, 1), routing).view_as(hidden)
            loss = (batch.weight_BS[..., None] * (out - batch.target_BSH) ** 2).sum() + sum(routing.losses.values())
        else:
            out = layer(hidden)
            loss = (batch.weight_BS[..., None] * (out - batch.target_BSH) ** 2).sum()
        loss.backward()
        results.append((out.detach(), hidden.grad, gradients_by_name(layer)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_shapes_are_kept_and_a_matrix_is_one_sequence() -> None:
    layer, hidden = make_layer(Case({}, {"score": "sigmoid"})), make_batch().hidden_BSH
    flat = layer(hidden.flatten(0, 1))
    assert flat.shape == (B * S, H)
    assert torch.equal(layer(hidden), flat.view(B, S, H))
    assert torch.equal(layer(hidden.transpose(0, 1)).transpose(0, 1), flat.view(B, S, H))


@pytest.mark.parametrize("capacity", [None, {"factor": 0.8}, {"factor": 0.8, "pad": True}])
def test_what_padding_holds_changes_nothing_for_the_others(capacity: dict[str, Any] | None) -> None:
    """Padding anywhere: at the front, in the middle, at the end, a whole sequence."""
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 0], padding[1, 2:4], padding[2, -1], padding[3] = True, True, True, True
    case, results = Case(SHARED, {**ALL_ON, "capacity": capacity}), []
    for filling in (0.0, 100.0):
        layer, batch = make_layer(case), make_batch()
        hidden = batch.hidden_BSH.masked_fill(padding[..., None], filling).requires_grad_()
        out = layer(hidden, Tokens(num_sequences=B, padding_T=padding.flatten()))
        ((out - batch.target_BSH) ** 2)[~padding].sum().backward()
        balance = layer.router.balance
        assert not hidden.grad[padding].any()
        results.append(
            (out[~padding], hidden.grad[~padding], gradients_by_name(layer), balance.load_E, balance.dropped_E)
        )
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert results[0][3].sum() == K * (~padding).sum()


def test_without_capacity_padding_is_as_if_it_were_not_there() -> None:
    padding = torch.rand(B * S, generator=torch.Generator().manual_seed(0)) < 0.4
    routing = {**ALL_ON, "losses": {"load_balance": {"coefficient": 1.0, "scope": "micro_batch"}}}
    hidden_TH, results = make_batch().hidden_BSH.flatten(0, 1), []
    for hidden, kept, padding_T in [(hidden_TH, ~padding, padding), (hidden_TH[~padding], slice(None), None)]:
        layer = make_layer(Case(SHARED, routing))
        out = layer(hidden, Tokens(padding_T=padding_T))[kept]
        out.square().sum().backward()
        results.append((out.detach(), gradients_by_name(layer)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class FixedRouter(nn.Module):
    """Adds to another router's routing what that router does not decide."""

    def __init__(self, router: nn.Module, **changes: Any) -> None:
        super().__init__()
        self.router, self.changes = router, changes

    def forward(self, hidden_TH: torch.Tensor, tokens: Tokens) -> Routing:
        return dataclasses.replace(self.router(hidden_TH, tokens), **self.changes)


def test_identity_weight_adds_the_token_itself() -> None:
    """Zero-computation experts: with a gradient for the token and for the weight."""
    layer, hidden = make_layer(Case({}, {})), make_batch().hidden_BSH.flatten(0, 1).requires_grad_()
    weight_T = torch.rand(B * S, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(hidden)
    base = layer(hidden)
    expected = torch.autograd.grad(((base + weight_T[:, None] * hidden) * target).sum(), [hidden, weight_T])
    layer.router = FixedRouter(layer.router, identity_weight_T=weight_T)
    out = layer(hidden)
    torch.testing.assert_close(out, base + weight_T[:, None] * hidden, rtol=1e-13, atol=1e-13)
    actual = torch.autograd.grad((out * target).sum(), [hidden, weight_T])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_weights_on_the_input_scale_what_the_experts_see() -> None:
    """Llama 4. Every token to one expert of weight 1/2: the layer of half the token, at weight 1."""
    layer, hidden = make_layer(Case({}, {"top_k": 1})), make_batch().hidden_BSH.flatten(0, 1)
    everyone, pairs = torch.arange(B * S), torch.full((B * S,), 3)

    def fixed(weight: float, weight_on: str) -> FixedRouter:
        weight_P = torch.full((B * S,), weight, dtype=torch.float64)
        return FixedRouter(router, token_P=everyone, expert_P=pairs, weight_P=weight_P, weight_on=weight_on)

    router = layer.router
    layer.router = fixed(0.5, "input")
    on_input = layer(hidden)
    layer.router = fixed(1.0, "output")
    torch.testing.assert_close(on_input, layer(hidden / 2), rtol=1e-13, atol=1e-13)


# Number formats.


def test_autocast_computes_in_bfloat16_and_is_close() -> None:
    case, batch, results = Case(SHARED, ALL_ON), make_batch(), []
    for enabled in (False, True):
        layer, hidden = make_layer(case).float(), batch.hidden_BSH.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = layer(hidden)
        out.float().square().sum().backward()
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append({"out": out.detach().float(), "hidden": hidden.grad, **gradients_by_name(layer)})
    exact, narrow = results
    for name, right in exact.items():
        assert narrow[name].dtype == torch.float32
        error = (narrow[name] - right).norm() / right.norm()
        assert error < 0.03, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_cast_as_a_whole_computes_in_its_format(dtype: torch.dtype) -> None:
    layer, hidden = make_layer(Case(SHARED, ALL_ON)), make_batch().hidden_BSH
    exact = layer(hidden)
    out = layer.to(dtype)(hidden.to(dtype).requires_grad_())
    out.sum().backward()
    assert out.dtype == dtype
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}
    same = (out - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)
    assert same.float().mean() > 0.9  # a few tokens may be routed to another expert of nearly the same score


# Initial weights and construction.


def weights_by_name(layer: MoELayer) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in layer.named_parameters() if not name.startswith("experts.")}
    for place, expert in enumerate(layer.own_experts):
        views = layer.experts.weights_of(place, lambda p: p.detach())
        weights |= {f"experts.{expert}.{key}": whole_width(layer, key, view) for key, view in views.items()}
    return weights


def weights_of_rank(case: Case, layout: Layout) -> dict[str, torch.Tensor]:
    group = build_groups(layout.expert, torch.device("cpu"), layout.expert_tensor).expert_parallel_group
    placement = {"expert_map": layout.expert_map, "expert_tensor": layout.expert_tensor}
    return weights_by_name(make_layer(case, expert_parallel_group=group, **placement))


@pytest.mark.parametrize(
    "layout", ["expert 2, shuffled and unequal", "expert 4", "slices 4", "expert 2, slices 2, shuffled and unequal"]
)
def test_initial_weights_do_not_depend_on_the_layout(layout: str) -> None:
    case = Case(SHARED, {})
    alone = weights_by_name(make_layer(case))
    joined: dict[str, torch.Tensor] = {}
    for weights in run_ranks(LAYOUTS[layout].num_ranks, weights_of_rank, case, LAYOUTS[layout]):
        parts = {
            name: joined[name] + w for name, w in weights.items() if name.startswith("experts.") and name in joined
        }
        joined |= weights | parts
    assert joined.keys() == alone.keys()
    assert all(torch.equal(joined[name], weight) for name, weight in alone.items())


def test_initial_weights_are_all_different_and_have_their_spread() -> None:
    layer = MoELayer(64, MoEConfig(num_experts=4, ffn_size=32, **SHARED), RoutingConfig(init_std=0.1))
    layer.initialise(seed=0, name="layers.0", std=0.02, output_std=0.005)
    weights = weights_by_name(layer)
    for name, weight in weights.items():
        std = 0.1 if name == "router.weight" else 0.005 if "w_down" in name else 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.3 if "output_gate" in name else 0.1), name
    assert len({weight.flatten()[0].item() for weight in weights.values()}) == len(weights)
    for seed, name in ((1, "layers.0"), (0, "layers.1")):
        layer.initialise(seed=seed, name=name)
        assert not any(torch.equal(weight, weights[key]) for key, weight in weights_by_name(layer).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_initial_weights_are_drawn_in_float32_and_then_cast(dtype: torch.dtype) -> None:
    case = Case(SHARED, {})
    layer, cast = make_layer(case).float(), make_layer(case).to(dtype)
    cast.initialise(seed=1, name="layers.0", std=0.5)
    for p, q in zip(layer.parameters(), cast.parameters(), strict=True):
        assert torch.equal(p.to(dtype), q)


def test_only_routed_experts_have_expert_in_their_name() -> None:
    """DeepSpeed and Megatron act on such names."""
    layer = make_layer(CASES["dropless"])
    names = [*dict(layer.named_parameters()), *dict(layer.named_buffers()), *dict(layer.named_modules())]
    assert {name for name in names if "expert" in name} == {"experts", "experts.w_gate_up", "experts.w_down"}


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"routing\.top_k: 9 is more than moe\.num_experts = 8"):
        MoELayer(H, MoEConfig(num_experts=8), RoutingConfig(top_k=9))


def refused(layout: Layout) -> str:
    groups = build_groups(layout.expert, torch.device("cpu"))
    with pytest.raises(ValueError, match="expert") as error:
        MoELayer(H, MoEConfig(num_experts=7), RoutingConfig(), expert_parallel_group=groups.expert_parallel_group)
    return str(error.value)


def test_a_group_that_does_not_divide_the_experts_is_refused() -> None:
    messages = run_ranks(2, refused, LAYOUTS["expert 2"])
    assert messages == ["num_experts: 7 is not a multiple of the 2 expert-parallel ranks"] * 2


def test_a_map_must_place_all_experts() -> None:
    with pytest.raises(
        ValueError, match=r"expert_map: places 2 experts on 1 ranks; it must place moe.num_experts = 4 .*"
    ):
        MoELayer(8, MoEConfig(num_experts=4, ffn_size=8), RoutingConfig(), expert_map=ExpertMap.contiguous(2, 1))


@pytest.mark.parametrize("slices", [2, 5])
def test_slices_must_divide_the_group_and_the_width(slices: int) -> None:
    message = rf"expert_tensor: {slices} must divide the 1 ranks of expert_parallel_group and moe\.ffn_size = 8"
    with pytest.raises(ValueError, match=message):
        MoELayer(8, MoEConfig(num_experts=4, ffn_size=8), RoutingConfig(), expert_tensor=slices)


def test_the_output_may_be_changed_in_place() -> None:
    """Auxiliary losses ride on the weights, not on the output."""
    routing = RoutingConfig(losses=LossesConfig(z=CoefficientConfig(coefficient=0.1)))
    layer, hidden = MoELayer(8, MoEConfig(num_experts=4, ffn_size=8), routing), torch.randn(2, 3, 8)
    expected = layer(hidden) + hidden
    changed = layer(hidden)
    changed += hidden
    changed.sum().backward()
    assert torch.equal(changed, expected)
