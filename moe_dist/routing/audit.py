"""Does the routing of a token depend on tokens that it must not know of? Decided by experiment, for any router.

Two forwards from the same state differ in some of the tokens. Where the routing of the others changes, it depends on these.
A router that looks at later tokens in training tells the model something of its targets (arXiv 2408.15664), and routes
otherwise once the model generates, when they are not there yet. What past steps left in its state is no such leak.

Shape letters: A tokens on all ranks, T tokens on this rank, H hidden, E experts, X experts and the identity.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing.audit_batches import CHANGES, Batch, Batches
from moe_dist.routing.balance import sum_over_ranks
from moe_dist.routing.router import Router
from moe_dist.routing.types import Routing, Tokens, real_pairs

LATER, SEQUENCES, RANKS = "later tokens of its sequence", "other sequences of the batch", "other ranks"
QUESTIONS = (LATER, SEQUENCES, RANKS)

MODES = (True, False)
"""Training, evaluation."""

WARM_UP_STEPS = 4
TOLERANCE = 1e-9
"""Of weights, absolute and relative: rounding in float64 is no dependence."""

AnyRouter = Callable[[Tensor, Tokens], Routing]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Comparison:
    """The routing of some tokens before and after others changed."""

    example: str | None
    """The first token whose routing changed, in words. None: no routing did."""
    weights_alone: bool
    """Whether weights of a token changed while its experts did not."""
    fewest: int
    """Least experts of a token, in either routing ..."""
    most: int
    """... and most."""
    together: int
    """Most experts of a token in the two routings together."""


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    trials: list[Comparison]

    @property
    def examples(self) -> list[str]:
        """One of each trial in which a routing changed; empty if no dependence was found."""
        return [trial.example for trial in self.trials if trial.example is not None]


@dataclass(frozen=True)
class Findings:
    """The answers to all of QUESTIONS; None for what was not tried."""

    training: dict[str, Finding | None]
    evaluation: dict[str, Finding | None]
    equal_choices: float
    """Of the (token, expert) pairs that training or evaluation routes, the share that both do."""
    equal_weights: bool
    """Whether these have the same weights in both."""


def audit_router(
    router: AnyRouter,
    hidden_size: int,
    *,
    vocab_size: int = 257,
    num_sequences: int = 4,
    length: int = 32,
    num_trials: int = 40,
    num_steps: int = 100,
    group: dist.ProcessGroup | None = None,
) -> Findings:
    """Try what the routing of a token depends on, in training and in evaluation.

    Every trial draws a batch of random tokens, and routes it again after the tokens of a question changed in one of the ways
    CHANGES, each time by a new copy of the router. They change on one rank only, or on all others, so that no answer holds
    another's dependence.

    Args:
        router: of any make; it stays as it is. It gets float64 hidden states on the CPU, and is moved there if it is a module.
            A `Router` takes a few steps on random tokens first, so that its balancer state is not the initial one.
        vocab_size: token ids are 0 to this less 1.
        num_sequences: of each rank's batch, a multiple of routing.group.sequences.
        length: tokens of a sequence. A dependence on tokens further away is not found.
        num_trials: enough for each of CHANGES, and each rank of `group`.
        num_steps: trials are spread over this many optimiser steps, for methods that start and stop.
        group: ranks that hold different tokens, which all call this alike. None: this one alone; others are not tried.

    Returns:
        The same on all ranks.

    Raises:
        ValueError: if the router routes the same tokens in two ways from the same state.
    """
    batches = Batches(hidden_size, vocab_size, num_sequences, length, group)
    router = _copied(router)
    if isinstance(router, nn.Module):
        router.double().cpu()
    if isinstance(router, Router):
        _warm_up(router, batches)
    _check_repeatable(router, batches)
    questions = QUESTIONS if batches.num_ranks > 1 else QUESTIONS[:2]
    comparisons: dict[tuple[str, bool], list[Comparison]] = {(q, mode): [] for q in questions for mode in MODES}
    agreements = []
    for trial in range(num_trials):
        batch, step = batches.draw(), WARM_UP_STEPS + trial * num_steps // num_trials
        before = {mode: _route(router, batches, batch, mode, step) for mode in MODES}
        agreements.append(_agreement(before[True], before[False]))
        for question in questions:
            tested, changing_A, watched_A = _tokens_of(question, batches)
            changed = batches.changed(batch, changing_A, watched_A, CHANGES[trial % len(CHANGES)])
            for mode in MODES:
                after = _route(router, batches, changed, mode, step)
                if tested == batches.rank:
                    comparisons[question, mode].append(_compare(before[mode], after, batches.own(watched_A), batches))
    found = {key: Finding(_of_all_ranks(trials, group)) for key, trials in comparisons.items()}
    both, either, same_weights = zip(*_of_all_ranks(agreements, group), strict=True)
    return Findings(
        training={question: found.get((question, True)) for question in QUESTIONS},
        evaluation={question: found.get((question, False)) for question in QUESTIONS},
        equal_choices=sum(both) / max(1, sum(either)),
        equal_weights=all(same_weights),
    )


def leaked_bits(finding: Finding, num_experts: int, top_k: int) -> float:
    """Upper bound on the bits that the routing of a token in one layer tells of later tokens, on average over the tokens.

    It is the logarithm of how many outcomes the token's own scores leave open:

    - no dependence was found: 0;
    - weights changed where experts did not: they are real numbers, so there is no bound;
    - no token had more than k experts in two routings together: later tokens only decide which of its own k choices are
      kept, k bits;
    - no token had more than k experts: log2 of the number of sets of as many experts as tokens had, so of E choose k where
      each had k;
    - otherwise, with k experts on average, E H(k / E), where H(p) = -p log2 p - (1 - p) log2(1 - p): the entropy of a set is
      at most the sum of those of its members, and H is concave. (Where expert choice rounds its n k / E tokens up, the
      average is a little more than k.)

    What arXiv 2408.15664 gives for expert choice, K log2((1 - R) / R) with R = K / E, is less than the last by
    E log2(1 / (1 - R)), and is meant as a lower estimate of what such a layer can leak.
    """
    if not finding.examples:
        return 0.0
    if any(trial.weights_alone for trial in finding.trials):
        return math.inf
    if all(trial.together <= top_k for trial in finding.trials):
        return float(top_k)
    if all(trial.most <= top_k for trial in finding.trials):
        fewest = min(trial.fewest for trial in finding.trials)
        return math.log2(sum(math.comb(num_experts, size) for size in range(fewest, top_k + 1)))
    share = min(top_k / num_experts, 0.5)
    return -num_experts * (share * math.log2(share) + (1 - share) * math.log2(1 - share))


@dataclass(frozen=True)
class _Outcome:
    """The routing of this rank's tokens."""

    chosen_TE: Tensor
    weight_TX: Tensor


