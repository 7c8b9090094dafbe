"""Train a tiny model on any layout of ranks, and compare what came out: the tests of "any layout, the same training".

The data are made so that what a layout can get wrong shows: every sequence has another number of targets, two have
none (so in the finest layout there are micro-batches without any, and on four ranks a rank without any), and some end in
padding. They are easy: each token has one successor, so that the loss falls fast.

Shape letters: B sequences of a micro-batch, S sequence length, N MoE layers, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_dist.config import Config, Layout, build_config, layout_of
from moe_dist.engines import registry
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.engine import Engine
from tests.support.distributed import run_ranks

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


@dataclass(frozen=True)
class Trace:
    """What a run gave, of all ranks together."""

    losses: list[float]
    grad_norms: list[float]
    loads: list[np.ndarray]
    """int64 [N, E] of each step, before anything is dropped."""
    drops: list[np.ndarray]
    """int64 [N, E] of each step."""
    biases: dict[int, np.ndarray]
    """The loss-free bias of each MoE layer after the last step."""
    gradients: dict[int, dict[str, np.ndarray]]
    """By step, then by global name: whole, reduced over all ranks, and not yet clipped."""
    disagreements: list[str] = field(default_factory=list)
    """What should be the same on all ranks and is not."""


Fault = Callable[[], AbstractContextManager[object]]


def trace(
    tree: Tree, num_ranks: int = 1, num_steps: int = 20, gradients_at: tuple[int, ...] = (), fault: Fault = nullcontext
) -> Trace:
    """Train on `num_ranks` processes.

    Args:
        gradients_at: steps whose gradients are kept.
        fault: a context (module level) that each rank trains in.
    """
    return _merge(run_ranks(num_ranks, _train, tree, num_steps, gradients_at, fault))


def build_engine(tree: Tree) -> tuple[Engine, SyntheticData]:
    """The engine of this rank, and its data."""
    num_ranks = dist.get_world_size()
    config = build_config(tree, num_ranks)
    return registry.build_engine(config, layout_of(config, num_ranks), torch.device("cpu"), VOCABULARY), SyntheticData(
        config
    )


def train_step(engine: Engine, data: SyntheticData, step: int) -> Any:
    """What the training loop does in a step, with a constant rate."""
    batches = data.micro_batches(step, engine.data_rank, engine.layout)
    num_targets, num_tokens = engine.sum_over_ranks(
        [sum(b.num_targets() for b in batches), sum(b.num_tokens() for b in batches)]
    )
    rates = engine.config.training.optimizer.learning_rate, engine.config.routing.bias.rate
    return engine.train_step(batches, num_targets, num_tokens, *rates)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Gathered from the ranks that share them; collective. As numpy arrays, which cross processes by value."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone().numpy()
        for name, tensor in tensors.items()
    }


def differences(actual: Trace, expected: Trace, tolerance: float = 1e-8, gradient: float = 1e-9) -> list[str]:
    """In words, what is not the same; empty if all is. Parameters come in the order of the model.

    Args:
        tolerance: of losses, gradient norms (both relative to 1) and biases.
        gradient: relative to the largest value of the tensor.
    """
    found = list(actual.disagreements)
    for step in sorted(actual.gradients):
        found += _differing_gradients(step, actual.gradients[step], expected.gradients[step], gradient)
    num_steps = len(actual.losses)
    for what in ("loads", "drops"):
        for step in range(num_steps):
            counts, right = getattr(actual, what)[step], getattr(expected, what)[step]
            if not np.array_equal(counts, right):
                found.append(f"step {step}: {what} {counts.tolist()} should be {right.tolist()}")
    found += differing_losses(actual, expected, tolerance)
    for step, norm in enumerate(actual.grad_norms):
        right = expected.grad_norms[step]
        if not abs(norm - right) <= tolerance * max(1, right):
            found.append(f"step {step}: gradient norm {norm} should be {right}: off by {abs(norm - right):.1e}")
    if num_steps == len(expected.losses):
        for layer, bias in actual.biases.items():
            if not np.allclose(bias, expected.biases[layer], rtol=0, atol=tolerance):
                found.append(f"bias of layer {layer}: {bias.tolist()} should be {expected.biases[layer].tolist()}")
    return found


def differing_losses(actual: Trace, expected: Trace, tolerance: float) -> list[str]:
    """In words, the losses that are not the same; a shorter run is compared as far as it goes."""
    found = []
    for step, loss in enumerate(actual.losses):
        right = expected.losses[step]
        if not abs(loss - right) <= tolerance:
            found.append(f"step {step}: loss {loss} should be {right}: off by {abs(loss - right):.1e}")
    return found


def _differing_gradients(
    step: int, actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float
) -> list[str]:
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    found = []
    for name, right in expected.items():
        size, error = np.abs(right).max(), np.abs(actual[name] - right).max()
        if not error <= tolerance * max(size, 1e-6):
            found.append(f"step {step}: gradient of {name} is off by {error:.1e}, where its largest is {size:.1e}")
    return found


def _keep_gradients(engine: Engine) -> dict[str, np.ndarray]:
    """Filled in every step with the gradients as they are before clipping and the update."""
    kept: dict[str, np.ndarray] = {}
    loss_and_norm = engine.loss_and_norm

    def keep(loss_sum: torch.Tensor) -> tuple[float, float]:
        result = loss_and_norm(loss_sum)
        kept.update(whole(dict(engine.gradients())))
        return result

    engine.loss_and_norm = keep  # type: ignore[method-assign]
    return kept


def _train(tree: Tree, num_steps: int, gradients_at: tuple[int, ...], fault: Fault) -> Trace:
    """On each rank. The gradients are those of the dense parameters and of this rank's experts."""
    result = Trace([], [], [], [], {}, {})
    with fault():
        engine, data = build_engine(tree)
        kept = _keep_gradients(engine) if gradients_at else {}
        for step in range(num_steps):
            outcome = train_step(engine, data, step)
            assert not outcome.skipped
            result.losses.append(outcome.loss)
            result.grad_norms.append(outcome.grad_norm)
            result.loads.append(outcome.load_NE.numpy())
            result.drops.append(outcome.dropped_NE.numpy())
            if step in gradients_at:
                result.gradients[step] = dict(kept)
    for number, layer in engine.moe_layers.items():
        result.biases[number] = layer.router.balance.bias_E.numpy()
    return result


def _merge(traces: list[Trace]) -> Trace:
    first, disagreements = traces[0], []
    gradients: dict[int, dict[str, np.ndarray]] = {step: {} for step in first.gradients}
    biases: dict[int, np.ndarray] = {}
    for rank, other in enumerate(traces):
        for layer, bias in other.biases.items():
            if not _equal(biases.setdefault(layer, bias), bias):
                disagreements.append(f"bias of layer {layer} on rank {rank} is not that of other ranks")
        for name in ("losses", "grad_norms", "loads", "drops"):
            if not _equal(getattr(other, name), getattr(first, name)):
                disagreements.append(f"{name} of rank {rank} are not those of rank 0")
        for step, tensors in other.gradients.items():
            for name, tensor in tensors.items():
                if not _equal(gradients[step].setdefault(name, tensor), tensor):
                    disagreements.append(f"step {step}: gradient of {name} on rank {rank} is not that of other ranks")
    return replace(first, gradients=gradients, biases=biases, disagreements=disagreements)


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(_equal(actual[key], expected[key]) for key in expected)
    return len(actual) == len(expected) and all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))
