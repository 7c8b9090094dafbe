"""The worked example of docs/dispatch.md: every form of its rows against a plain dense sum, outputs and gradients.

Ten tokens choose two of four experts each, which makes loads of 5, 6, 4 and 5. Padded, dropped and rerouted, computed expert
by expert, in equal blocks or as block-sparse products: where nothing drops, all give the same. The router is an ordinary one;
its input was made by hand (`benchmarks.worked_example.SCORES_TE`), so that every decision can be read off a table.

Shape letters: B sequences, S tokens of a sequence, T = B S tokens, H hidden, E experts, F expert FFN width, R rows.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from benchmarks import worked_example
from benchmarks.worked_example import FORMS, SCORES_TE, B, E, F, H, S, make_hidden, make_layer, pairs_of, route
from moe_dist import MoELayer
from moe_dist.routing import Tokens, real_pairs
from moe_dist.routing.random import key_of, uniform
from tests.support.distributed import run_ranks

ROOT = Path(__file__).parents[1]
Pairs = list[tuple[int, int]]
Results = dict[str, torch.Tensor]
"""The output, and the gradients of the input and of every weight by its global name."""

ALL_PAIRS: Pairs = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 3), (3, 3), (3, 1), (4, 2), (4, 0)]
ALL_PAIRS += [(5, 0), (5, 1), (6, 3), (6, 2), (7, 1), (7, 2), (8, 1), (8, 3), (9, 3), (9, 0)]
"""Token and expert: of each token the expert of the highest score, then that of the second highest."""
KEPT = {
    "dropless": ALL_PAIRS,
    "padded to 6": ALL_PAIRS,
    "dropped at 5": [pair for pair in ALL_PAIRS if pair != (8, 1)],
    "rerouted at 5": [pair for pair in ALL_PAIRS if pair != (8, 1)] + [(8, 2)],
}
SIZES = {"dropless": [5, 6, 4, 5], "padded to 6": [6] * 4, "dropped at 5": [5] * 4, "rerouted at 5": [5] * 4}
DROPPED = {"position": 8, "weight": 3, "batch_priority": 5, "random": 1}
"""By policy, the token that loses expert 1 where it has room for five of 0, 1, 3, 5, 7 and 8."""


def target_of(hidden_BSH: torch.Tensor) -> torch.Tensor:
    """What the outputs are multiplied by in the loss: the same for every layout."""
    draws = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return draws.to(hidden_BSH.dtype)


def results_of(layer: MoELayer, out_BSH: torch.Tensor, hidden_BSH: torch.Tensor, target_BSH: torch.Tensor) -> Results:
    (out_BSH * target_BSH).sum().backward()
    results = {"out": out_BSH.detach(), "hidden": hidden_BSH.grad, "router": layer.router.weight.grad}
    for place, expert in enumerate(layer.own_experts):
        views = layer.experts.weights_of(place, lambda p: p.grad)
        results |= {f"experts.{expert}.{name}": grad.contiguous() for name, grad in views.items()}
    return results


def run(capacity: dict[str, Any] | None, dtype: torch.dtype = torch.float64, **options: Any) -> Results:
    layer = make_layer(capacity, **options).to(dtype)
    hidden_BSH = make_hidden().to(dtype).requires_grad_()
    return results_of(layer, layer(hidden_BSH), hidden_BSH, target_of(hidden_BSH))


def dense(pairs: Pairs) -> Results:
    """Every expert on every token, weighted by the softmax scores of the given pairs and by 0 elsewhere."""
    layer, hidden_BSH = make_layer(None), make_hidden().requires_grad_()
    hidden_TH = hidden_BSH.view(-1, H)
    mask_TE = torch.zeros(B * S, E, dtype=torch.float64)
    for token, expert in pairs:
        mask_TE[token, expert] = 1
    weight_TE = (hidden_TH @ layer.router.weight.T).softmax(1) * mask_TE
    out_TH = sum(weight_TE[:, e, None] * expert_of(layer, e, hidden_TH) for e in range(E))
    return results_of(layer, out_TH.view(B, S, H), hidden_BSH, target_of(hidden_BSH))


def expert_of(layer: MoELayer, expert: int, rows_RH: torch.Tensor) -> torch.Tensor:
    w = layer.experts.weights_of(expert, lambda p: p)
    return (functional.silu(rows_RH @ w["w_gate"]) * (rows_RH @ w["w_up"])) @ w["w_down"]


def assert_same(actual: Results, expected: Results) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def at_five(policy: str = "position", **more: Any) -> dict[str, Any]:
    return {"factor": 1.0, "policy": policy, **more}


# The case, and the forms that the configuration gives.


def test_the_router_chooses_by_the_table_of_scores() -> None:
    routing = route(None)
    assert pairs_of(routing) == ALL_PAIRS
    assert routing.load_E.tolist() == [5, 6, 4, 5]
    assert routing.weight_P.tolist() == pytest.approx([SCORES_TE[t][e] for t, e in ALL_PAIRS], rel=1e-12)


@pytest.mark.parametrize("backend", ["loop", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_dense_sum_of_its_pairs(form: str, backend: str) -> None:
    assert_same(run(FORMS[form], backend=backend), dense(KEPT[form]))


def test_padding_changes_nothing() -> None:
    assert_same(run(FORMS["padded to 6"]), run(None))


@pytest.mark.parametrize("backend", ["loop", "cpu", "grouped_mm"])
@pytest.mark.parametrize("form", FORMS)
def test_backends_agree_in_float32(form: str, backend: str) -> None:
    """Where grouped_mm computes too. Within some 30 of float32's roundings, relative to the largest number of a tensor."""
    expected = dense(KEPT[form])
    for name, value in run(FORMS[form], torch.float32, backend=backend).items():
        assert (value - expected[name]).abs().max() < 2e-6 * expected[name].abs().max(), name


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_hand(form: str) -> None:
    """Sorted by expert, then by token; slots without a pair are rows of zeros behind those of their expert."""
    hidden_TH = make_hidden().view(-1, H)
    layer, routing = make_layer(None), route(FORMS[form])
    rows_RH, segments, _ = layer.dispatcher.dispatch(hidden_TH, routing)
    assert (list(segments.sizes), list(segments.experts)) == (SIZES[form], [0, 1, 2, 3])
    for expert, block in enumerate(rows_RH.split(SIZES[form])):
        tokens = [t for t, e in sorted(KEPT[form]) if e == expert]
        assert torch.equal(block[: len(tokens)], hidden_TH[tokens])
        assert not block[len(tokens) :].any()