def _route(router: AnyRouter, batches: Batches, batch: Batch, training: bool, step: int) -> _Outcome:
    """By a copy of the router, so that its state stays."""
    routing = real_pairs(_forward(_copied(router), batches, batch, training, step))
    num_tokens = batches.tokens_per_rank
    chosen_TE = torch.zeros(num_tokens, len(routing.load_E), dtype=torch.bool)
    chosen_TE[routing.token_P, routing.expert_P] = True
    weight_TX = torch.zeros(num_tokens, len(routing.load_E) + 1, dtype=torch.float64)
    weight_TX[routing.token_P, routing.expert_P] = routing.weight_P.detach().double()
    if routing.identity_weight_T is not None:
        weight_TX[:, -1] = routing.identity_weight_T.detach()
    return _Outcome(chosen_TE, weight_TX)


def _forward(router: AnyRouter, batches: Batches, batch: Batch, training: bool, step: int) -> Routing:
    if isinstance(router, nn.Module):
        router.train(training)
    with torch.set_grad_enabled(training):
        return router(*batches.inputs(batch, step))


def _copied(router: AnyRouter) -> Any:
    """A copy with a state of its own. It shares settings, which never change, and process groups, which cannot be copied."""
    owners = router.modules() if isinstance(router, nn.Module) else [router]
    values = [value for owner in owners for value in getattr(owner, "__dict__", {}).values()]
    shared = [value for value in values if isinstance(value, (dist.ProcessGroup, RoutingConfig))]
    return copy.deepcopy(router, {id(value): value for value in shared})


