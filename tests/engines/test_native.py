"""One optimiser step and an evaluation of the native engine: what they change, and what they leave alone."""

import math
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from moe_dist.config import build_config
from moe_dist.engines.batch import IGNORED
from moe_dist.engines.engine import resolve_precision
from moe_dist.engines.native import NativeEngine
from moe_dist.engines.optimizer import build_optimizer, local_parameters
from moe_dist.engines.state import get_updates
from moe_dist.model import Transformer
from tests.engines.test_equality import LAYOUTS, RECIPES, reference
from tests.support.distributed import run_ranks
from tests.support.equality import (
    BASE,
    VOCABULARY,
    SyntheticData,
    Tree,
    build_engine,
    changed,
    trace,
    train_step,
    whole,
)


def on_layout(name: str, recipe: str = "adamw") -> tuple[int, Tree]:
    num_ranks, changes = LAYOUTS[name]
    return num_ranks, changed(RECIPES[recipe], changes)


def snapshot(engine: NativeEngine) -> dict[str, np.ndarray]:
    """Weights, moments and biases of this rank by global name, and the number of updates; collective."""
    return whole(engine.state() | {"updates": get_updates(engine.optimizer)})


def differing(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(actual[name], value)]


def counters(engine: NativeEngine) -> int:
    """Sum of all counts of the current step."""
    return sum(
        int(b.sum()) for r in engine.routers for n, b in r.balance.named_buffers() if n not in r.balance.state_dict()
    )


def spoil(value: float) -> Any:
    """A forward hook after which nothing is finite."""
    return lambda module, args, output: output * value


# Steps that are skipped.


def with_a_skipped_step(tree: Tree) -> tuple[list[float], list[str], bool, float, int]:
    """Two good steps, one whose loss is not finite on the last rank, the same again without the fault."""
    engine, data = build_engine(tree)
    losses = [train_step(engine, data, step).loss for step in range(2)]
    before = snapshot(engine)
    is_last = engine.data_rank == engine.layout.data - 1
    handle = engine.model.norm.register_forward_hook(spoil(math.nan)) if is_last else None
    result = train_step(engine, data, 2)
    if handle:
        handle.remove()
    changes, left = differing(snapshot(engine), before), counters(engine)
    losses += [train_step(engine, data, step).loss for step in (2, 3)]
    return losses, changes, result.skipped, result.loss, left


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("2 ranks, expert 2, accumulated", "adamw"),
        ("2 ranks, data, sharded", "sgd"),
        ("2 ranks, expert 2, recomputed", "sgd, padded capacity"),
        ("4 ranks, expert 2", "adamw"),
    ],
)
def test_a_step_without_a_finite_loss_did_not_happen(layout: str, recipe: str) -> None:
    """Though only one rank saw it: no weight, moment or bias of any rank changes, and the run goes on as if without."""
    num_ranks, tree = on_layout(layout, recipe)
    expected = trace(tree, num_ranks, 4).losses
    for losses, changes, skipped, loss, left in run_ranks(num_ranks, with_a_skipped_step, tree):
        assert skipped
        assert not math.isfinite(loss)
        assert changes == []
        assert left == 0
        assert losses == expected


def with_an_infinite_gradient() -> tuple[float, float, bool, list[str]]:
    engine, data = build_engine(BASE)
    before = snapshot(engine)
    engine.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    result = train_step(engine, data, 0)
    return result.loss, result.grad_norm, result.skipped, differing(snapshot(engine), before)


def test_a_step_without_a_finite_gradient_did_not_happen() -> None:
    ((loss, norm, skipped, changes),) = run_ranks(1, with_an_infinite_gradient)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert skipped
    assert changes == []


def blame(tree: Tree, weight: str, only_rank: int | None) -> str:
    """What is said of a model in which this weight is NaN on one or all ranks."""
    engine, data = build_engine(tree)
    batches = data.micro_batches(0, engine.data_rank, engine.layout)
    if only_rank in (None, engine.data_rank):
        engine.model.get_parameter(weight).data.fill_(math.nan)
    return engine.first_nonfinite(batches)


@pytest.mark.parametrize(
    ("weight", "only_rank", "expected"),
    [
        ("layers.1.moe.shared.w_down.weight", None, "the output of layers.1.moe"),
        ("layers.1.moe.experts.w_down", 1, "the output of layers.1.moe"),
        ("layers.2.moe.router.weight", 0, "the output of layers.2.moe"),
        ("layers.0.ffn.w_up.weight", 1, "the output of layers.0.ffn"),
        ("layers.2.attention.w_key.weight", None, "the output of layers.2.attention"),
        ("embedding.weight", 0, "the output of embedding"),
        ("norm.weight", 1, "the output of norm"),
    ],
)
def test_the_first_part_that_is_not_finite_is_named(weight: str, only_rank: int | None, expected: str) -> None:
    """Alike on all ranks, wherever it happened. Weights are whole on each rank without FSDP: experts over both ranks."""
    num_ranks, tree = on_layout("2 ranks, expert 2")
    assert run_ranks(num_ranks, blame, tree, weight, only_rank) == [expected] * num_ranks


