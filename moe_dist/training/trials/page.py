"""The Pareto plot of a comparison as one HTML file that needs nothing else, with its numbers as a table below."""

from html import escape

from plotly import graph_objects
from plotly.io import to_html

from moe_dist.training.trials.plan import Run
from moe_dist.training.trials.results import DEFINITIONS, Trial, headings, notes, rows

LEAST = 0.01
"""MaxVio below this is drawn here: the axis is logarithmic, and exactly balanced methods have 0."""
TICKS = [LEAST, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
FRONT, OTHER = "#1f6fd0", "#75757d"  # on both backgrounds, with white numbers on them

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #ffffff; --line: #d5d5da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --paper: #17171a; --line: #44444c; } }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; font: 16px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; }
.plot { height: 26rem; }
.plot .xtick text, .plot .ytick text, .plot .xtitle, .plot .ytitle { fill: var(--ink) !important; }
.plot .gridlayer path { stroke: var(--line) !important; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:nth-child(2), td:nth-child(2), th:nth-child(3), td:nth-child(3) { text-align: left; }
td { overflow-wrap: break-word; }
@media (max-width: 40rem) { .plot { max-width: 22rem; } }
@media (max-width: 60rem) {
  thead { display: none; }
  tr { display: block; padding: 0.6rem 0; border-bottom: 1px solid var(--line); }
  td, td:nth-child(2), td:nth-child(3) { display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: 0.1rem 0; text-align: right; overflow-wrap: anywhere; }
  td::before { content: attr(data-heading); text-align: left; opacity: 0.75; }
}
"""

FOLLOW_WIDTH = """
const plot = document.querySelector(".js-plotly-plot");
new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot.closest(".plot"));
"""


def page(trials: list[Trial], runs: list[Run], title: str) -> str:
    """A whole HTML page: mean validation loss against mean MaxVio_global of each trial that has both."""
    plot = to_html(_figure(trials), include_plotlyjs=True, full_html=False, config={"displayModeBar": False})
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes(trials, runs))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>How to read it: each large circle is a trial, numbered as in the table; small dots are its seeds. Left is better balanced, down
is a lower loss. Blue trials, joined by the line, are the Pareto front: no other trial is better in both.</p>
<div class="plot">{plot}</div>
{_table(trials)}
<ul>{remarks}</ul>
<p>{escape(DEFINITIONS)}</p>
<script>{FOLLOW_WIDTH}</script>
</body>
</html>
"""


def _figure(trials: list[Trial]) -> graph_objects.Figure:
    figure = graph_objects.Figure()
    drawn = [
        (number, trial, trial.means["max_vio_global"], trial.means["val_loss"])
        for number, trial in enumerate(trials, 1)
        if trial.finished
    ]
    front = sorted((_shown(x), y) for _, trial, x, y in drawn if trial.on_front)
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": FRONT, "width": 1.5},
        hoverinfo="skip",
    )
    for number, trial, x, y in drawn:
        color = FRONT if trial.on_front else OTHER
        seeds = [outcome.numbers for outcome in trial.finished]
        figure.add_scatter(
            x=[_shown(seed["max_vio_global"]) for seed in seeds],
            y=[seed["val_loss"] for seed in seeds],
            mode="markers",
            marker={"color": color, "size": 7, "opacity": 0.5},
            hovertext=[f"{trial.name}, seed {outcome.seed}" for outcome in trial.finished],
            hoverinfo="text",
        )
        figure.add_scatter(
            x=[_shown(x)],
            y=[y],
            mode="markers+text",
            marker={"color": color, "size": 20, "opacity": 0.9},
            text=[str(number)],
            textfont={"color": "#ffffff", "size": 11},
            hovertext=f"{trial.name}: loss {y:.4f}, MaxVio_global {x:.3f}",
            hoverinfo="text",
        )
    figure.update_layout(
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 10, "r": 15, "t": 10, "b": 10},
        hoverlabel={"bgcolor": "#33333a", "font": {"color": "#ffffff"}},
        xaxis={
            "title": "MaxVio_global",
            "type": "log",
            "tickvals": TICKS,
            "ticktext": [f"≤ {LEAST}", *(f"{tick:g}" for tick in TICKS[1:])],
            "automargin": True,
        },
        yaxis={"title": "validation loss", "automargin": True, "zeroline": False},
    )
    return figure


def _shown(max_vio: float) -> float:
    return max(max_vio, LEAST)


def _table(trials: list[Trial]) -> str:
    names = [heading or "number" for heading in headings()]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings())
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-heading="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(names, cells, strict=True)
        )
        + "</tr>"
        for cells in rows(trials)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
