"""How far two traces are apart, and what explains it.

Gradients are compared from equal weights only: AdamW turns the rounding of a gradient near zero into a whole step, so that
gradients of later steps differ by more than rounding, though losses hardly do.

Rounding differs between layouts in the last digit. Where two scores of a token are all but equal it decides which expert the
token uses: a routing flip. From then on a run may differ by more than rounding, and by right; what differs without a flip
between all but equal scores is a fault.
"""

import math
from dataclasses import dataclass

import numpy as np

from moe_dist.training.tracing import Array, Routes, Trace, relative_error

NEAR = 1e-6
"""Selection scores that are closer than this are all but equal."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences that rounding explains. Weights, loads and drops must be equal."""

    loss: float
    gradient: float
    """Of a parameter, relative to the largest value of its gradient."""
    norm: float
    """Of the gradient norm, relative to it, or to 1 if it is less."""
    bias: float
    between_ranks: float = 0.0
    """Of what several ranks hold, relative to the largest value."""


BOUNDS = {
    # precision: from equal weights, after steps of its own
    "float32": (Bounds(1e-6, 1e-5, 1e-5, 1e-4, 1e-5), Bounds(1e-4, 1e-5, 1e-4, 1e-4, 1e-5)),
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

    @property
    def is_near(self) -> bool:
        return self.margin < NEAR

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
    """Compare a run from its own initial weights, and single steps from the reference's state, with the reference.

    A large difference is explained by a near flip at or before its step: of the run for its own later steps, of the step
    itself otherwise.
    """
    equal, drifted = BOUNDS[precision]
    parts = [(run.part(0, 1), equal, run.part(0, 1))]
    parts += [(replay, equal, replay) for replay in replays]
    parts += [(run.part(1, len(run.losses)), drifted, run)]
    verdict = Verdict([], [], [])
    for part, bounds, routed in parts:
        differences, flip = compare(part, reference, bounds), first_flip(routed, reference)
        verdict.differences.extend(differences)
        if flip is not None and flip.is_near and flip not in verdict.flips:
            verdict.flips.append(flip)
        for large in filter(lambda difference: difference.is_large, differences):
            explained = flip is not None and flip.is_near and large.step >= flip.step and large.kind not in ALWAYS
            if not explained:
                also = f"; first routing flip: {flip}" if flip is not None and large.step >= flip.step else ""
                verdict.failures.append(large.text + also)
    if not any(first_flip(part, reference) is None for part in (run.part(0, 1), *replays)):
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
    last = len(expected.losses) + expected.first_step - 1
    for place in range(len(actual.losses)):
        step = actual.first_step + place
        at = step - expected.first_step
        found += [
            _counts("loads", step, actual.loads[place], expected.loads[at]),
            _counts("drops", step, actual.drops[place], expected.drops[at]),
            _loss(step, actual.losses[place], expected.losses[at], bounds.loss),
            _norm(step, actual.grad_norms[place], expected.grad_norms[at], bounds.norm),
        ]
        if step == last:
            found += [_bias(step, n, bias, expected.biases[n], bounds.bias) for n, bias in actual.biases.items()]
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
        largest, error = np.abs(right).max(), np.abs(actual[name] - right).max()
        what = f"step {step}: gradient of {name}" if kind == "gradient" else f"initial weight {name}"
        text = f"{what} is off by {error:.1e}, where its largest is {largest:.1e}"
        found.append(Difference(kind, step, name, relative_error(actual[name], right), bound, text))
    return found


def _counts(what: str, step: int, actual: Array, expected: Array) -> Difference:
    text = f"step {step}: {what} {actual.tolist()} should be {expected.tolist()}"
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
    text = f"bias of layer {layer}: {actual.tolist()} should be {expected.tolist()}"
    return Difference("bias", step, f"layer {layer}", float(np.abs(actual - expected).max()), bound, text)
