"""Draws the plots of docs/performance.md and writes its tables, from the records in benchmarks/results.

    python benchmarks/plots.py

Needs matplotlib. Between `<!-- table: NAME -->` and `<!-- end -->` the page gets the tables of benchmarks/results/NAME.json,
between `<!-- plot: NAME -->` and `<!-- end -->` the image of that plot, or in both the line that nothing is recorded. So the
page holds no figure that was typed by hand, and tests/test_performance_page.py can tell whether it shows the records.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layer_tables import NOT_LAYERS
from performance_tables import shape_text, table_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"

NOT_RECORDED = "*Not recorded yet.*"
NOT_RUN = "*Not run on hardware.*"
BLOCK = re.compile(r"(<!-- (table|plot): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

COLOURS = {
    "limit": "#888888",
    "all-to-all": "#888888",
    "moe_dist": "#1f4e9c",
    "moe_dist hierarchical": "#6fa8dc",
    "plain torch": "#8c6d46",
    "megatron": "#d95f0e",
    "megatron_fused": "#f08c42",
    "megatron_grouped": "#f7b27a",
    "megatron_allgather": "#b0413e",
    "megatron_allgather_fused": "#d98880",
    "megatron alltoall": "#d95f0e",
    "megatron allgather": "#b0413e",
    "deepspeed": "#2e7d32",
    "deepspeed_autoep": "#81c784",
    "hf_eager": "#6a3d9a",
    "hf_grouped_mm": "#b39ddb",
    "torchtitan": "#444444",
    "products": "#1f4e9c",
    "activation": "#d95f0e",
    "rows": "#2e7d32",
    "plan": "#b39ddb",
    "calls": "#bbbbbb",
}
HIGHEST_RATIO = 3.0
"""Bars are cut here, and their number is written on them."""


class Bar(NamedTuple):
    """One row in one group of bars."""

    height: float
    least: float | None = None
    """Gets a mark."""


Groups = dict[str, dict[str, Bar]]
"""The bars of each group, by the group's label and the row's name."""


class Plot(NamedTuple):
    """Which records it shows, one above the other, and how."""

    records: tuple[str, ...]
    draw: Callable[[Any, dict], None]
    caption: str


def main() -> None:
    for name, plot in PLOTS.items():
        if reports := recorded(plot.records):
            save(name, plot, reports)
            print(f"{image_of(name).name}: drawn")
        else:
            print(f"{image_of(name).name}: skipped, none of {', '.join(plot.records)} is in {RESULTS.name}")
    page = PAGE.read_text()
    for kind, name in tables_and_plots(page):
        if kind == "table" and not recorded([name]):
            print(f"table {name}: skipped, there is no {name}.json in {RESULTS.name}")
    PAGE.write_text(filled(page))


def recorded(names: Sequence[str]) -> dict[str, dict]:
    """The records of these names that are there."""
    files = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def image_of(plot: str) -> Path:
    return IMAGES / f"performance_{plot}.svg"


def tables_and_plots(page: str) -> list[tuple[str, str]]:
    """Kind and name of each block of the page."""
    return [(block[2], block[3]) for block in BLOCK.finditer(page)]


def filled(page: str) -> str:
    """The page with what its blocks should hold."""
    return BLOCK.sub(lambda block: f"{block[1]}{content(block[2], block[3])}\n{block[4]}", page)


def content(kind: str, name: str) -> str:
    """What stands in a block of the page."""
    names = PLOTS[name].records if kind == "plot" else (name,)
    if not (reports := recorded(names)):
        return NOT_RUN if all("gpu" in name for name in names) else NOT_RECORDED
    if kind == "plot":
        return f"![{PLOTS[name].caption}](images/{image_of(name).name})"
    return table_of(reports[name], name)


def save(name: str, plot: Plot, reports: dict[str, dict]) -> None:
    """A small SVG file that does not change if the numbers do not."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    pyplot.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 8})
    figure, panels = pyplot.subplots(
        len(reports), figsize=(8.6, 2.8 * len(reports) + 0.2), layout="constrained", squeeze=False
    )
    for axes, report in zip(panels.flat, reports.values(), strict=True):
        plot.draw(axes, report)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    entries = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False)
    figure.savefig(image_of(name), metadata={"Date": None})
    pyplot.close(figure)


