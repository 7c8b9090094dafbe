"""Train a tiny model on any layout of ranks, and compare what came out: the tests of "any layout, the same training".

The data are made so that what a layout can get wrong shows: every sequence has another number of targets, two have
none (so in the finest layout there are micro-batches without any, and on four ranks a rank without any), and some end in
padding. They are easy: each token has one successor, so that the loss falls fast.

Shape letters: B sequences of a micro-batch, S sequence length.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_dist.config import Config, Layout, build_config, layout_of
from moe_dist.engines import registry
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.engine import Engine
from moe_dist.training.comparison import Bounds, compare
from moe_dist.training.tracing import Trace, gather, record, train_step, whole
from tests.support.distributed import run_ranks

__all__ = ["Trace", "train_step", "whole"]
"""Of the package, for the tests."""

Tree = dict[str, Any]
VOCABULARY = 13
"""Odd, so that FSDP's shards of the embedding are unequal."""

BASE: Tree = {
    "model": {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "num_kv_heads": 1,
        "ffn_size": 20,
        "num_dense_layers": 1,
        "qk_norm": "head",
        "init_std": 0.2,
    },
    "moe": {"num_experts": 8, "ffn_size": 12, "num_shared_experts": 1, "shared_gate": True},
    "routing": {
        "score": "sigmoid",
        "top_k": 2,
        "renormalise": True,
        "init_std": 0.5,
        "bias": {"rule": "sign", "rate": 0.01},
        "losses": {"load_balance": {"coefficient": 0.02, "scope": "sequence"}, "z": {"coefficient": 0.001}},
    },
    "training": {
        "global_batch_size": 8,
        "sequence_length": 16,
        "optimizer": {"name": "adamw", "learning_rate": 0.03},
        "schedule": {"name": "constant"},
        "precision": "float64",
    },
    "engine": {"sharding": "replicate"},
}
"""Everything that a layout can get wrong is on."""

RECOMPUTED: Tree = {"model": {"activation_checkpointing": "all"}}
PADDED: Tree = {"routing": {"capacity": {"factor": 0.9, "policy": "weight", "pad": True}}}


def micro_batches_of(sequences: int) -> Tree:
    """So many sequences of a rank at a time, and the gradients accumulated."""
    return {"training": {"micro_batch_size": sequences}}


def expanded(cases: dict[str, dict[str, int]]) -> list[tuple[str, str, int]]:
    """For pytest.mark.parametrize: of each recipe the layouts and the number of steps."""
    return [(recipe, layout, steps) for recipe, layouts in cases.items() for layout, steps in layouts.items()]


def changed(tree: Tree, *changes: Tree) -> Tree:
    """A copy of a config tree with other values; sections are merged."""
    result = dict(tree)
    for change in changes:
        for key, value in change.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = changed(result[key], value) if both else value
    return result


class SyntheticData:
    """The micro-batches of moe_dist.training.data.Data; sequence i of step s is a function of (seed, s, i) alone."""

    vocab_size = VOCABULARY

    def __init__(self, config: Config) -> None:
        self.config = config

    def micro_batches(self, step: int, data_rank: int, layout: Layout) -> list[Batch]:
        """The rank's contiguous share of the global batch."""
        share, size = self.config.training.global_batch_size // layout.data, layout.micro_batch_size
        first = data_rank * share
        return [self.batch(step, range(start, start + size)) for start in range(first, first + share, size)]

    def batch(self, step: int, sequences: range) -> Batch:
        """These sequences of a step."""
        input_BS, target_BS, padding_BS = map(
            torch.stack, zip(*(self._sequence(step, i) for i in sequences), strict=True)
        )
        # Without padding there is no mask: the layouts mix both forms.
        padding = padding_BS if padding_BS.any() else None
        return Batch(input_BS, target_BS, padding, None, torch.tensor(list(sequences)))

    def _sequence(self, step: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input, target and padding [S]."""
        length = self.config.training.sequence_length
        generator = np.random.Generator(np.random.PCG64([self.config.training.seed, step, number]))
        tokens = [int(generator.integers(VOCABULARY))]
        for _ in range(length):
            # Not a map with fixed points: in a row of equal tokens every score is the same, and noise decides who is dropped.
            tokens.append((tokens[-1] + 5) % VOCABULARY)
        is_target = generator.random(length) < generator.random()
        padding = np.arange(length) >= (length - generator.integers(1, length // 2) if number in (1, 6) else length)
        if number in (4, 5):
            is_target[:] = False
        target = np.where(is_target & ~padding, tokens[1:], IGNORED)
        return torch.tensor(tokens[:-1]), torch.from_numpy(target), torch.from_numpy(padding)


Fault = Callable[[], AbstractContextManager[object]]


def trace(
    tree: Tree, num_ranks: int = 1, num_steps: int = 20, gradients_at: tuple[int, ...] = (), fault: Fault = nullcontext
) -> Trace:
    """Train on `num_ranks` processes.

    Args:
        gradients_at: steps whose gradients are kept.
        fault: a context (module level) that each rank trains in.
    """
    found = run_ranks(num_ranks, _train, tree, num_steps, gradients_at, fault)[0]
    assert found is not None
    return found


def build_engine(tree: Tree) -> tuple[Engine, SyntheticData]:
    """The engine of this rank, and its data."""
    num_ranks = dist.get_world_size()
    config = build_config(tree, num_ranks)
    return registry.build_engine(config, layout_of(config, num_ranks), torch.device("cpu"), VOCABULARY), SyntheticData(
        config
    )


def differences(actual: Trace, expected: Trace, tolerance: float = 1e-8, gradient: float = 1e-9) -> list[str]:
    """In words, what is not the same; empty if all is. Parameters come in the order of the model.

    Args:
        tolerance: of losses, gradient norms (both relative to 1) and biases.
        gradient: relative to the largest value of the tensor.
    """
    bounds = Bounds(loss=tolerance, gradient=gradient, norm=tolerance, bias=tolerance)
    return [difference.text for difference in compare(actual, expected, bounds) if difference.is_large]


def differing_losses(actual: Trace, expected: Trace, tolerance: float) -> list[str]:
    """In words, the losses that are not the same; a shorter run is compared as far as it goes."""
    bounds = Bounds(loss=tolerance, gradient=0, norm=0, bias=0)
    found = compare(actual, expected, bounds)
    return [difference.text for difference in found if difference.kind == "loss" and difference.is_large]


def _train(tree: Tree, num_steps: int, gradients_at: tuple[int, ...], fault: Fault) -> Trace | None:
    """On each rank."""
    with fault():
        engine, data = build_engine(tree)
        return gather(record(engine, data, range(num_steps), gradients_at))
