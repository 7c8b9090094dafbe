"""`moe-dist config`: what a config means, without starting anything."""

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from moe_dist.cli.arguments import ConfigFile, Overrides, Ranks
from moe_dist.config import Config, Layout, dump_config, layout_dependence, layout_of, load_config
from moe_dist.config.layout import layers_of_stage, owner_of_expert
from moe_dist.config.methods import FEATURES, METHODS
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.routing_checks import keys_that_look_ahead
from moe_dist.config.size import size_of
from moe_dist.config.support import ENGINES, SUPPORT

T = TypeVar("T")

MOST_ROWS = 16
"""Rows, groups or runs of numbers up to which all are shown."""


def config(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Print the resolved configuration, the layout of ranks and the routing it means, and what depends on the layout."""
    resolved = load_config(config, overrides, ranks)
    layout = layout_of(resolved, ranks)
    console = Console(markup=False)
    parts = (
        dump_config(resolved).rstrip(),
        _batch(resolved, layout),
        _layout(resolved, layout),
        *([_stages(resolved, layout)] if layout.pipeline > 1 else []),
        _experts(resolved, layout),
        _parameters(resolved),
        _routing(resolved.routing),
        _support(),
        _dependence(resolved, layout),
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
        console.print()


def _batch(config: Config, layout: Layout) -> str:
    return (
        f"{config.training.global_batch_size} sequences a step = {layout.data} data-parallel ranks "
        f"x micro-batch {layout.micro_batch_size} x {layout.accumulation_steps} accumulation steps"
    )


def _layout(config: Config, layout: Layout) -> Table:
    table = _table(f"Layout of {layout.num_ranks} ranks", "", "size", "groups of ranks")
    table.add_row("data parallel", str(layout.data), _groups(layout.data_groups()))
    slices = layout.expert_tensor
    size = f"{layout.expert} x {slices}" if slices > 1 else str(layout.expert)
    table.add_row("expert parallel", size, _groups(layout.expert_groups()))
    if config.parallel.dispatch == "hierarchical":
        node, groups = config.parallel.ranks_per_node, layout.expert_groups()
        inside = [group[i : i + node] for group in groups for i in range(0, len(group), node)] if node else []
        between = [group[i::node] for group in groups for i in range(node)] if node else []
        table.add_row("  inside a node", str(node or "as launched"), _groups(inside))
        table.add_row("  between nodes", str(len(groups[0]) // node if node else "as launched"), _groups(between))
    if slices > 1:
        table.add_row("expert tensor parallel", str(slices), _groups(layout.expert_tensor_groups()))
    table.add_row("expert data parallel", str(layout.expert_data), _groups(layout.expert_data_groups()))
    if layout.tensor > 1:
        name = "tensor and sequence parallel" if config.engine.sequence_parallel else "tensor parallel"
        table.add_row(name, str(layout.tensor), _groups(layout.tensor_groups()))
    if layout.context > 1:
        table.add_row("context parallel", str(layout.context), _groups(layout.context_groups()))
    if layout.pipeline > 1:
        table.add_row("pipeline stages", str(layout.pipeline), _groups(layout.stages()))
    return table


def _stages(config: Config, layout: Layout) -> Table:
    table = _table("Layers of stages", "pipeline stage", "layers")
    for stage in _abbreviated(range(layout.pipeline)):
        chunks = [] if stage is None else layers_of_stage(config, stage)
        table.add_row("..." if stage is None else str(stage), _groups(chunks) or "...")
    return table


def _experts(config: Config, layout: Layout) -> Table:
    slices = layout.expert_tensor
    table = _table("Owners of the experts", "expert-parallel rank", "ranks", "experts")
    owners, groups = owner_of_expert(config), layout.expert_data_groups()
    for place in _abbreviated(range(layout.expert)):
        if place is None:
            table.add_row("...", "...", "...")
        else:
            experts = [expert for expert, owner in enumerate(owners) if owner == place]
            ranks = sorted(rank for group in groups[place * slices : (place + 1) * slices] for rank in group)
            table.add_row(str(place), _numbers(ranks), _numbers(experts))
    return table


def _parameters(config: Config) -> Table:
    size = size_of(config)
    table = _table("Parameters", "", "total", "used by one token")
    for name, total, active in (
        ("routed experts", size.experts, size.active_experts),
        ("everything else", size.rest, size.rest),
        ("all", size.experts + size.rest, size.active_experts + size.rest),
    ):
        table.add_row(name, f"{total:,}", f"{active:,}")
    return table


def _routing(routing: RoutingConfig) -> Table:
    method = METHODS[routing.method]
    looking_ahead = keys_that_look_ahead(routing)
    table = _table("Routing", "method", routing.method)
    table.add_row("what it does", method.summary)
    table.add_row("experts of a token", f"{routing.top_k} on average" if method.varies else str(routing.top_k))
    table.add_row("causal in training", f"no, by {' and '.join(looking_ahead)}" if looking_ahead else "yes")
    if method.uses_group:
        by_prices = "causal: a token's own scores, less averages of the prices that balanced the training steps"
        table.add_row("in evaluation", by_prices if routing.evaluation == "causal" else "as in training")
    table.add_row("equal loads", "yes, in every routing group" if method.exact else "no")
    weights = {"hash": routing.hash.weights, "gatepro_ot": routing.gatepro_ot.weights}
    if weights.get(routing.method) == "constant":
        table.add_row("weights", "constant: routing.score and routing.renormalise are not used")
    for place, reason in enumerate(dict.fromkeys(method.refused.values())):
        names = ", ".join(name for key, name in FEATURES.items() if method.refused.get(key) == reason)
        table.add_row("" if place else "refuses", f"{names}: {reason}")
    return table


def _support() -> Table:
    table = _table("What each engine offers", "", *ENGINES)
    for key, reasons in SUPPORT.items():
        table.add_row(f"{key} above 1", *("no" if reasons[engine] else "yes" for engine in ENGINES))
    return table


def _dependence(config: Config, layout: Layout) -> str:
    notes = layout_dependence(config, layout)
    return "\n  ".join(["What depends on the layout:", *notes] if notes else ["What depends on the layout: nothing"])


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _groups(groups: list[list[int]]) -> str:
    """`[0-3] [4-7] ... [60-63]`."""
    return " ".join("..." if group is None else f"[{_numbers(group)}]" for group in _abbreviated(groups))


def _numbers(numbers: list[int]) -> str:
    """`0-3, 7`: rising numbers, with runs of them drawn together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(word or "..." for word in _abbreviated(words))


def _abbreviated(items: Sequence[T]) -> list[T | None]:
    """All items if they are few; otherwise the first two, None and the last."""
    return [*items] if len(items) <= MOST_ROWS else [*items[:2], None, items[-1]]
