"""`moe-dist verify` without its command: what is compared, what explains a difference, and that faults are seen.

The planted faults are those of tests/engines/test_planted_faults.py, here in float32 under AdamW, which hides the size of a
gradient from the losses.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_dist.config import Config, build_config, layout_of
from moe_dist.config.verification import Case, Row
from moe_dist.engines.batch import IGNORED
from moe_dist.training.comparison import Flip, Verdict, first_flip, judge
from moe_dist.training.tracing import Routes, Trace
from moe_dist.training.verification import RaggedTargets, replayed_steps, run_reference, verify
from tests.engines.test_equality import FLOAT32, FULL, LAYOUTS
from tests.engines.test_planted_faults import PLANTS
from tests.support.distributed import run_ranks
from tests.support.equality import BASE, SyntheticData, Tree, changed, trace

TREE = changed(BASE, FLOAT32)


@cache
def one_rank() -> Trace:
    return trace(TREE, 1, 3, (0,))


def judged(run: Trace) -> Verdict:
    return judge(run, [], one_rank(), "float32")


# Faults.


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("experts scaled by 1/EP", "step 0: gradient of layers.1.experts."),
        ("expert reduction skipped", "step 0: gradient of layers.1.experts."),
        ("dense reduced twice", "step 0: gradient of embedding.weight "),
        ("auxiliary loss counted per rank", "step 0: gradient of embedding.weight "),
        ("clip norm counts experts EP times", "step 0: gradient norm "),
    ],
)
def test_a_planted_fault_is_seen_under_adamw(name: str, says: str) -> None:
    plant = PLANTS[name]
    num_ranks, changes = LAYOUTS[plant.layout]
    assert judged(trace(changed(TREE, changes), num_ranks, 3, (0,))).failures == []
    verdict = judged(trace(changed(TREE, changes), num_ranks, 3, (0,), plant.fault))
    assert any(text.startswith(says) for text in verdict.failures), verdict.failures


# Flips. A run is the reference again, changed by hand.


def flipped(margin: float, step: int = 0, loss: float = 1e-3, gradient: float = 0.1) -> tuple[Trace, Trace]:
    """A run in which a token takes its next best expert in the first MoE layer, and its reference with such a margin."""
    run, reference = copy.deepcopy(one_rank()), copy.deepcopy(one_rank())
    layer = min(reference.routes[step])
    routes = reference.routes[step][layer]
    assert isinstance(routes, Routes)
    token = int(routes.chosen_T.any(axis=1).nonzero()[0][5])
    *_, last, following = routes.best_TJ[token].tolist()
    routes.score_TJ[token, -1] = routes.score_TJ[token, -2] - margin
    chosen = np.unpackbits(run.routes[step][layer].chosen_T[token])
    chosen[[last, following]] = 0, 1
    run.routes[step][layer].chosen_T[token] = np.packbits(chosen)
    run.loads[step][0, last] -= 1
    run.loads[step][0, following] += 1
    run.losses[step] += loss
    for of_step in run.gradients.values():
        of_step["embedding.weight"] *= 1 + gradient
    return run, reference


def the_flip(run: Trace, reference: Trace) -> Flip:
    flip = first_flip(run, reference)
    assert flip is not None
    return flip


def test_a_near_flip_is_traced_and_named() -> None:
    run, reference = flipped(3e-7)
    clean = copy.deepcopy(one_rank()).part(2, 3)  # a step from the reference's state in which nothing flips
    verdict = judge(run, [clean], reference, "float32")
    assert verdict.failures == []
    (flip,) = verdict.flips
    place = reference.routes[0][1].index_T.tolist().index(flip.token)
    *_, last, following = reference.routes[0][1].best_TJ[place].tolist()
    assert (flip.step, flip.layer, flip.expected, flip.actual, flip.count) == (0, 1, (last,), (following,), 1)
    assert flip.margin == pytest.approx(3e-7, abs=1e-7)
    assert str(flip).startswith(
        f"step 0, layer 1, token {flip.token}: expert {following} instead of expert {last}, margin "
    )


def test_a_wide_flip_explains_nothing() -> None:
    run, reference = flipped(3e-5)
    failures = judge(run, [], reference, "float32").failures
    assert [text for text in failures if text.startswith("step 0: loads")]
    assert [text for text in failures if text.startswith("step 0: gradient of embedding.weight")]
    assert all("; first routing flip: step 0, layer 1, token " in text for text in failures[:3])


def test_after_steps_of_its_own_a_drifted_flip_explains_loads_but_not_losses() -> None:
    run, reference = flipped(3e-5, step=1, loss=0.0, gradient=0.0)
    verdict = judge(run, [], reference, "float32")
    assert verdict.failures == []
    assert [flip.step for flip in verdict.flips] == [1]
    run, reference = flipped(3e-5, step=1, loss=1e-3, gradient=0.0)
    (failure,) = judge(run, [], reference, "float32").failures
    assert failure.startswith("step 1: loss ")
    run, reference = flipped(3e-4, step=1, loss=0.0, gradient=0.0)
    (failure,) = judge(run, [], reference, "float32").failures
    assert failure.startswith("step 1: loads ")


def test_a_flip_explains_nothing_before_it() -> None:
    run, reference = flipped(3e-7, step=2, gradient=0.0)
    run.losses[1] += 1e-3
    (failure,) = judge(run, [], reference, "float32").failures
    assert failure.startswith("step 1: loss ")
    assert "flip" not in failure


def test_no_flip_explains_other_weights_or_ranks() -> None:
    run, reference = flipped(3e-7)
    run.weights = {"norm.weight": np.ones(2, np.float32)}
    reference.weights = {"norm.weight": np.array([1, 1 + 1e-6], np.float32)}
    failures = judge(run, [], reference, "float32").failures
    assert failures[0].startswith("initial weight norm.weight is off by 9.5e-07, where its norm is 1.4e+00")


def test_some_gradients_must_be_compared_without_a_flip() -> None:
    failures = judge(*flipped(3e-7)[:1], [], flipped(3e-7)[1], "float32").failures
    assert failures == ["every step whose gradients are compared has a routing flip; use another training.seed"]


def test_a_flip_to_an_expert_that_is_not_next_in_line_is_not_near() -> None:
    run, reference = flipped(3e-7)
    routes = reference.routes[0][1]
    routes.best_TJ[routes.index_T.tolist().index(the_flip(run, reference).token), -1] = 99
    assert the_flip(run, reference).margin == np.inf


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda run: run.losses.__setitem__(0, run.losses[0] + 2e-6), "step 0: loss "),
        (lambda run: run.losses.__setitem__(2, run.losses[2] + 2e-4), "step 2: loss "),
        (lambda run: run.losses.__setitem__(2, float("nan")), "step 2: loss nan"),
        (lambda run: run.grad_norms.__setitem__(0, run.grad_norms[0] * (1 + 2e-5)), "step 0: gradient norm "),
        (lambda run: run.drops[1].__setitem__((0, 3), 1), "step 1: drops "),
        (lambda run: run.biases_after[0][1].__setitem__(2, 1.0), "step 0: bias of layer 1"),
        (lambda run: run.gradients[0]["norm.weight"].__imul__(1 + 2e-5), "step 0: gradient of norm.weight is off by "),
    ],
)
def test_an_honest_larger_difference_fails(change: Any, failure: str) -> None:
    run = copy.deepcopy(one_rank())
    assert judged(run).failures == []
    change(run)
    (found,) = judged(run).failures
    assert found.startswith(failure)


# From end to end, on ranks of this process.

STEPS = 4
SMALL = changed(TREE, {"training": {"steps": STEPS, "checkpoint": {"keep": 2}}})


def reference_alone(states: Path) -> Trace:
    config = build_config(SMALL, 1)
    return run_reference(config, torch.device("cpu"), SyntheticData(config), states)  # type: ignore[arg-type]


def verified(cases: list[Case], reference: Trace, states: Path) -> list[tuple[str, str, Verdict | None]]:
    data = SyntheticData(build_config(SMALL, 1))
    mine = reference if dist.get_rank() == 0 else None
    outcomes = verify(cases, mine, torch.device("cpu"), data, states, lambda case: None)  # type: ignore[arg-type]
    return [(str(outcome.case.row), outcome.reason, outcome.verdict) for outcome in outcomes]


def case(layout: str, *changes: Tree) -> Case:
    return Case(Row("native", layout, "", ()), build_config(changed(SMALL, *changes), 2))


def test_rows_are_compared_from_the_states_of_the_reference_too(tmp_path: Path) -> None:
    (reference,) = run_ranks(1, reference_alone, tmp_path)
    assert sorted(reference.gradients) == [0, *replayed_steps(STEPS)] == [0, 2, 3]
    not_run = Case(Row("deepspeed", "data", "zero_stage=1", ()), None, "not installed")
    cases = [case("expert=2", {"parallel": {"expert": 2}}), not_run, case("data", FULL)]
    first, second = run_ranks(2, verified, cases, reference, tmp_path)
    assert [found[:2] for found in first] == [
        ("native expert=2", ""),
        ("deepspeed data, zero_stage=1", "not installed"),
        ("native data", ""),
    ]
    assert all(verdict is None for *_, verdict in second)
    for *_, verdict in (first[0], first[2]):
        assert verdict is not None
        assert verdict.failures == []
        compared = {(difference.kind, difference.step) for difference in verdict.differences}
        assert {step for kind, step in compared if kind == "gradient"} == {0, 2, 3}
        assert {kind for kind, _ in compared} >= {"weight", "gradient", "loss", "norm", "loads", "drops", "bias"}
        names = {difference.name for difference in verdict.differences if difference.kind == "gradient"}
        assert names == set(reference.weights)  # every parameter


# Data.


def test_targets_are_ragged_and_do_not_depend_on_the_layout() -> None:
    config = build_config(BASE)
    data: Config | Any = RaggedTargets(SyntheticData(config), config)  # type: ignore[arg-type]
    finest = layout_of(build_config(changed(BASE, {"training": {"micro_batch_size": 1}}), 4), 4)
    for step in range(3):
        apart = [batch for rank in range(4) for batch in data.micro_batches(step, rank, finest)]
        (together,) = data.micro_batches(step, 0, layout_of(config))
        assert torch.equal(torch.cat([batch.target_BS for batch in apart]), together.target_BS)
        counts = [batch.num_targets() for batch in apart]
        assert counts[4:6] == [0, 0]  # all of the third of four ranks
        assert len(set(counts)) >= 3
        assert (together.target_BS == IGNORED).any()


def test_replayed_steps() -> None:
    assert [replayed_steps(steps) for steps in (2, 3, 20)] == [(1,), (1, 2), (10, 19)]
