"""What the routers did: MaxVio, load, bias, drops, and experts that go together.

Shape letters: S steps shown, N layers, E experts.
"""

import json
from typing import Any

import numpy as np
from pandas import DataFrame

from moe_dist.telemetry.report.figures import (
    Array,
    Shown,
    Trace,
    depth,
    heat_map,
    in_percent,
    last_tenth,
    line,
    numbers,
    over_steps,
    rows_height,
    thin,
    thinned,
    thinning_note,
    whole_numbers,
)
from moe_dist.telemetry.report.page import Plot, Section

MOST_POINTS = 300
"""Steps of the lines of each layer."""
LOAD_CELLS = 150_000
"""Cells of all load heat-maps together; each costs about six bytes."""
BIAS_POINTS = 60_000
"""Points of all biases together."""
COACTIVATION_CELLS = 70_000
NO_LINES = "There is no line in metrics.jsonl yet; it is written every telemetry.interval steps."


def max_vio(runs: list[Shown]) -> Section:
    """MaxVio of each layer over the steps, of one step and of all steps of a line, with their noise floors."""
    plots = []
    for shown in runs:
        for name, title in (("max_vio_batch", "one step"), ("max_vio_global", "the steps of a line together")):
            if name in shown.run.balance and shown.run.balance[name].notna().any():
                plots.append(_max_vio(shown, name, title, len(runs)))
    how = (
        "How far the busiest expert of a layer is above the mean: 0 is perfect balance, 1 is twice the mean; at or below the "
        "dashed noise floor a layer is as balanced as random choices would make it."
    )
    if not plots:
        return Section("MaxVio over time", NO_LINES)
    most = max(shown.run.balance["step"].nunique() for shown in runs)
    return Section("MaxVio over time", how, _on_one_scale(plots), thinning_note(most, MOST_POINTS))


def _max_vio(shown: Shown, name: str, title: str, num_runs: int) -> Plot:
    table = thinned(shown.run.balance, MOST_POINTS)
    value_SN = table.pivot_table(index="step", columns="layer", values=name, dropna=False)
    traces = _lines_of_layers(value_SN)
    floor_S = _noise_floor(shown, table)
    if name == "max_vio_global":
        steps = shown.run.steps.set_index("step")["steps"].reindex(floor_S.index)
        floor_S = floor_S / np.sqrt(steps)  # the floor falls with the square root of the number of pairs
    if floor_S.notna().any():
        traces.append(line(floor_S.index, floor_S, "noise floor", "--text", "dash"))
    worst = last_tenth(table).groupby("layer")[name].mean()
    label = (
        f"Line plot of MaxVio over steps, a line for each layer, {title}, run {shown.name}. Over the last tenth of the steps the "
        f"worst layer is {worst.idxmax()} with {worst.max():.3f}."
    )
    layout = over_steps("MaxVio", rangemode="tozero")
    return Plot(label, traces, layout, f"{shown.name}: {title}" if num_runs > 1 else title.capitalize())


def _noise_floor(shown: Shown, table: DataFrame) -> Any:
    """MaxVio of random choices at each step, from what is recorded as a multiple of it; NaN where it is not."""
    known = table[(table["max_vio_over_noise"] > 0)] if "max_vio_over_noise" in table else table.iloc[:0]
    ratio = known["max_vio_batch"] / known["max_vio_over_noise"] if len(known) else known["step"].astype(float)
    return ratio.groupby(known["step"]).median().reindex(table["step"].unique())


def _lines_of_layers(value_SN: DataFrame) -> list[Trace]:
    """A line for each layer, coloured by depth; many layers have a colour scale instead of a legend."""
    count, few = value_SN.shape[1], value_SN.shape[1] <= 8
    traces = [
        line(value_SN.index, value_SN[layer], f"layer {layer}", depth(place, count), showlegend=few)
        for place, layer in enumerate(value_SN.columns)
    ]
    if not few:
        layers = numbers(value_SN.columns)
        bar = heat_map("", "", "--depth", "layer", "")["colorbar"] | {"y": 1.12}
        marker = {
            "color": [layers[0], layers[-1]],
            "colorscale": "--depth",
            "showscale": True,
            "colorbar": bar,
            "size": 0.1,
        }
        x = numbers(value_SN.index[:2])
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": x,
                "y": [None] * len(x),
                "marker": marker,
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
    return traces