def blame_of_a_healthy_model(tree: Tree) -> tuple[str, int]:
    engine, data = build_engine(tree)
    batches = data.micro_batches(0, engine.data_rank, engine.layout)
    return engine.first_nonfinite(batches), counters(engine)


def test_a_healthy_forward_blames_the_gradient_and_counts_nothing() -> None:
    num_ranks, tree = on_layout("2 ranks, data, sharded")
    said = run_ranks(num_ranks, blame_of_a_healthy_model, tree)
    assert said == [("a gradient, while all outputs are finite", 0)] * num_ranks


# Evaluation.


def with_evaluation(tree: Tree) -> tuple[list[float], float, int, np.ndarray, list[str], int, list[int]]:
    """A step, an evaluation, a step."""
    engine, data = build_engine(tree)
    losses = [train_step(engine, data, 0).loss]
    before = snapshot(engine)
    rows = [sum(recorder.counts.computed) for recorder in engine.recorders.values()]
    loss_sum, num_targets, load_NE = engine.evaluate(data.micro_batches(100, engine.data_rank, engine.layout))
    changes, left = differing(snapshot(engine), before), counters(engine)
    more_rows = [
        sum(recorder.counts.computed) - count for recorder, count in zip(engine.recorders.values(), rows, strict=True)
    ]
    losses.append(train_step(engine, data, 1).loss)
    return losses, loss_sum, num_targets, load_NE.numpy(), changes, left, more_rows


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("1 rank, accumulated and recomputed", "adamw"),
        ("2 ranks, data, sharded, accumulated", "adamw, padded capacity"),
        ("2 ranks, data", "adamw"),
        ("2 ranks, expert 2, unequal", "adamw, padded capacity"),
        ("4 ranks, expert 2", "adamw"),
    ],
)
def test_evaluation_is_the_same_on_every_layout_and_leaves_no_trace(layout: str, recipe: str) -> None:
    ((_, loss_sum, num_targets, load_NE, *_),) = run_ranks(1, with_evaluation, RECIPES[recipe])
    num_ranks, tree = on_layout(layout, recipe)
    batch = SyntheticData(build_config(tree, num_ranks)).batch(100, range(8))
    assert num_targets == batch.num_targets()
    assert load_NE.sum(1).tolist() == [2 * batch.num_tokens()] * 2
    expected = trace(tree, num_ranks, 2).losses
    for result in run_ranks(num_ranks, with_evaluation, tree):
        losses, own_loss_sum, own_num_targets, own_load_NE, changes, left, rows = result
        assert own_loss_sum == pytest.approx(loss_sum, rel=1e-12)
        assert own_num_targets == num_targets
        assert np.array_equal(own_load_NE, load_NE)
        assert (changes, left, rows) == ([], 0, [0, 0])
        assert losses == expected


# Gradient norm and update.


@pytest.mark.parametrize(
    "layout", ["1 rank", "2 ranks, expert 2, unequal", "2 ranks, data, sharded", "4 ranks, expert 2"]
)
def test_the_norm_counts_every_value_once(layout: str) -> None:
    num_ranks, tree = on_layout(layout)
    result = trace(tree, num_ranks, 1, (0,))
    squares = sum(float((gradient**2).sum()) for gradient in result.gradients[0].values())
    assert result.grad_norms[0] == pytest.approx(math.sqrt(squares), rel=1e-12)


def one_update(tree: Tree) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    engine, data = build_engine(tree)
    before = snapshot(engine)
    train_step(engine, data, 0)
    return before, snapshot(engine)


@pytest.mark.parametrize(
    ("layout", "max_norm"),
    [
        ("1 rank", 1e3),
        ("1 rank", None),
        ("2 ranks, data, sharded", 0.1),
        ("4 ranks, expert 2", 0.1),
        ("4 ranks, expert 2", None),
    ],
)
def test_gradients_are_scaled_down_to_the_largest_norm(layout: str, max_norm: float | None) -> None:
    optimizer = {"max_grad_norm": max_norm, "learning_rate": 0.5, "weight_decay": 0.0}
    num_ranks, tree = on_layout(layout, "sgd")
    tree = changed(tree, {"training": {"optimizer": optimizer}})
    result = trace(tree, num_ranks, 1, (0,))
    scale = 1.0 if max_norm is None else min(1.0, max_norm / result.grad_norms[0])
    assert (scale < 1) == (max_norm == 0.1)
    for before, after in run_ranks(num_ranks, one_update, tree):
        for name, gradient in result.gradients[0].items():
            if f"model.{name}" in before:  # experts of this rank
                step = before[f"model.{name}"] - after[f"model.{name}"]
                np.testing.assert_allclose(step, 0.5 * scale * gradient, rtol=1e-9, atol=1e-14, err_msg=name)


