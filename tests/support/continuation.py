"""A run that goes on from a checkpoint under another engine or layout: what it reads, computes and leaves.

Shape letters: G sequences of the global batch, S sequence length.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moe_dist.training.checkpoint import load_checkpoint, save_checkpoint
from tests.support.distributed import run_ranks
from tests.support.equality import Tree, build_engine, changed, train_step, whole

State = dict[str, npt.NDArray[Any]]
"""Weights, moments, balancer state and the number of updates by global name."""


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run, over all ranks."""

    losses: list[float]
    samples: list[npt.NDArray[np.int64]]
    """Of each step the tokens [G, S] that it read, in the order of the global batch."""
    before: State
    after: State
    checkpoint: Path
    """Of the state after."""


def go_on(num_ranks: int, tree: Tree, checkpoint: Path | None, steps: range, folder: Path) -> Stretch:
    """Train these steps, after a checkpoint if there is one, and leave the next one in the folder."""
    losses, of_data_rank, befores, afters, written = zip(
        *run_ranks(num_ranks, _go_on, tree, checkpoint, steps, folder), strict=True
    )
    assert all(found == losses[0] for found in losses)
    of_rank = dict(of_data_rank)  # ranks that hold the same tokens count once
    samples = [np.concatenate(parts) for parts in zip(*(of_rank[rank] for rank in sorted(of_rank)), strict=True)]
    return Stretch(losses[0], samples, _gathered(befores), _gathered(afters), written[0])


def check_chain(recipe: Tree, links: list[tuple[int, Tree]], length: int, folder: Path) -> None:
    """A run goes on as if undisturbed over stretches of `length` steps, each on its own ranks with its own changes."""
    undisturbed, checkpoint = go_on(1, recipe, None, range(length * len(links)), folder / "whole"), None
    assert abs(undisturbed.losses[0] - undisturbed.losses[-1]) > 0.1
    stretches = []
    for place, (num_ranks, changes) in enumerate(links):
        steps = range(place * length, (place + 1) * length)
        stretch = go_on(num_ranks, changed(recipe, changes), checkpoint, steps, folder / str(place))
        assert stretch.losses == pytest.approx(undisturbed.losses[steps.start : steps.stop], abs=1e-4)
        assert np.array_equal(stretch.samples, undisturbed.samples[steps.start : steps.stop])
        stretches.append(stretch)
        checkpoint = stretch.checkpoint
    for written, read in itertools.pairwise(stretches):
        assert differing(read.before, written.after) == []


def differing(actual: State, expected: State) -> list[str]:
    """Names of what is not the same to the last bit."""
    assert actual.keys() == expected.keys()
    return [name for name, value in expected.items() if not np.array_equal(actual[name], value)]


def _go_on(tree: Tree, checkpoint: Path | None, steps: range, folder: Path) -> tuple[Any, ...]:
    """On each rank."""
    engine, data = build_engine(tree)
    if checkpoint is not None:
        assert load_checkpoint(checkpoint, engine) == steps.start
    before = whole(engine.state())
    batches = [data.micro_batches(step, engine.data_rank, engine.layout) for step in steps]
    samples = [np.concatenate([batch.input_BS.numpy() for batch in of_step]) for of_step in batches]
    losses = [train_step(engine, data, step).loss for step in steps]
    after = whole(engine.state())
    return (
        losses,
        (engine.data_rank, samples),
        before,
        after,
        save_checkpoint(folder, engine, engine.config, steps.stop),
    )


def _gathered(states: tuple[State, ...]) -> State:
    return {name: value for state in states for name, value in state.items()}
