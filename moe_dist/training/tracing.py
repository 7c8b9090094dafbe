"""What a few training steps gave, whole and by global names, so that runs of other layouts and engines can be compared.

Shape letters: N MoE layers, E experts, T tokens, J experts that a token scores highest, one more than it uses.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dist.engines.engine import Engine, StepResult
from moe_dist.routing.groups import index_of
from moe_dist.routing.router import Router
from moe_dist.routing.types import Choice, Tokens
from moe_dist.training.data import Data
from moe_dist.training.loop import TrainingError
from moe_dist.training.schedule import bias_rate, learning_rate

Array = npt.NDArray[Any]
Key = tuple[str, int, str]
"""Of an array of a trace: what it is, the step, and the name."""


@dataclass(frozen=True)
class Routes:
    """What one layer chose for the tokens of a step."""

    index_T: Array
    """int64: place of each token in the global batch."""
    chosen_T: Array
    """uint8 [T, bytes]: a bit for each expert, set if the token uses it; none for padding."""
    best_TJ: Array
    """int16: the experts that selection scores highest."""
    score_TJ: Array
    """Their selection scores."""

    @staticmethod
    def of_all(parts: "list[Routes]") -> "Routes":
        """Micro-batches and ranks as one, in the order of the global batch; tokens that several ranks hold count once."""
        index_T = np.concatenate([part.index_T for part in parts])
        index_T, first_T = np.unique(index_T, return_index=True)
        names = ("chosen_T", "best_TJ", "score_TJ")
        return Routes(index_T, *(np.concatenate([getattr(part, name) for part in parts])[first_T] for name in names))


@dataclass(frozen=True)
class Disagreement:
    """What should be the same on several ranks and is not."""

    what: str
    error: float
    """The largest difference, relative to the largest value."""


@dataclass
class Trace:
    """What consecutive steps gave, of one rank, or of all ranks together."""

    first_step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loads: list[Array] = field(default_factory=list)
    """int64 [N, E] of each step, before anything is dropped."""
    drops: list[Array] = field(default_factory=list)
    """int64 [N, E] of each step."""
    biases_after: list[dict[int, Array]] = field(default_factory=list)
    """After each step the loss-free bias of each MoE layer."""
    gradients: dict[int, dict[str, Array]] = field(default_factory=dict)
    """By step, then by global name: whole, reduced over all ranks, and not yet clipped."""
    weights: dict[str, Array] = field(default_factory=dict)
    """By global name, whole, before the first step; empty if they were not asked for."""
    routes: list[dict[int, Routes]] = field(default_factory=list)
    """Of each step by layer number."""
    disagreements: list[Disagreement] = field(default_factory=list)

    @property
    def biases(self) -> dict[int, Array]:
        """The loss-free bias of each MoE layer after the last step."""
        return self.biases_after[-1]

    def part(self, start: int, stop: int) -> "Trace":
        """The steps from `start` to before `stop`, counted from the first; the weights go with the first one."""
        steps = range(self.first_step + start, self.first_step + stop)
        return Trace(
            first_step=self.first_step + start,
            losses=self.losses[start:stop],
            grad_norms=self.grad_norms[start:stop],
            loads=self.loads[start:stop],
            drops=self.drops[start:stop],
            biases_after=self.biases_after[start:stop],
            gradients={step: found for step, found in self.gradients.items() if step in steps},
            weights={} if start else self.weights,
            routes=self.routes[start:stop],
            disagreements=[] if start else self.disagreements,
        )


def train_step(engine: Engine, data: Data, step: int) -> StepResult:
    """What the training loop does in a step, without its records."""
    training, batches = engine.config.training, data.micro_batches(step, engine.data_rank, engine.layout)
    num_targets, num_tokens = engine.sum_over_ranks(
        [sum(b.num_targets() for b in batches), sum(b.num_tokens() for b in batches)]
    )
    rates = learning_rate(training, step), bias_rate(engine.config.routing.bias, training.steps, step)
    return engine.train_step(batches, num_targets, num_tokens, *rates, step=step)


def record(
    engine: Engine,
    data: Data,
    steps: range,
    gradients_at: tuple[int, ...] = (),
    before_step: Callable[[int], object] = lambda step: None,
) -> Trace:
    """Train through `steps`, and return what this rank has of them; collective.

    Args:
        gradients_at: steps whose gradients are kept.
        before_step: called before each step with its number.

    Raises:
        TrainingError: if a step was skipped.
    """
    trace = Trace(first_step=steps.start)
    for step in steps:
        before_step(step)
        keep_gradients: AbstractContextManager[dict[str, Array]] = nullcontext({})
        if step in gradients_at:
            keep_gradients = _keeping_gradients(engine)
        with keep_gradients as gradients, _keeping_routes(engine) as routes:
            result = train_step(engine, data, step)
        if result.skipped:
            raise TrainingError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: nothing to compare. Lower "
                "training.optimizer.learning_rate"
            )
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
        trace.loads.append(result.load_NE.cpu().numpy())
        trace.drops.append(result.dropped_NE.cpu().numpy())
        trace.routes.append({number: Routes.of_all(parts) for number, parts in routes.items() if parts})
        trace.biases_after.append({n: _array(layer.router.balance.bias_E) for n, layer in engine.moe_layers.items()})
        if step in gradients_at:
            trace.gradients[step] = gradients
    return trace


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Gathered from the ranks that share them; collective. As numpy arrays, which cross processes by value."""
    return {
        name: _array(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in tensors.items()
    }


def weights_of(engine: Engine) -> dict[str, Array]:
    """The weights of this rank, whole, by global name; collective."""
    prefix = "model."
    state = engine.state()
    return whole({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})


def gather(trace: Trace) -> Trace | None:
    """The traces of all ranks as one, on rank 0; None on others. Collective.

    Of what several ranks hold, one copy travels, and those that differ from it.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    own = _tensors(trace)
    digests: list[dict[Key, bytes]] = [{} for _ in range(num_ranks)]
    dist.all_gather_object(digests, {key: hashlib.sha256(array.tobytes()).digest() for key, array in own.items()})
    first: dict[Key, bytes] = {}
    holder: dict[Key, int] = {}
    for other, found in enumerate(digests):
        for key, digest in found.items():
            first.setdefault(key, digest)
            holder.setdefault(key, other)
    sent = {key: own[key] for key, digest in digests[rank].items() if holder[key] == rank or digest != first[key]}
    parts: list[Any] = [None] * num_ranks
    dist.gather_object((sent, trace.routes), parts if rank == 0 else None, dst=0)
    if rank != 0:
        return None
    return _merge(trace, [sent for sent, _ in parts], [routes for _, routes in parts])


def _tensors(trace: Trace) -> dict[Key, Array]:
    """What a trace holds but for its routes, for comparison between ranks."""
    result: dict[Key, Array] = {
        ("losses", 0, ""): np.array(trace.losses),
        ("gradient norms", 0, ""): np.array(trace.grad_norms),
        ("loads", 0, ""): np.array(trace.loads),
        ("drops", 0, ""): np.array(trace.drops),
    }
    result |= {("weight", 0, name): array for name, array in trace.weights.items()}
    for place, biases in enumerate(trace.biases_after):
        result |= {("bias", trace.first_step + place, f"layer {layer}"): array for layer, array in biases.items()}
    for step, gradients in trace.gradients.items():
        result |= {("gradient", step, name): array for name, array in gradients.items()}
    return result


def _merge(trace: Trace, parts: list[dict[Key, Array]], routes: list[list[dict[int, Routes]]]) -> Trace:
    found: dict[Key, Array] = {}
    disagreements = []
    for rank, part in enumerate(parts):
        for key, array in part.items():
            if error := relative_error(array, found.setdefault(key, array)):
                disagreements.append(Disagreement(_say(key, rank), error))
    steps = [[of_rank[place] for of_rank in routes] for place in range(len(trace.losses))]
    return replace(
        trace,
        biases_after=[
            {
                int(name.removeprefix("layer ")): array
                for (what, at, name), array in found.items()
                if what == "bias" and at == trace.first_step + place
            }
            for place in range(len(trace.losses))
        ],
        gradients={
            step: {name: array for (what, at, name), array in found.items() if what == "gradient" and at == step}
            for step in trace.gradients
        },
        weights={name: array for (what, _, name), array in found.items() if what == "weight"},
        routes=[
            {layer: Routes.of_all([r[layer] for r in ranks if layer in r]) for layer in sorted(set().union(*ranks))}
            for ranks in steps
        ],
        disagreements=disagreements,
    )


def _say(key: Key, rank: int) -> str:
    what, number, name = key
    if what == "gradient":
        return f"step {number}: gradient of {name} on rank {rank} is not that of other ranks"
    if what == "weight":
        return f"initial weight {name} on rank {rank} is not that of other ranks"
    if what == "bias":
        return f"step {number}: bias of {name} on rank {rank} is not that of other ranks"
    return f"{what} of rank {rank} are not those of rank 0"


def relative_error(actual: Array, expected: Array) -> float:
    """The largest difference, relative to the largest value, but never to less than 1e-6; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6))


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().clone().numpy()


