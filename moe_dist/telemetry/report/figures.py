"""What the sections draw with: numbers short enough for a page, lines and heat-maps.

Shape letters: S steps shown, R ranks, N layers, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pandas import DataFrame

from moe_dist.telemetry.reader import Run

SERIES = 8
"""Colours --c0 to --c7 of page.css."""
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_POINTS = 1000
"""Of one line."""
MOST_LINES = 16
"""Lines that can be told apart by colour and dashes; where there are more ranks, a heat-map is drawn."""
MOST_ROWS = 64
"""Ranks, or groups of ranks, of a heat-map."""

Array = npt.NDArray[Any]
Trace = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A run in the report."""

    name: str
    run: Run
    number: int

    @property
    def colour(self) -> str:
        """The same in every plot that compares runs."""
        return f"--c{self.number % SERIES}"

    @property
    def dash(self) -> str:
        """Tells runs apart without colour."""
        return DASHES[self.number % len(DASHES)]


def numbers(values: Any, digits: int = 6) -> list[Any]:
    """Nested lists for JSON: floats with so many significant digits, integers whole, what is not finite as None."""
    array = np.asarray(values)
    if array.ndim > 1:
        return [numbers(row, digits) for row in array]
    if array.dtype.kind in "iub":
        return array.astype(int).tolist()
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in array.astype(float)]


def thin(values: Sequence[Any] | Array, most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[place] for place in np.linspace(0, len(values) - 1, most).round().astype(int)]


def thinned(table: DataFrame, most: int) -> DataFrame:
    """The rows of at most `most` of the steps."""
    return table[table["step"].isin(thin(table["step"].unique(), most))]


def thinning_note(count: int, most: int, what: str = "logging steps") -> list[str]:
    """What is said where not all is drawn."""
    return [f"Drawn are {most:,} of {count:,} {what}, evenly spaced."] if count > most else []


def line(x: Any, y: Any, name: str, colour: str, dash: str = "solid", **more: Any) -> Trace:
    """A line over the steps."""
    style = {"color": colour, "dash": dash, "width": 2}
    trace = {"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y), "name": name, "line": style}
    return trace | more


def over_steps(y_title: str, **yaxis: Any) -> dict[str, Any]:
    """The layout of lines over the steps."""
    return {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": y_title}} | yaxis,
        "hovermode": "x unified",
    }


def heat_map(x_title: str, y_title: str, scale: str, legend: str, hover: str, **more: Any) -> Trace:
    """A heat-map; `scale` is --diverging or --sequential."""
    bar = {"orientation": "h", "thickness": 10, "y": 1.02, "yanchor": "bottom", "x": 0.5, "len": 1.0, "outlinewidth": 0}
    bar |= {"title": {"text": legend, "side": "top"}, "tickfont": {"size": 12}}
    template = f"{hover}<extra></extra>"
    return {
        "type": "heatmap",
        "colorscale": scale,
        "colorbar": bar,
        "hovertemplate": template,
        "xgap": 1,
        "ygap": 1,
    } | more


def whole_numbers(count: int, title: str, **more: Any) -> dict[str, Any]:
    """An axis of experts, layers or ranks: no fractions, and each one named if they are few."""
    return (
        {"title": {"text": title}, "showgrid": False, "zeroline": False, "tickformat": "d"}
        | ({"dtick": 1} if count <= 10 else {})
        | more
    )


def rows_height(count: int) -> int:
    """Pixels of a heat-map with so many rows: cells that can be seen, on a page that does not get too long."""
    return 150 + min(max(22 * count, 110), 440)


def depth(place: int, count: int) -> str:
    """The colour of a layer or expert among others, from first to last."""
    return f"depth({place / max(1, count - 1):.3f})"


def groups_of(ranks: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive ranks in at most `most` groups of one size."""
    size = math.ceil(len(ranks) / most)
    return [list(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def names_of(groups: list[list[int]]) -> list[str]:
    """`3`, or `8-15` for a group."""
    return [str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups]


def largest_in_groups(values_RS: Array, groups: list[list[int]]) -> Array:
    """Of each group of consecutive rows the largest value: [groups, S]."""
    ends = np.cumsum([len(group) for group in groups])
    with np.errstate(all="ignore"):
        return np.stack(
            [np.fmax.reduce(values_RS[end - len(g) : end], axis=0) for g, end in zip(groups, ends, strict=True)]
        )


def last_tenth(table: DataFrame) -> DataFrame:
    """The rows of the last tenth of the steps, at least of the last one."""
    last = table["step"].max()
    return table[table["step"] > min(last * 0.9, last - 1)]


def in_percent(value: float) -> str:
    """Two digits that count."""
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}"