def test_a_routing_group_of_one_sequence_has_its_own_room() -> None:
    """The default: room for ceil(2.5) = 3 of each sequence, 6 slots together; no expert has more than 3 of either."""
    capacity = {"factor": 1.0, "pad": True}
    layer = make_layer(capacity, group={"sequences": 1})
    routing = real_pairs(layer.router(make_hidden().view(-1, H), Tokens(num_sequences=B)))
    assert (pairs_of(routing), routing.pairs_per_expert) == (ALL_PAIRS, 6)
    assert_same(run(capacity, group={"sequences": 1}), run(None))


# Room for five.


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize("policy", DROPPED)
def test_one_pair_of_expert_1_is_dropped(policy: str, pad: bool) -> None:
    """Its token loses just what that expert would have given it, times its score; no other token notices."""
    token, capacity = DROPPED[policy], at_five(policy, pad=pad)
    routing = route(capacity)
    assert pairs_of(routing) == [pair for pair in ALL_PAIRS if pair != (token, 1)]
    assert (routing.load_E.tolist(), routing.dropped_E.tolist()) == ([5, 6, 4, 5], [0, 1, 0, 0])
    assert routing.pairs_per_expert == (5 if pad else None)
    results = run(capacity)
    assert_same(results, dense([pair for pair in ALL_PAIRS if pair != (token, 1)]))
    lost_TH = (run(None)["out"] - results["out"]).view(-1, H)
    row_H = expert_of(make_layer(None), 1, make_hidden().view(-1, H)[token])
    torch.testing.assert_close(lost_TH[token], SCORES_TE[token][1] * row_H.detach(), rtol=1e-12, atol=1e-12)
    lost_TH[token] = 0
    torch.testing.assert_close(lost_TH, torch.zeros_like(lost_TH), rtol=0, atol=1e-12)


