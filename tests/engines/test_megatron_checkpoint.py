"""A checkpoint moves between the engines: the next samples and losses, weights, moments and biases are the same."""

from pathlib import Path

import numpy as np
import pytest

from tests.engines.test_megatron import FLOAT32, LAYOUTS, MEGATRON, SGD
from tests.support.continuation import differing, go_on
from tests.support.equality import Tree, changed

pytest.importorskip("megatron.core")

FIRST, NEXT = range(4), range(4, 14)
DEEPSPEED = {"engine": {"name": "deepspeed", "sharding": "full", "zero_stage": 1}}


def on(name: str) -> tuple[int, Tree]:
    """Ranks and changes of a layout by its name."""
    if name == "native":
        return 1, {}
    if name == "deepspeed, 2 ranks, expert 2":
        pytest.importorskip("deepspeed")
        return 2, changed(DEEPSPEED, {"parallel": {"expert": 2}})
    num_ranks, changes = LAYOUTS[name]
    return num_ranks, changed(changes, MEGATRON)


@pytest.mark.parametrize(
    ("writer", "readers", "recipe"),
    [
        ("2 ranks, expert 2", ["native", "deepspeed, 2 ranks, expert 2"], FLOAT32),
        ("native", ["2 ranks, tensor 2, expert 2"], FLOAT32),
        ("2 ranks, pipeline 2, whole, recomputed", ["2 ranks, slices 2"], FLOAT32),
        ("2 ranks, interleaved, whole, recomputed", ["2 ranks, tensor 2, expert 2, sequence"], FLOAT32),
        ("native", ["2 ranks, expert 2, whole, accumulated"], changed(FLOAT32, SGD)),
        ("deepspeed, 2 ranks, expert 2", ["2 ranks, expert 2"], FLOAT32),
    ],
)
def test_a_run_goes_on_in_another_engine(tmp_path: Path, writer: str, readers: list[str], recipe: Tree) -> None:
    num_ranks, changes = on(writer)
    tree = changed(recipe, changes)
    written = go_on(num_ranks, tree, None, FIRST, tmp_path / "first")
    undisturbed = go_on(num_ranks, tree, None, range(NEXT.stop), tmp_path / "whole")
    expected, samples = undisturbed.losses[NEXT.start :], undisturbed.samples[NEXT.start :]
    assert max(expected) - min(expected) > 0.1, "the losses hardly move, so equality says little"
    kinds = {".".join(name.split(".")[:2]) for name in written.after if name.startswith(("optimizer", "balance"))}
    moments = ["momentum_buffer"] if "momentum" in str(recipe) else ["exp_avg", "exp_avg_sq"]
    assert kinds == {*(f"optimizer.{name}" for name in (*moments, "updates")), *(f"balance.{n}" for n in (1, 2, 3))}
    for reader in readers:
        num_ranks, changes = on(reader)
        read = go_on(num_ranks, changed(recipe, changes), written.checkpoint, NEXT, tmp_path / "next")
        assert np.array_equal(read.samples, samples)
        assert np.abs(np.subtract(read.losses, expected)).max() < 1e-4
        assert differing(read.before, written.after) == []
        assert np.abs(read.losses[-1] - written.losses[-1]) > 0.1
