"""How far two traces are apart, and what explains it.

Rounding differs between layouts in the last digit. Where two scores of a token are all but equal it decides which expert the
token uses: a routing flip. From then on a run may differ by more than rounding, and by right; what differs without such a
flip is a fault.

Runs also drift apart: AdamW turns the rounding of a gradient near zero into a whole step. Gradients, norms and loads are
therefore compared closely from equal weights only (the initial ones, and states of the reference), and of a run by itself
the losses, and the loads and biases as far as no flip between drifted scores has changed them.

Shape letters: see moe_dist.training.tracing.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_dist.training.tracing import Array, Routes, Trace

NEAR = 1e-6
"""Selection scores that are closer than this are all but equal."""
DRIFT = 1e-4
"""How far the scores of a run may drift from the reference's, as its losses may."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that rounding explains. Weights, loads and drops must be equal."""

    loss: float
    gradient: float
    """Of a parameter's gradient, the norm of the difference relative to its norm. Single values that nearly cancel say little."""
    norm: float
    """Of the gradient norm, relative to it, or to 1 if it is less."""
    bias: float
    between_ranks: float = 0.0
    """Of what several ranks hold, relative to the largest value."""


BOUNDS = {
    # precision: from equal weights, after steps of its own
    "float32": (Bounds(1e-6, 1e-5, 1e-5, 1e-6, 1e-5), Bounds(1e-4, 1e-5, 1e-4, 1e-4, 1e-5)),
    "float64": (Bounds(1e-8, 1e-9, 1e-8, 1e-8, 1e-9), Bounds(1e-8, 1e-9, 1e-8, 1e-8, 1e-9)),
}
ALWAYS = ("weight", "ranks")
"""Kinds that no routing flip explains."""


@dataclass(frozen=True)
class Difference:
    """One value that was compared."""

    kind: str
    """weight, gradient, loads, drops, loss, norm, bias or ranks."""
    step: int
    name: str
    """The parameter or layer, if there is one."""
    size: float
    bound: float
    text: str

    @property
    def is_large(self) -> bool:
        return not self.size <= self.bound  # NaN is