def _warm_up(router: Router, batches: Batches) -> None:
    for step in range(WARM_UP_STEPS):
        _forward(router, batches, batches.draw(), True, step)
        (totals,) = sum_over_ranks([router.balance], router.data_parallel_group)
        router.update(totals, router.routing.bias.rate)


def _check_repeatable(router: AnyRouter, batches: Batches) -> None:
    batch, all_T = batches.draw(), torch.ones(batches.tokens_per_rank, dtype=torch.bool)
    comparisons = []
    for mode in MODES:
        first, second = (_route(router, batches, batch, mode, WARM_UP_STEPS) for _ in range(2))
        comparisons.append(_compare(first, second, all_T, batches))
    if examples := Finding(_of_all_ranks(comparisons, batches.group)).examples:
        raise ValueError(
            f"router: routes the same tokens in two ways from the same state, so that nothing can be tried: {examples[0]}"
        )


def _tokens_of(question: str, batches: Batches) -> tuple[int, Tensor, Tensor]:
    """A rank to test, and bool [A]: the tokens that change, and those of this rank whose routing is watched."""
    rank, sequence, position = batches.draw_place()
    on_rank_A = batches.rank_A == rank
    own_A = on_rank_A & (batches.sequence_A == sequence)
    if question == LATER:
        later_A = batches.position_A > position
        return rank, own_A & later_A, own_A & ~later_A
    if question == SEQUENCES:
        return rank, on_rank_A & ~own_A, own_A
    return rank, ~on_rank_A, on_rank_A


def _compare(before: _Outcome, after: _Outcome, watched_T: Tensor, batches: Batches) -> Comparison:
    same_experts_T = (before.chosen_TE == after.chosen_TE).all(1)
    same_weights_T = _close(before, after).all(1)
    changed_C = (watched_T & ~(same_experts_T & same_weights_T)).nonzero().squeeze(1)
    counts_T = torch.cat([outcome.chosen_TE.sum(1)[watched_T] for outcome in (before, after)])
    return Comparison(
        example=_example(int(changed_C[0]), before, after, batches) if len(changed_C) else None,
        weights_alone=bool((watched_T & same_experts_T & ~same_weights_T).any()),
        fewest=int(counts_T.min()),
        most=int(counts_T.max()),
        together=int((before.chosen_TE | after.chosen_TE).sum(1)[watched_T].max()),
    )


def _example(token: int, before: _Outcome, after: _Outcome, batches: Batches) -> str:
    experts = [outcome.chosen_TE[token].nonzero().squeeze(1).tolist() for outcome in (before, after)]
    names = ["{" + ", ".join(map(str, chosen)) + "}" for chosen in experts]
    if names[0] != names[1]:
        return f"{batches.name_of(token)} changed experts {names[0]} -> {names[1]}"
    difference = (before.weight_TX - after.weight_TX)[token].abs().max()
    return f"{batches.name_of(token)} changed a weight of experts {names[0]} by {difference:.2g}"


def _agreement(first: _Outcome, second: _Outcome) -> tuple[int, int, bool]:
    """Pairs in both, pairs in either, and whether those in both have the same weights."""
    both_TE = first.chosen_TE & second.chosen_TE
    return (
        int(both_TE.sum()),
        int((first.chosen_TE | second.chosen_TE).sum()),
        bool(_close(first, second)[:, :-1][both_TE].all()),
    )


def _close(first: _Outcome, second: _Outcome) -> Tensor:
    """bool [T, X]: equal weights."""
    return torch.isclose(first.weight_TX, second.weight_TX, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _of_all_ranks(items: list[Item], group: dist.ProcessGroup | None) -> list[Item]:
    """The items of all ranks, in rank order."""
    if group is None:
        return items
    lists: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lists, items, group=group)
    return list(chain.from_iterable(lists))