def test_the_policies_drop_what_the_table_says() -> None:
    tokens = [t for t, e in ALL_PAIRS if e == 1]
    assert DROPPED["position"] == max(tokens)
    assert DROPPED["weight"] == min(tokens, key=lambda t: SCORES_TE[t][1])
    assert DROPPED["batch_priority"] == min(tokens, key=lambda t: max(SCORES_TE[t]))
    key = key_of(0, "moe", "capacity")
    assert DROPPED["random"] == min(tokens, key=lambda t: uniform(key, 0, torch.tensor([t * E + 1])).item())


@pytest.mark.parametrize("policy", DROPPED)
def test_the_rejected_pair_takes_the_only_free_place(policy: str) -> None:
    """Expert 2 has it. Tokens 8, 3 and 5 prefer it to all others but the two that they chose. Token 1, which the random
    policy rejects, has expert 2 already: it takes the place of token 5 at expert 0, and token 5 goes to expert 2."""
    token, capacity = DROPPED[policy], at_five(policy, overflow="reroute", pad=True)
    gone, new = ([(1, 1), (5, 0)], [(1, 0), (5, 2)]) if policy == "random" else ([(token, 1)], [(token, 2)])
    routing = route(capacity)
    pairs = [pair for pair in ALL_PAIRS if pair not in gone] + new
    assert sorted(pairs_of(routing)) == sorted(pairs)
    assert torch.bincount(routing.expert_P).tolist() == [5, 5, 5, 5]
    assert (routing.load_E.tolist(), routing.dropped_E.tolist()) == ([5, 6, 4, 5], [0, 0, 0, 0])
    assert_same(run(capacity), dense(pairs))


def test_the_rerouted_token_by_hand() -> None:
    """0.27 of expert 3, which it keeps, and 0.16 of expert 2 in place of 0.50 of expert 1."""
    layer, row_H = make_layer(None), make_hidden().view(-1, H)[8]
    expected_H = 0.27 * expert_of(layer, 3, row_H) + 0.16 * expert_of(layer, 2, row_H)
    out_TH = run(FORMS["rerouted at 5"])["out"].view(-1, H)
    torch.testing.assert_close(out_TH[8], expected_H.detach(), rtol=1e-12, atol=1e-12)


# On two ranks: a sequence and two experts on each.


def run_on_rank(capacity: dict[str, Any] | None) -> tuple[Results, list[int]]:
    layer = make_layer(capacity, process_group=dist.group.WORLD)
    own = slice(dist.get_rank(), dist.get_rank() + 1)
    hidden_BSH = make_hidden()[own].clone().requires_grad_()
    out_BSH = layer(hidden_BSH)
    with torch.no_grad():
        routing = layer.router(hidden_BSH[0], Tokens())
        _, segments, _ = layer.dispatcher.dispatch(hidden_BSH[0], routing)
    return results_of(layer, out_BSH, hidden_BSH, target_of(hidden_BSH)[own]), segments.sizes


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_give_the_same(form: str) -> None:
    """The room of 5 or 6 is that of both ranks together; a rank has at most 5 pairs of an expert, hence 5 slots."""
    (first, first_sizes), (second, second_sizes) = run_ranks(2, run_on_rank, FORMS[form])
    joined = {name: torch.cat([first[name], second[name]]) for name in ("out", "hidden")}
    joined["router"] = first["router"] + second["router"]
    experts = {name: value for part in (first, second) for name, value in part.items() if name.startswith("experts")}
    assert_same(joined | experts, run(FORMS[form]))
    # From rank 0 for experts 0 and 1, then from rank 1; on the other rank for experts 2 and 3.
    sizes = ([3, 3, 2, 3], [2, 2, 2, 3]) if form == "dropless" else ([5] * 4, [5] * 4)
    assert (list(first_sizes), list(second_sizes)) == sizes