def draw_bars(axes: Any, groups: Groups, highest: float | None = None) -> None:
    """Bars of one colour a row, a group beside the other; a black line marks the least."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        at = [
            group + (place - (len(names) - 1) / 2) * width for group, bars in enumerate(groups.values()) if name in bars
        ]
        bars = [bars[name] for bars in groups.values() if name in bars]
        axes.bar(at, [bar.height for bar in bars], width * 0.92, color=COLOURS.get(name, "#bbbbbb"), label=name)
        for x, bar in zip(at, bars, strict=True):
            if bar.least is not None:
                axes.hlines(bar.least, x - 0.46 * width, x + 0.46 * width, color="black", linewidth=0.9)
            if highest and bar.height > highest:
                number = f"{bar.height:.1f}"
                axes.text(x, highest * 0.97, number, rotation=90, ha="center", va="top", color="white", fontsize=6)
    axes.set_xticks(range(len(groups)), groups)
    if highest:
        axes.set_ylim(0, min(highest, 1.08 * max(bar.height for bars in groups.values() for bar in bars.values())))


def draw_ratios(axes: Any, report: dict) -> None:
    """Time of our default and of the peers over the bound that belongs to the loads."""
    bound = "heaviest" if all("heaviest" in result["rows"] for result in report["shapes"]) else "limit"
    groups = {
        "E {experts}, k {top_k}\n{tokens}, {hidden}, {ffn}".format(**result["shape"]): {
            name: Bar(row[f"median_of_{bound}"], row[f"min_of_{bound}"])
            for name, row in result["rows"].items()
            if name not in NOT_LAYERS and not name.startswith("moe_dist_")
        }
        for result in report["shapes"]
    }
    draw_bars(axes, groups, HIGHEST_RATIO)
    axes.axhline(1, color="black", linewidth=0.8)
    ranks = "one rank" if report["ranks"] == 1 else f"{report['ranks']} ranks"
    axes.set(ylabel=f"time / {bound}", title=f"{report['dtype']}, {report['load']} load, {ranks}")


def draw_memory(axes: Any, report: dict) -> None:
    groups = {
        "E {experts}, k {top_k}: {tokens}, {hidden}, {ffn}\nmalloc {malloc}".format(**result["shape"], **result): {
            name: Bar(row["peak"] / 1e6, min(repeat["peak"] for repeat in result["repeats"][name]) / 1e6)
            for name, row in result["rows"].items()
            if name not in result["differing"]
        }
        for result in report["shapes"]
    }
    draw_bars(axes, groups)
    axes.set(ylabel="peak, MB", title=f"{report['layers']} layers, {report['dtype']}")


def draw_scaling(axes: Any, report: dict) -> None:
    points = report["sweeps"]["experts"]
    for name in dict.fromkeys(name for point in points for name in point["rows"]):
        line = [(point["shape"]["experts"], point["rows"][name]) for point in points if name in point["rows"]]
        experts, rows = zip(*line, strict=True)
        axes.plot(experts, [row["us_per_token"] for row in rows], "o-", color=COLOURS[name], label=name, markersize=4)
    axes.set(
        xscale="log", xlabel="experts", ylabel="us a token", title=shape_text({**points[0]["shape"], "experts": "*"})
    )
    axes.set_xticks(ticks := [point["shape"]["experts"] for point in points], ticks)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def draw_parts(axes: Any, report: dict) -> None:
    """A step over the limit, divided by the parts' shares."""
    results = report["results"]
    ratios = [result["step_ms"] / result["limit_ms"] for result in results]
    bottom = [0.0] * len(results)
    for part in results[0]["shares"]:
        heights = [ratio * result["shares"][part] for ratio, result in zip(ratios, results, strict=True)]
        axes.bar(range(len(results)), heights, 0.7, bottom, color=COLOURS[part], label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    labels = [
        "{dtype}\nE {experts}, k {top_k}\n{tokens}\n{hidden}, {ffn}".format(**r["shape"], dtype=r["dtype"])
        for r in results
    ]
    axes.set_xticks(range(len(results)), labels)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time / limit", title="a step of moe_dist")


def draw_traffic(axes: Any, report: dict) -> None:
    groups = {
        "E {experts}, k {top_k}\n{tokens}, {hidden}\n{load}".format(**result["shape"], load=result["load"]): {
            name: Bar(row["bytes_between_nodes"] / 1e6)
            for name, row in result["rows"].items()
            if name.startswith(("moe_dist", "megatron"))
        }
        for result in report["results"]
    }
    draw_bars(axes, groups)
    axes.set(ylabel="MB a rank and step", title=f"{report['ranks']} ranks as {report['nodes']} nodes")


PLOTS = {
    "layer": Plot(
        ("layer_cpu_float32", "layer_cpu_bfloat16"), draw_ratios, "One rank: time over the limit, ours and the peers"
    ),
    "ranks": Plot(
        ("layer_cpu_2ranks", "layer_cpu_2ranks_zipf"), draw_ratios, "Two ranks: time over the limit, ours and the peers"
    ),
    "memory": Plot(("memory_cpu",), draw_memory, "Peak memory of a stack of layers, ours and the peers"),
    "experts": Plot(("scaling_cpu",), draw_scaling, "Cost a token against the number of experts"),
    "parts": Plot(("parts_cpu",), draw_parts, "A step of our layer over the limit, by what takes the time"),
    "traffic": Plot(("dispatch_cpu_4ranks",), draw_traffic, "Bytes between nodes, flat and hierarchical"),
    "gpu": Plot(("layer_gpu_bfloat16",), draw_ratios, "One GPU: time over the limit, ours and the peers"),
}


if __name__ == "__main__":
    main()
