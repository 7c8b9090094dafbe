"""What the ranks did: rows computed, waiting, traffic, time by stage, memory and hardware.

Shape letters: R ranks, G groups of ranks, S steps.
"""

from typing import Any

import numpy as np
from pandas import DataFrame

from moe_dist.telemetry.report.figures import (
    MOST_LINES,
    MOST_ROWS,
    Shown,
    Trace,
    depth,
    groups_of,
    heat_map,
    in_percent,
    largest_in_groups,
    line,
    names_of,
    numbers,
    over_steps,
    rows_height,
    thinned,
    thinning_note,
    whole_numbers,
)
from moe_dist.telemetry.report.overview import idle_share
from moe_dist.telemetry.report.page import Plot, Section
from moe_dist.telemetry.tables import STAGES

MOST_POINTS = 300
NO_LINES = "There are no records in load/ yet; each rank writes them every telemetry.interval steps."


def load(runs: list[Shown]) -> Section:
    """Rows computed and time waited, by rank."""
    recorded = [shown for shown in runs if len(shown.run.ranks)]
    if not recorded:
        return Section("Load and waiting of ranks", NO_LINES)
    plots = []
    for shown in recorded:
        table = shown.run.ranks.copy()
        table["relative"] = table["computed"] / table.groupby("step")["computed"].transform("mean")
        table["waited"] = table["idle"] * table["steps"] / table["seconds"]
        of_run = f"{shown.name}: " if len(runs) > 1 else ""
        busiest = table.groupby("rank")["relative"].mean()
        label = f"Rows computed by each rank over steps, relative to the mean of the ranks, run {shown.name}; on average most by rank {busiest.idxmax()}, {busiest.max():.3f} times the mean."
        plots.append(
            _of_ranks(
                table,
                "relative",
                label,
                f"{of_run}rows computed / mean of the ranks",
                "--diverging",
                "load / mean load",
                {"zmin": 0, "zmax": 2},
                "%{z:.3f} x the mean",
            )
        )
        if table["waited"].notna().any():
            label = f"Share of each rank's step time that it waited for the slowest of its peers, run {shown.name}; on average {in_percent(idle_share(shown))}."
            plots.append(
                _of_ranks(
                    table,
                    "waited",
                    label,
                    f"{of_run}waiting for the slowest rank",
                    "--sequential",
                    "share of step time",
                    {"zmin": 0},
                    "%{z:.2%} of step time",
                )
            )
    how = (
        "Left, the work of each rank: 1 is an equal share; right, the part of its step time that a rank waits until the slowest of "
        "its peers has computed its experts, which is what imbalance costs."
    )
    return Section("Load and waiting of ranks", how, plots, _notes(recorded))


def _of_ranks(
    table: DataFrame, name: str, label: str, title: str, scale: str, legend: str, z: dict[str, Any], hover: str
) -> Plot:
    """Lines for a few ranks, a heat-map for many."""
    value_RS = thinned(table, MOST_POINTS).pivot(index="rank", columns="step", values=name)
    ranks = [int(rank) for rank in value_RS.index]
    percent = {"tickformat": ".1~%"} if name == "waited" else {}
    if len(ranks) <= MOST_LINES:
        traces = [
            line(
                value_RS.columns,
                row,
                f"rank {rank}",
                depth(place, len(ranks)),
                ("solid", "dash", "dot")[place % 3],
                showlegend=len(ranks) <= 8,
            )
            for place, (rank, row) in enumerate(zip(ranks, value_RS.to_numpy(), strict=True))
        ]
        return Plot(label, traces, over_steps("", rangemode="tozero", **percent), title)
    groups = groups_of(ranks, MOST_ROWS)
    trace = heat_map("step", "rank", scale, legend, "step %{x}, rank %{y}<br>" + hover, **z)
    trace |= {
        "x": numbers(value_RS.columns),
        "y": names_of(groups),
        "z": numbers(largest_in_groups(value_RS.to_numpy(), groups), 4),
        "xgap": 0,
    }
    if percent:
        trace["colorbar"] |= percent
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "rank"}, "type": "category", "autorange": "reversed", "nticks": 12},
    }
    return Plot(label, [trace], layout, title, rows_height(len(groups)))