# Ways to compute the segments. Each takes rows, sizes, and the weights of each expert.

Weights = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Experts:
    """The weights of each expert."""

    gate: Weights
    up: Weights
    down: Weights


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """0 where both are 0, so that it leaves blocks of zeros as they are."""
    return functional.silu(gate) * up


def one_expert_after_another(rows_RH: torch.Tensor, sizes: list[int], w: Experts) -> torch.Tensor:
    segments = zip(rows_RH.split(sizes), w.gate, w.up, w.down, strict=True)
    return torch.cat([swiglu(x @ gate, x @ up) @ down for x, gate, up, down in segments])


def equal_blocks(rows_RH: torch.Tensor, sizes: list[int], w: Experts) -> torch.Tensor:
    """One batched product, where all segments have the same size."""
    blocks = rows_RH.view(E, sizes[0], H)
    gate, up = blocks.bmm(torch.stack(w.gate)), blocks.bmm(torch.stack(w.up))
    return swiglu(gate, up).bmm(torch.stack(w.down)).view(-1, H)


def diagonal_rows(rows_RH: torch.Tensor, sizes: list[int], w: Experts) -> torch.Tensor:
    """diag(X0, ..., X3) [R, E H] times the weights one above the other [E H, F]."""
    diagonal = torch.block_diag(*rows_RH.split(sizes))
    active_RF = swiglu(diagonal @ torch.cat(w.gate), diagonal @ torch.cat(w.up))
    return torch.block_diag(*active_RF.split(sizes)) @ torch.cat(w.down)


def diagonal_rows_and_weights(rows_RH: torch.Tensor, sizes: list[int], w: Experts) -> torch.Tensor:
    """diag(X0, ..., X3) [R, E H] times diag(W0, ..., W3) [E H, E F] is diag(X0 W0, ..., X3 W3) [R, E F]."""
    diagonal = torch.block_diag(*rows_RH.split(sizes))
    active = swiglu(diagonal @ torch.block_diag(*w.gate), diagonal @ torch.block_diag(*w.up))
    return active @ torch.cat(w.down)


def all_experts_then_mask(rows_RH: torch.Tensor, sizes: list[int], w: Experts) -> torch.Tensor:
    """Every row times the weights side by side [H, E F]: E times the products, of which a mask keeps the diagonal blocks."""
    mask = torch.block_diag(*(torch.ones(size, F, dtype=rows_RH.dtype) for size in sizes))
    active = swiglu(rows_RH @ torch.cat(w.gate, dim=1), rows_RH @ torch.cat(w.up, dim=1))
    return (active * mask) @ torch.cat(w.down)


COMPUTE: dict[str, Callable[[torch.Tensor, list[int], Experts], torch.Tensor]] = {
    function.__name__: function
    for function in (
        one_expert_after_another,
        equal_blocks,
        diagonal_rows,
        diagonal_rows_and_weights,
        all_experts_then_mask,
    )
}


def weights_of(layer: MoELayer) -> Experts:
    views = [layer.experts.weights_of(e, lambda p: p) for e in range(E)]
    return Experts(*([view[name] for view in views] for name in ("w_gate", "w_up", "w_down")))