@contextmanager
def _keeping_gradients(engine: Engine) -> Iterator[dict[str, Array]]:
    """Filled with the gradients of the steps inside the block as they are before clipping and the update.

    The engine's own method is wrapped, so that the step is the one that a run takes, whatever the engine makes of it.
    """
    kept: dict[str, Array] = {}
    loss_and_norm = engine.loss_and_norm

    def keep(loss_sum: Tensor) -> tuple[float, float]:
        result = loss_and_norm(loss_sum)
        kept.update(whole(dict(engine.gradients())))
        return result

    engine.loss_and_norm = keep  # type: ignore[method-assign]
    yield kept
    del engine.loss_and_norm


@contextmanager
def _keeping_routes(engine: Engine) -> Iterator[dict[int, list[Routes]]]:
    """Filled with what the training forwards inside the block choose on this rank, recomputations left out."""
    kept: dict[int, list[Routes]] = {number: [] for number in engine.moe_layers}
    routers = {number: layer.router for number, layer in engine.moe_layers.items()}

    def keeping(router: Router, found: list[Routes]) -> Callable[..., Choice]:
        choose = router.choose

        def keep(logits_TE: Tensor, scores_TE: Tensor, tokens: Tokens, counts: bool) -> Choice:
            choice = choose(logits_TE, scores_TE, tokens, counts)
            if counts:
                found.append(_routes(router, scores_TE, tokens, choice))
            return choice

        return keep

    for number, router in routers.items():
        router.choose = keeping(router, kept[number])  # type: ignore[method-assign]
    yield kept
    for router in routers.values():
        del router.choose


def _routes(router: Router, scores_TE: Tensor, tokens: Tokens, choice: Choice) -> Routes:
    valid_TK = torch.ones_like(choice.expert_TK) if choice.valid_TK is None else choice.valid_TK.long()
    if tokens.padding_T is not None:
        valid_TK = valid_TK * ~tokens.padding_T[:, None]
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.int64).scatter_add_(1, choice.expert_TK, valid_TK)
    selection_TE = router.selection(scores_TE)
    best = selection_TE.topk(min(router.routing.top_k + 1, selection_TE.shape[1]), dim=1)
    return Routes(
        _array(index_of(tokens, scores_TE)),
        np.packbits(_array(chosen_TE > 0), axis=1),
        _array(best.indices).astype(np.int16),
        _array(best.values),
    )
