"""What `moe-dist verify` prints of its rows."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.training.comparison import Difference, Verdict
from moe_dist.training.loop import TrainingError
from moe_dist.training.verification import Outcome

WIDTH = 200
"""Columns where there is no terminal: enough for every row on one line."""
MOST_FAILURES = 5
"""Told of each row."""


def show(outcomes: list[Outcome]) -> None:
    """The table, and under it why rows fail or are not run, and which routing flips explain a difference."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("engine", "layout", *_figures(Verdict([], [], [])), "worst parameter", "verdict"):
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        row, verdict = outcome.case.row, outcome.verdict or Verdict([], [], [])
        gradient = _largest(verdict, "gradient")
        figures = ("" if found is None else _short(found) for found in _figures(verdict).values())
        layout = ", ".join(filter(None, (row.layout, row.variant)))
        table.add_row(row.engine, layout, *figures, gradient.name if gradient else "", _word(outcome))
    console.print()
    console.print(table)
    not_run: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.verdict is None:
            not_run.setdefault(outcome.reason, []).append(str(outcome.case.row))
            continue
        for line in _remarks(outcome.verdict):
            console.print(f"{outcome.case.row}: {line}", soft_wrap=True)
    for reason, rows in not_run.items():  # one may hold for all rows of an engine: told once
        console.print(f"{'; '.join(rows)}: not run: {reason}", soft_wrap=True)


def conclude(outcomes: list[Outcome]) -> None:
    """Raise TrainingError, which ends the command with exit code 1, if a row fails or none was run."""
    verdicts = [outcome.verdict for outcome in outcomes if outcome.verdict is not None]
    if not verdicts:
        raise TrainingError("no row was run")
    if failed := sum(bool(verdict.failures) for verdict in verdicts):
        raise TrainingError(
            f"{failed} of {len(verdicts)} rows {'differ' if failed > 1 else 'differs'} from the reference"
        )


def as_record(outcome: Outcome) -> dict[str, Any]:
    """For verify.json."""
    row, verdict = outcome.case.row, outcome.verdict
    record: dict[str, Any] = {
        "engine": row.engine,
        "layout": row.layout,
        "variant": row.variant,
        "verdict": _word(outcome),
    }
    if verdict is None:
        return record | {"reason": outcome.reason}
    figures = {
        name: None
        if found is None
        else {"difference": found.size, "bound": found.bound, "step": found.step, "of": found.name}
        for name, found in _figures(verdict).items()
    }
    return record | {"differences": figures, "flips": list(map(str, verdict.flips)), "failures": verdict.failures}


def _figures(verdict: Verdict) -> dict[str, Difference | None]:
    """The largest difference of each kind, by the heading of its column."""
    return {
        "weights": _largest(verdict, "weight"),
        "loss 0": _largest(verdict, "loss", first_step=True),
        "losses": _largest(verdict, "loss"),
        "norm": _largest(verdict, "norm"),
        "loads": _largest(verdict, "loads", "drops"),
        "biases": _largest(verdict, "bias"),
        "gradients": _largest(verdict, "gradient"),
    }


def _largest(verdict: Verdict, *kinds: str, first_step: bool = False) -> Difference | None:
    found = [d for d in verdict.differences if d.kind in kinds and not (first_step and d.step)]
    return max(found, key=lambda d: (d.size != d.size, d.size), default=None)  # NaN is the largest


def _short(difference: Difference) -> str:
    return (
        f"{difference.size:.0f}"
        if difference.kind in ("loads", "drops")
        else f"{difference.size:.0e}".replace("0e+00", "0")
    )


def _word(outcome: Outcome) -> str:
    if outcome.verdict is None:
        return "not run"
    if outcome.verdict.failures:
        return "DIFFERS"
    return "same, but for a flip" if outcome.verdict.flips else "same"


def _remarks(verdict: Verdict) -> list[str]:
    failures, flips = verdict.failures, verdict.flips
    more = [f"and {len(failures) - MOST_FAILURES} more differences"] if len(failures) > MOST_FAILURES else []
    return [*failures[:MOST_FAILURES], *more, *(f"routing flip at {flip}" for flip in flips)]