def _notes(recorded: list[Shown]) -> list[str]:
    notes = []
    for shown in recorded:
        num_ranks, logged = shown.run.ranks["rank"].nunique(), shown.run.steps["step"].nunique()
        read = shown.run.ranks["step"].nunique()
        if num_ranks > MOST_ROWS:
            size = len(groups_of(range(num_ranks), MOST_ROWS)[0])
            notes.append(
                f"A row stands for {size} consecutive ranks of {shown.name}, and shows the largest value of them."
            )
        if read < logged:
            notes.append(
                f"Of the records of {shown.name}'s ranks, {read} of {logged} lines were read, evenly spaced: they are large."
            )
        notes += thinning_note(read, MOST_POINTS, f"lines of {shown.name}")
    return notes


def traffic(runs: list[Shown]) -> Section:
    """Bytes from rank to rank, a step, over all MoE layers."""
    recorded = [shown for shown in runs if len(shown.run.traffic)]
    if not recorded:
        return Section("Traffic between ranks", NO_LINES)
    plots, notes = [], []
    for shown in recorded:
        plots.append(_traffic(shown, len(runs)))
        layers = shown.run.layers_of_ranks
        inside, between = layers["bytes_inside_node"].sum(), layers["bytes_between_nodes"].sum()
        if total := inside + between:
            notes.append(
                f"{shown.name}: of all that was given to all-to-alls in forward passes, {between / total:.1%} crossed nodes."
            )
    how = (
        "Each cell is what the rank of the row sent to the rank of the column in the dispatch of a step's forward passes, over all "
        "MoE layers; the diagonal stays on the rank. A bright column is a rank with busy experts."
    )
    return Section("Traffic between ranks", how, plots, notes)


def _traffic(shown: Shown, num_runs: int) -> Plot:
    table = shown.run.traffic
    num_steps = shown.run.ranks.drop_duplicates("step")["steps"].sum()
    ranks = sorted(set(table["rank"]) | set(table["peer"]))
    groups = groups_of(ranks, MOST_ROWS)
    place = {rank: number for number, group in enumerate(groups) for rank in group}
    bytes_GG = np.full((len(groups), len(groups)), np.nan)
    summed = table.groupby([table["rank"].map(place), table["peer"].map(place)])["bytes_sent"].sum()
    for (source, peer), value in summed.items():
        bytes_GG[source, peer] = value / num_steps
    names = names_of(groups)
    hover = "rank %{y} to rank %{x}<br>%{z:.4s}B a step"
    trace = heat_map("to rank", "from rank", "--sequential", "bytes a step", hover, zmin=0)
    trace |= {"x": names, "y": names, "z": numbers(bytes_GG)}
    trace["colorbar"] |= {"tickformat": "~s", "ticksuffix": "B", "nticks": 5}
    if len(groups) > 16:
        trace |= {"xgap": 0, "ygap": 0}
    axes = {"type": "category", "showgrid": False, "nticks": 10}
    layout = {
        "xaxis": axes | {"title": {"text": "to rank"}},
        "yaxis": axes | {"title": {"text": "from rank"}, "autorange": "reversed"},
    }
    away = sum(value for (source, peer), value in summed.items() if source != peer) / max(1, summed.sum())
    label = f"Heat-map of bytes sent from rank to rank, run {shown.name}; {away:.1%} leave their {'rank' if len(groups) == len(ranks) else 'group of ranks'}."
    title = shown.name if num_runs > 1 else ""
    return Plot(label, [trace], layout, title, max(300, rows_height(len(groups))))


def stages(runs: list[Shown]) -> Section:
    """Seconds of a step's forward passes by layer and stage, mean of ranks and lines."""
    recorded = [shown for shown in runs if shown.run.layers_of_ranks["experts"].notna().any()]
    if not recorded:
        told = "No stage was timed." if any(len(shown.run.ranks) for shown in runs) else NO_LINES
        return Section("Time by stage", told)
    plots = []
    for shown in recorded:
        mean = shown.run.layers_of_ranks.groupby("layer")[STAGES].mean() * 1000
        traces: list[Trace] = [
            {
                "type": "bar",
                "name": stage,
                "x": numbers(mean.index),
                "y": numbers(mean[stage]),
                "marker": {"color": f"--c{place}"},
                "hovertemplate": "%{y:.3f} ms",
            }
            for place, stage in enumerate(STAGES)
        ]
        total = mean.sum()
        share = ", ".join(f"{stage} {total[stage] / total.sum():.0%}" for stage in STAGES)
        layout = {
            "barmode": "stack",
            "xaxis": whole_numbers(len(mean), "layer"),
            "yaxis": {"title": {"text": "milliseconds"}},
            "hovermode": "x unified",
        }
        plots.append(
            Plot(
                f"Stacked bars of milliseconds by layer and stage, run {shown.name}: {share}.",
                traces,
                layout,
                shown.name if len(runs) > 1 else "",
            )
        )
    high = max(
        sum(trace["y"][place] or 0 for trace in plot.data) for plot in plots for place in range(len(plot.data[0]["y"]))
    )
    for plot in plots:
        plot.layout["yaxis"] |= {"range": [0, high * 1.05]}
    how = (
        "Time of an MoE layer in the forward passes of a step, mean of the ranks and of the timed steps: route and combine are "
        "overhead, dispatch is the network (and waiting for the others), experts is the useful work."
    )
    return Section("Time by stage", how, plots)