@pytest.mark.parametrize(
    ("form", "compute"),
    [(f, c) for f in FORMS for c in COMPUTE if (f, c) != ("dropless", "equal_blocks")],  # its segments are not equal
)
def test_block_sparse_products_are_the_segments_one_by_one(form: str, compute: str) -> None:
    """The layer with its experts written as one product of matrices, gradients included."""
    layer, hidden_BSH = make_layer(FORMS[form]), make_hidden().requires_grad_()
    hidden_TH = hidden_BSH.view(-1, H)
    routing = layer.router(hidden_TH, Tokens(num_sequences=B))
    rows_RH, segments, ticket = layer.dispatcher.dispatch(hidden_TH, routing)
    rows_RH = COMPUTE[compute](rows_RH, list(segments.sizes), weights_of(layer))
    out_BSH = layer.dispatcher.combine(rows_RH, ticket).view(B, S, H)
    assert_same(results_of(layer, out_BSH, hidden_BSH, target_of(hidden_BSH)), run(FORMS[form]))


needs_sparse = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies BSR by MKL on CPUs")


def dispatched(form: str) -> tuple[torch.Tensor, Experts, torch.Tensor]:
    """Rows, weights and the first product of the segments one by one."""
    layer = make_layer(FORMS[form]).requires_grad_(False)
    rows_RH, _, _ = layer.dispatcher.dispatch(make_hidden().view(-1, H), route(FORMS[form]))
    w = weights_of(layer)
    parts = zip(rows_RH.split(SIZES[form]), w.gate, strict=True)
    return rows_RH, w, torch.cat([x @ gate for x, gate in parts])


@needs_sparse
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("form", ["dropless", "padded to 6"])
def test_stored_blocks_of_weights_give_the_same(form: str) -> None:
    """diag(W) without its zeros: 8 blocks of 64 x 64 out of 32. torch multiplies such a matrix from the left only."""
    rows_RH, w, expected_RF = dispatched(form)
    diagonal = torch.block_diag(*(gate.T for gate in w.gate)).to_sparse_bsr((64, 64))
    assert (diagonal.shape, diagonal.values().shape) == ((E * F, E * H), (8, 64, 64))
    out = (diagonal @ torch.block_diag(*rows_RH.split(SIZES[form])).T).T
    blocks = torch.block_diag(*expected_RF.split(SIZES[form]))
    torch.testing.assert_close(out, blocks, rtol=1e-12, atol=1e-12)


@needs_sparse
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("block", "num_rows"), [(1, 20), (2, 22), (4, 28)])
def test_stored_blocks_of_rows_round_every_segment_up(block: int, num_rows: int) -> None:
    """diag(X) without its zeros, in square blocks: 5, 6, 4 and 5 rows become 6, 6, 4 and 6 in blocks of 2, 8, 8, 4, 8 of 4."""
    rows_RH, w, expected_RF = dispatched("dropless")
    padded = [functional.pad(x, (0, 0, 0, -len(x) % block)) for x in rows_RH.split(SIZES["dropless"])]
    diagonal = torch.block_diag(*padded).to_sparse_bsr((block, block))
    assert diagonal.shape == (num_rows, E * H)
    assert len(diagonal.values()) == (num_rows // block) * (H // block)
    out = (diagonal @ torch.cat(w.gate)).split([len(x) for x in padded])
    real_RF = torch.cat([rows[:size] for rows, size in zip(out, SIZES["dropless"], strict=True)])
    torch.testing.assert_close(real_RF, expected_RF, rtol=1e-12, atol=1e-12)


# The page.


def test_the_page_has_the_numbers_and_the_picture() -> None:
    page = (ROOT / "docs" / "dispatch.md").read_text()
    assert worked_example.shapes_table() in page
    for token, scores in enumerate(SCORES_TE):
        cells = [f"**{score:.2f}**" if (token, e) in ALL_PAIRS else f"{score:.2f}" for e, score in enumerate(scores)]
        assert f"| {token} | {' | '.join(cells)} |\n" in page
    picture = worked_example.draw()
    assert picture == worked_example.IMAGE.read_text()
    ElementTree.fromstring(picture)