def load(runs: list[Shown]) -> Section:
    """Heat-maps layer x expert over the steps, as counts: the page divides them by the mean of their layer."""
    recorded = [shown for shown in runs if len(shown.run.experts)]
    if not recorded:
        return Section("Load of experts", NO_LINES)
    plots, notes = [], []
    for shown in recorded:
        table = shown.run.experts
        size = table["layer"].nunique() * table["expert"].nunique()
        all_steps = shown.run.steps["step"].nunique()
        steps = thin(table["step"].unique(), max(1, min(100, LOAD_CELLS // (size * len(recorded)))))
        load_SNE = [_matrix(table[table["step"] == step], "load") for step in steps]
        plots.append(_load(shown, steps, load_SNE, len(runs)))
        notes += thinning_note(all_steps, len(steps), f"logging steps of {shown.name}")
    how = (
        "Each cell is the load of an expert of a layer, over all ranks and the steps since the line before, relative to the mean "
        "of its layer: 1 (neutral) is balanced, 2 is twice the mean; a column or cell that keeps its colour over the steps is a lasting preference."
    )
    return Section("Load of experts", how, plots, ["Colours end at twice the mean.", *notes], slider="step")


def _load(shown: Shown, steps: list[int], load_SNE: list[DataFrame], num_runs: int) -> Plot:
    last_NE = load_SNE[-1]
    relative_NE = last_NE.div(last_NE.mean(axis=1), axis=0)
    layer, expert = relative_NE.stack().idxmax()
    num_layers, num_experts = last_NE.shape
    hover = "layer %{y}, expert %{x}<br>%{z:.3f} x the mean<br>%{customdata:,} pairs"
    trace = heat_map("expert", "layer", "--diverging", "load / mean load of the layer", hover, zmin=0, zmax=2)
    trace |= {"x": numbers(last_NE.columns), "y": numbers(last_NE.index)}
    if num_experts > 64:
        trace |= {"xgap": 0}
    layout = {
        "xaxis": whole_numbers(num_experts, "expert"),
        "yaxis": whole_numbers(num_layers, "layer", autorange="reversed"),
    }
    frames = [[{"counts": numbers(load_NE)}] for load_NE in load_SNE]
    label = (
        f"Heat-map of the load of each layer and expert of run {shown.name}. After step {steps[-1]} the largest is "
        f"{relative_NE.loc[layer, expert]:.2f} times the mean: layer {layer}, expert {expert}."
    )
    title = shown.name if num_runs > 1 else ""
    return Plot(label, [trace], layout, title, rows_height(num_layers), frames, [int(step) for step in steps])


def bias(runs: list[Shown]) -> Section:
    """Biases of the experts over the steps: each one, or quantiles where there are many experts; a layer at a time."""
    recorded = [shown for shown in runs if len(shown.run.experts) and (shown.run.experts["bias"].fillna(0) != 0).any()]
    missing = [shown.name for shown in runs if shown not in recorded]
    if not recorded:
        return Section(
            "Bias of experts", "No expert has a bias: routing.bias.rule turns on loss-free balancing, which moves one."
        )
    how = (
        "What loss-free balancing adds to the scores of an expert before tokens choose: curves that level off mean it has found "
        "its balance, curves that keep spreading mean that it fights the router."
    )
    plots = [_bias(shown, len(runs), len(recorded)) for shown in recorded]
    notes = [f"{name} uses no bias." for name in missing]
    return Section("Bias of experts", how, _on_one_scale(plots), notes, slider="layer")


def _bias(shown: Shown, num_runs: int, num_recorded: int) -> Plot:
    table = shown.run.experts
    layers, num_experts = table["layer"].unique(), table["expert"].nunique()
    quantiles = {"largest": 1.0, "90 %": 0.9, "median": 0.5, "10 %": 0.1, "smallest": 0.0}
    each = num_experts <= 16
    names = [f"expert {expert}" for expert in range(num_experts)] if each else list(quantiles)
    steps = thin(
        table["step"].unique(), max(10, min(MOST_POINTS, BIAS_POINTS // (len(layers) * len(names) * num_recorded)))
    )
    table = table[table["step"].isin(steps)]
    traces = [
        line([], [], name, depth(place, len(names)), showlegend=len(names) <= 8) for place, name in enumerate(names)
    ]
    frames = []
    for layer in layers:
        value_SE = table[table["layer"] == layer].pivot(index="step", columns="expert", values="bias")
        curves = value_SE.T if each else value_SE.quantile(list(quantiles.values()), axis=1)
        frames.append([{"x": numbers(value_SE.index), "y": numbers(curve, 4)} for curve in curves.to_numpy()])
    label = f"Line plot of the bias of {'each expert' if each else 'the experts, in quantiles,'} over steps, a layer at a time, run {shown.name}."
    return Plot(label, traces, over_steps("bias"), shown.name if num_runs > 1 else "", 340, frames, numbers(layers))


def drops(runs: list[Shown]) -> Section:
    """Share of the pairs that capacity removed, by layer."""
    recorded = [shown for shown in runs if "drop_rate" in shown.run.balance]
    if not recorded:
        return Section("Drops", NO_LINES)
    dropping = [shown for shown in recorded if (shown.run.balance["drop_rate"] > 0).any()]
    if not dropping:
        return Section(
            "Drops", "No token was dropped by any expert: nothing to show. Only routing.capacity drops tokens."
        )
    plots = []
    for shown in dropping:
        value_SN = thinned(shown.run.balance, MOST_POINTS).pivot_table(
            index="step", columns="layer", values="drop_rate"
        )
        mean = last_tenth(shown.run.steps)["drop_rate"].mean()
        label = f"Line plot of the drop rate over steps, a line for each layer, run {shown.name}. Over the last tenth of the steps the mean is {in_percent(mean)}."
        plots.append(
            Plot(
                label,
                _lines_of_layers(value_SN),
                over_steps("share dropped", tickformat=".1~%", rangemode="tozero"),
                shown.name if len(runs) > 1 else "",
            )
        )
    notes = [f"{shown.name} dropped nothing." for shown in recorded if shown not in dropping]
    how = "Share of the token-expert pairs that found their expert full: those tokens go on without that expert."
    return Section("Drops", how, _on_one_scale(plots), notes)


def coactivation(runs: list[Shown]) -> Section:
    """How often a token of one expert uses another, on held-out text; from routing.json."""
    found = {shown.name: _read_coactivation(shown) for shown in runs}
    recorded = [shown for shown in runs if found[shown.name]]
    how_to_get = "`moe-dist analyse DIR` measures it on held-out text, after which `moe-dist report DIR` shows it."
    if not recorded:
        return Section(
            "Experts that go together", f"Not measured: there is no routing.json in the folder. {how_to_get}"
        )
    plots, notes = [], []
    for shown in recorded:
        layers = found[shown.name]
        first = next(iter(layers.values()))
        numbers_of_layers = thin(list(layers), max(1, COACTIVATION_CELLS // (first.size * len(recorded))))
        plots.append(_coactivation(shown, {number: layers[number] for number in numbers_of_layers}, len(runs)))
        notes += thinning_note(len(layers), len(numbers_of_layers), f"layers of {shown.name}")
    notes += [f"{shown.name} has no routing.json. {how_to_get}" for shown in runs if shown not in recorded]
    how = (
        "Of the held-out tokens that use the expert of a row, the share that use the expert of the column too; bright pairs work "
        "as one expert and are best kept on one rank."
    )
    return Section("Experts that go together", how, plots, notes, slider="layer")


def _read_coactivation(shown: Shown) -> dict[int, Array]:
    path = shown.run.path / "routing.json"
    layers = json.loads(path.read_text())["layers"] if path.exists() else {}
    return {int(number): np.array(layer["coactivation"]) for number, layer in layers.items() if "coactivation" in layer}


def _coactivation(shown: Shown, layers: dict[int, Array], num_runs: int) -> Plot:
    rate_NEE = {
        number: np.where(np.eye(len(rate_EE), dtype=bool), np.nan, rate_EE) for number, rate_EE in layers.items()
    }
    num_experts = len(next(iter(rate_NEE.values())))
    top = max((np.nanmax(rate_EE) for rate_EE in rate_NEE.values() if rate_EE.size > 1), default=0.0)
    hover = "of the tokens of expert %{y},<br>%{z:.1%} use expert %{x} too"
    trace = heat_map(
        "expert", "expert", "--sequential", "share of the row's tokens", hover, zmin=0, zmax=float(top) or 1.0
    )
    trace["colorbar"] |= {"tickformat": ".0%"}
    if num_experts > 32:
        trace |= {"xgap": 0, "ygap": 0}
    axes = {
        "xaxis": whole_numbers(num_experts, "too"),
        "yaxis": whole_numbers(num_experts, "of expert", autorange="reversed"),
    }
    frames = [[{"z": numbers(rate_EE, 3)}] for rate_EE in rate_NEE.values()]
    label = f"Heat-map of how often two experts are used by the same token, a layer at a time, run {shown.name}; at most {in_percent(float(top))}."
    return Plot(label, [trace], axes, shown.name if num_runs > 1 else "", 440, frames, list(rate_NEE))


def _matrix(table: DataFrame, name: str) -> DataFrame:
    return table.pivot(index="layer", columns="expert", values=name)


def _on_one_scale(plots: list[Plot]) -> list[Plot]:
    """The same range of y for all, so that runs side by side can be compared."""
    values = [
        value
        for plot in plots
        for trace in (*plot.data, *(change for frame in plot.frames or [] for change in frame))
        for value in trace.get("y", [])
        if value is not None
    ]
    if not values:
        return plots
    low, high = min(0.0, *values), max(values)
    room = 0.05 * (high - low) or 1.0
    for plot in plots:
        plot.layout["yaxis"] |= {"range": [low - room if low < 0 else 0, high + room]}
    return plots