HARDWARE = {
    "gpu_percent": "GPU use (%)",
    "gpu_memory_used": "GPU memory used (bytes)",
    "power_watts": "Power (W)",
    "temperature_celsius": "Temperature (°C)",
    "sm_clock_mhz": "SM clock (MHz)",
    "memory_clock_mhz": "Memory clock (MHz)",
    "nvlink_bytes_per_second": "NVLink (bytes a second)",
    "pcie_sent_bytes_per_second": "PCIe sent (bytes a second)",
    "pcie_received_bytes_per_second": "PCIe received (bytes a second)",
    "cpu_percent": "CPU use (%)",
    "host_memory_percent": "Host memory (%)",
}


def hardware(runs: list[Shown]) -> Section:
    """Counters of each rank's hardware, and its memory."""
    plots, notes = [], []
    for shown in runs:
        of_run = f"{shown.name}: " if len(runs) > 1 else ""
        samples, memory = shown.run.hardware, shown.run.ranks
        for table, columns in (
            (samples, HARDWARE),
            (memory, {"device_peak": "Peak device memory (bytes)", "host": "Memory of the process (bytes)"}),
        ):
            for name, title in columns.items():
                if name in table and table[name].notna().any():
                    plots.append(_counter(table, name, of_run + title, shown.name))
        notes += _warnings(shown)
        if not len(samples):
            notes.append(f"{shown.name} has no hardware samples: `pip install nvidia-ml-py` where there are GPUs.")
    if not plots:
        return Section("Hardware", NO_LINES)
    how = "Each rank's counters over the steps; a rank whose clock or use lies below the others slows all of them down."
    return Section("Hardware", how, plots, notes)


def _counter(table: DataFrame, name: str, title: str, run: str) -> Plot:
    """A line for each rank, or where there are many the lowest, the mean and the highest of them."""
    value_RS = thinned(table, MOST_POINTS).pivot(index="rank", columns="step", values=name).astype(float)
    if len(value_RS) <= MOST_LINES:
        rows = {f"rank {rank}": row for rank, row in zip(value_RS.index, value_RS.to_numpy(), strict=True)}
    else:
        rows = {"highest rank": value_RS.max(), "mean": value_RS.mean(), "lowest rank": value_RS.min()}
    traces = [
        line(
            value_RS.columns,
            row,
            key,
            depth(place, len(rows)),
            ("solid", "dash", "dot")[place % 3],
            showlegend=len(rows) <= 8,
        )
        for place, (key, row) in enumerate(rows.items())
    ]
    label = f"Line plot of {title} over steps, run {run}; mean {value_RS.to_numpy()[np.isfinite(value_RS.to_numpy())].mean():.4g}."
    return Plot(label, traces, over_steps("", rangemode="tozero", tickformat="~s"), title, 240)


def _warnings(shown: Shown) -> list[str]:
    """Ranks with memory errors, or slowed down by their GPU."""
    table, notes = shown.run.hardware, []
    if "ecc_errors" in table and (table["ecc_errors"] > 0).any():
        ranks = sorted(table.loc[table["ecc_errors"] > 0, "rank"].unique())
        notes.append(
            f"{shown.name}: uncorrected ECC errors on rank {', '.join(map(str, ranks))}: have these GPUs looked at."
        )
    if "throttle_reasons" in table:
        throttled = table[table["throttle_reasons"].map(lambda reasons: isinstance(reasons, list) and bool(reasons))]
        for rank, rows in throttled.groupby("rank"):
            reasons = sorted({reason for row in rows["throttle_reasons"] for reason in row})
            notes.append(
                f"{shown.name}: the GPU of rank {rank} was throttled ({', '.join(reasons)}) in {len(rows)} of its samples."
            )
    return notes