@dataclass(frozen=True)
class Flip:
    """A token that uses another expert than in the reference."""

    step: int
    layer: int
    token: int
    """Its place in the global batch."""
    expected: tuple[int, ...]
    """Experts that only the reference uses."""
    actual: tuple[int, ...]
    """Experts that only the other run uses."""
    margin: float
    """Between the reference's selection scores of these; infinite if one of them is not next in line there."""
    count: int
    """Tokens that flip in this layer of this step; this one has the widest margin of them."""

    def __str__(self) -> str:
        others = f" (the widest of {self.count})" if self.count > 1 else ""
        return (
            f"step {self.step}, layer {self.layer}, token {self.token}: {_experts(self.actual)} instead of "
            f"{_experts(self.expected)}, margin {self.margin:.1e}{others}"
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a run is the reference's in another layout."""

    differences: list[Difference]
    """Of everything that was compared."""
    flips: list[Flip]
    """Between all but equal scores, each the first of the free run or of a step from the reference's state."""
    failures: list[str]
    """In words, what nothing explains; empty if all is well."""


def judge(run: Trace, replays: list[Trace], reference: Trace, precision: str) -> Verdict:
    """Compare a run from its own initial weights, and single steps from states of the reference, with the reference.

    A large difference is explained by a flip at or before its step: from equal weights, and for losses, by one between scores
    that are NEAR each other; after steps of its own, for the rest, by one between scores that may have drifted so far.
    """
    equal, drifted = BOUNDS[precision]
    from_equal_weights = [run.part(0, 1), *replays]
    parts = [(part, equal, first_flip(part, reference)) for part in from_equal_weights]
    later = run.part(1, len(run.losses)), drifted, first_flip(run, reference)
    verdict = Verdict([], [], [])
    for part, bounds, flip in (*parts, later):
        differences = compare(part, reference, bounds)
        verdict.differences.extend(differences)
        explained = False
        for large in filter(lambda difference: difference.is_large, differences):
            reach = DRIFT if bounds is drifted and large.kind != "loss" else NEAR
            if flip is None or large.step < flip.step:
                verdict.failures.append(large.text)
            elif flip.margin >= reach or large.kind in ALWAYS:
                verdict.failures.append(f"{large.text}; first routing flip: {flip}")
            else:
                explained = True
        if explained and flip not in verdict.flips:
            assert flip is not None
            verdict.flips.append(flip)
    if all(flip is not None for _, _, flip in parts):
        verdict.failures.append("every step whose gradients are compared has a routing flip; use another training.seed")
    return verdict


def compare(actual: Trace, expected: Trace, bounds: Bounds) -> list[Difference]:
    """Every value of `actual` beside that of `expected`, which has all its steps. Parameters come in the order of the model."""
    found = [
        Difference("ranks", actual.first_step, "", other.error, bounds.between_ranks, other.what)
        for other in actual.disagreements
    ]
    if actual.weights:
        found += _tensors("weight", actual.first_step, actual.weights, expected.weights, 0.0)
    for step in sorted(actual.gradients):
        found += _tensors("gradient", step, actual.gradients[step], expected.gradients[step], bounds.gradient)
    for place, loss in enumerate(actual.losses):
        step = actual.first_step + place
        at = step - expected.first_step
        found += [
            _counts("loads", step, actual.loads[place], expected.loads[at]),
            _counts("drops", step, actual.drops[place], expected.drops[at]),
            _loss(step, loss, expected.losses[at], bounds.loss),
            _norm(step, actual.grad_norms[place], expected.grad_norms[at], bounds.norm),
        ]
        for layer, bias in actual.biases_after[place].items():
            found.append(_bias(step, layer, bias, expected.biases_after[at][layer], bounds.bias))
    return found


def first_flip(actual: Trace, expected: Trace) -> Flip | None:
    """In the first step and layer where any token uses other experts: the token whose scores are least close.

    Attention of later layers sees what flipped before, but tokens of one layer do not see each other's choice: each of these
    flips has to be near.
    """
    for place, of_layer in enumerate(actual.routes):
        step = actual.first_step + place
        right = expected.routes[step - expected.first_step]
        for layer in sorted(of_layer):
            flips = _flips(step, layer, of_layer[layer], right[layer])
            if flips:
                return max(flips, key=lambda flip: flip.margin)
    return None


def _flips(step: int, layer: int, actual: Routes, expected: Routes) -> list[Flip]:
    assert np.array_equal(actual.index_T, expected.index_T), "the ranks did not route the tokens of the step once each"
    places = (actual.chosen_T != expected.chosen_T).any(axis=1).nonzero()[0]
    result = []
    for place in places:
        new, old = _bits(actual.chosen_T[place]), _bits(expected.chosen_T[place])
        gained, lost = tuple(sorted(new - old)), tuple(sorted(old - new))
        scores = dict(zip(expected.best_TJ[place].tolist(), expected.score_TJ[place].tolist(), strict=True))
        margin = math.inf
        if gained and lost and scores.keys() >= {*gained, *lost}:
            margin = max(abs(scores[a] - scores[b]) for a in gained for b in lost)
        result.append(Flip(step, layer, int(actual.index_T[place]), lost, gained, margin, len(places)))
    return result


def _bits(packed: Array) -> set[int]:
    return set(np.unpackbits(packed).nonzero()[0].tolist())


def _experts(experts: tuple[int, ...]) -> str:
    return ("expert " if len(experts) == 1 else "experts ") + (", ".join(map(str, experts)) or "none")


def _tensors(
    kind: str, step: int, actual: dict[str, Array], expected: dict[str, Array], bound: float
) -> list[Difference]:
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    found = []
    for name, right in expected.items():
        assert actual[name].shape == right.shape, f"{kind} {name}: {actual[name].shape} should be {right.shape}"
        norm, error = float(np.linalg.norm(right)), float(np.linalg.norm(actual[name] - right))
        what = f"step {step}: gradient of {name}" if kind == "gradient" else f"initial weight {name}"
        text = f"{what} is off by {error:.1e}, where its norm is {norm:.1e}"
        found.append(Difference(kind, step, name, error / max(norm, 1e-6), bound, text))
    return found


def _counts(what: str, step: int, actual: Array, expected: Array) -> Difference:
    text = f"step {step}: {what}"
    if len(places := np.argwhere(actual != expected)):
        layer, expert = places[0].tolist()
        text += (
            f" of {len(places)} experts differ, first of expert {expert} in MoE layer {layer + 1} of {len(actual)}: "
        )
        text += f"{actual[layer, expert]} should be {expected[layer, expert]}"
    return Difference(what, step, "", float(np.abs(actual - expected).sum()), 0.0, text)


def _loss(step: int, actual: float, expected: float, bound: float) -> Difference:
    error = abs(actual - expected)
    return Difference(
        "loss", step, "", error, bound, f"step {step}: loss {actual} should be {expected}: off by {error:.1e}"
    )


def _norm(step: int, actual: float, expected: float, bound: float) -> Difference:
    error = abs(actual - expected)
    text = f"step {step}: gradient norm {actual} should be {expected}: off by {error:.1e}"
    return Difference("norm", step, "", error / max(1, expected), bound, text)


def _bias(step: int, layer: int, actual: Array, expected: Array, bound: float) -> Difference:
    error = float(np.abs(actual - expected).max())
    return Difference(
        "bias", step, f"layer {layer}", error, bound, f"step {step}: bias of layer {layer} is off by {error:.1e}"
    )