def test_only_matrices_decay() -> None:
    config = build_config(changed(BASE, {"training": {"optimizer": {"weight_decay": 0.25}}}))
    parameters = local_parameters(Transformer(config, VOCABULARY))
    optimizer = build_optimizer(parameters, config.training.optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        assert decay[id(p.local)] == (0.0 if "norm" in p.name else 0.25), p.name
    assert len(decay) == len(parameters)


# Batches in which there is little.


class OnlyPaddingAtTheEnd(SyntheticData):
    """The second half of each global batch is padding."""

    def _sequence(self, step: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, target, padding = super()._sequence(step, number)
        is_empty = number >= 4
        return tokens, torch.where(torch.tensor(is_empty), IGNORED, target), padding | is_empty


class NoTargets(SyntheticData):
    """Nothing counts; only auxiliary losses have gradients."""

    def _sequence(self, step: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, target, padding = super()._sequence(step, number)
        return tokens, torch.full_like(target, IGNORED), padding


def losses_on(tree: Tree, data: type[SyntheticData]) -> list[tuple[float, float, bool]]:
    engine, _ = build_engine(tree)
    results = [train_step(engine, data(engine.config), step) for step in range(3)]
    return [(result.loss, result.grad_norm, result.skipped) for result in results]


@cache
def losses_on_one_rank(recipe: str, data: type[SyntheticData]) -> list[tuple[float, float, bool]]:
    return run_ranks(1, losses_on, RECIPES[recipe], data)[0]


@pytest.mark.parametrize("data", [OnlyPaddingAtTheEnd, NoTargets])
@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("2 ranks, expert 2", "adamw"),
        ("2 ranks, data, sharded", "sgd"),
        ("2 ranks, expert 2, unequal", "adamw, padded capacity"),
        ("4 ranks, expert 4", "adamw"),
    ],
)
def test_ranks_with_nothing_to_learn_from(layout: str, recipe: str, data: type[SyntheticData]) -> None:
    num_ranks, tree = on_layout(layout, recipe)
    expected = losses_on_one_rank(recipe, data)
    for results in run_ranks(num_ranks, losses_on, tree, data):
        for (loss, norm, skipped), (right_loss, right_norm, _) in zip(results, expected, strict=True):
            assert loss == pytest.approx(right_loss, abs=1e-9)
            assert norm == pytest.approx(right_norm, rel=1e-8)
            assert not skipped
            assert norm > 0
            assert (loss == 0) == (data is NoTargets)


# Precision.


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_is_what_is_fast(is_fast: bool) -> None:
    cpu = torch.device("cpu")
    with patch("torch.cpu._is_avx512_bf16_supported", return_value=is_fast):
        assert resolve_precision("auto", cpu) == ("bfloat16" if is_fast else "float32")
        for precision in ("float32", "float64", "bfloat16"):
            assert resolve_precision(precision, cpu) == precision


def formats(tree: Tree) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype], list[float], set[torch.dtype]]:
    """Formats of weights, moments and biases, the losses of three steps, and the formats that experts compute in."""
    engine, data = build_engine(tree)
    inside: set[torch.dtype] = set()

    def look(module: nn.Module, args: tuple[torch.Tensor, object]) -> None:
        inside.add(args[0].dtype)

    for layer in engine.model.moe_layers.values():
        layer.experts.register_forward_pre_hook(look)
    losses = [train_step(engine, data, step).loss for step in range(3)]
    moments = {
        value.dtype for state in engine.optimizer.state.values() for key, value in state.items() if key != "step"
    }
    weights = {parameter.dtype for parameter in engine.model.parameters()}
    return weights, moments, {router.balance.bias_E.dtype for router in engine.routers}, losses, inside


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("bfloat16", "1 rank"),
        ("bfloat16", "2 ranks, expert 2"),
        ("bfloat16", "2 ranks, data, sharded"),
        ("float32", "2 ranks, data, sharded"),
        ("float64", "2 ranks, data, sharded"),
    ],
)
def test_formats(precision: str, layout: str) -> None:
    """bfloat16: matrices are multiplied in it, weights and moments are kept in float32. Biases are always float32."""
    num_ranks, tree = on_layout(layout)
    expected = reference("adamw").losses[:3]
    kept = torch.float64 if precision == "float64" else torch.float32
    tree = changed(tree, {"training": {"precision": precision}})
    for weights, moments, biases, losses, inside in run_ranks(num_ranks, formats, tree):
        assert (weights, moments, biases) == ({kept}, {kept}, {torch.float32})
        assert inside == {getattr(torch, precision)}
        # In bfloat16 some tokens are routed to other experts.
        assert losses == pytest.approx(expected, rel={"bfloat16": 0.1, "float32": 1e-5, "float64": 1e-12}[precision])
