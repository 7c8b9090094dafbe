"""A checkpoint moves between the engines: the next losses, weights, moments and biases are the same."""

from pathlib import Path

import numpy as np
import pytest

from moe_dist.training.checkpoint import load_checkpoint, save_checkpoint
from tests.engines.test_megatron import FLOAT32, LAYOUTS, MEGATRON, SGD
from tests.support.distributed import run_ranks
from tests.support.equality import Tree, build_engine, changed, train_step, whole

pytest.importorskip("megatron.core")

STEPS = 4


def run(tree: Tree, folder: Path, first: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """On each rank: from the checkpoint of step `first`, if it is not 0, the next losses; at step STEPS it is saved.

    Also the whole state at that step.
    """
    engine, data = build_engine(tree)
    if first:
        assert load_checkpoint(folder / f"step_{first:08d}", engine) == first
    losses, state = [], {}
    for step in range(first, first + STEPS + (0 if first else STEPS)):
        if step == STEPS:
            state = whole(engine.state())
            if not first:
                save_checkpoint(folder, engine, engine.config, step)
        losses.append(train_step(engine, data, step).loss)
    return losses[-STEPS:], state


@pytest.mark.parametrize(
    ("writer", "reader", "recipe"),
    [
        ("2 ranks, expert 2", "native", FLOAT32),
        ("native", "2 ranks, tensor 2, expert 2", FLOAT32),
        ("2 ranks, pipeline 2, whole, recomputed", "2 ranks, slices 2", FLOAT32),
        ("2 ranks, interleaved, whole, recomputed", "2 ranks, tensor 2, expert 2, sequence", FLOAT32),
        ("native", "2 ranks, expert 2, whole, accumulated", changed(FLOAT32, SGD)),
    ],
)
def test_a_run_goes_on_in_another_engine(tmp_path: Path, writer: str, reader: str, recipe: Tree) -> None:
    results = []
    for name, first in ((writer, 0), (reader, STEPS)):
        num_ranks, changes = (1, {}) if name == "native" else LAYOUTS[name]
        tree = recipe if name == "native" else changed(recipe, changes, MEGATRON)
        of_ranks = run_ranks(num_ranks, run, tree, tmp_path, first)
        state = {key: value for _, of_rank in of_ranks for key, value in of_rank.items()}
        results.append((of_ranks[0][0], state))
    (expected, written), (losses, read) = results
    assert expected[0] - expected[-1] > 0.1, "the losses hardly move, so equality says little"
    assert np.allclose(losses, expected, rtol=0, atol=1e-4)
    assert read.keys() == written.keys()
    assert [key for key in written if not np.array_equal(read[key], written[key])] == []
