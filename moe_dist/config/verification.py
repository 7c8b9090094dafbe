"""What `moe-dist verify` runs: the reference, and a row for each engine and layout, as overrides of the config.

A layout is written as on the command line: `expert=2,expert_tensor=2`, or `data` where all ranks hold everything.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.errors import ConfigError
from moe_dist.config.layout import layout_dependence, layout_of
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.config.support import ENGINES, SUPPORT

SIZES = ("expert", "expert_tensor", "tensor", "context", "pipeline", "pipeline_interleaving")
"""Keys of `parallel` that a layout may name."""

TRIED = (2, 4)
"""Sizes tried by default, where they divide the ranks; for experts also the number of ranks."""

VARIANTS: dict[str, tuple[str, ...]] = {
    # engine -> what is tried of it in every layout
    "native": ("sharding=replicate", "sharding=full"),
    "deepspeed": ("zero_stage=0", "zero_stage=1", "zero_stage=2", "zero_stage=3"),
    "megatron": ("distributed_optimizer=false", "distributed_optimizer=true", "sequence_parallel=true"),
}


@dataclass(frozen=True)
class Row:
    """One engine on one layout."""

    engine: str
    layout: str
    variant: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.engine} {', '.join(filter(None, (self.layout, self.variant)))}"


@dataclass(frozen=True)
class Case:
    """A row with its config, or with the reason why it is not run."""

    row: Row
    config: Config | None
    reason: str = ""


REFERENCE = Row("native", "one rank", "", ("parallel={}", "engine={name: native, sharding: replicate}"))


def common_overrides(config: Config, num_steps: int) -> list[str]:
    """A constant learning rate, and a precision in which differences mean something.

    The rate is the mean of the warm-up over these steps: at the peak a model that is not warmed up may leave attention with
    gradients that all but cancel, of which float32 itself is off by more than the bound.
    """
    precision, warmup_steps = config.training.precision, max(1, config.training.schedule.warmup_steps)
    part_of_peak = sum(min(1, (step + 1) / warmup_steps) for step in range(num_steps)) / num_steps
    return [
        f"training.steps={num_steps}",
        "training.schedule={name: constant}",
        f"training.optimizer.learning_rate={config.training.optimizer.learning_rate * part_of_peak:.3g}",
        "training.checkpoint.keep=2",  # the states of the reference
        f"training.precision={precision if precision in ('float32', 'float64') else 'float32'}",
    ]


def load_reference(path: Path, overrides: list[str], num_steps: int) -> Config:
    """The config of the reference. Raises ConfigError for a mistake in the config, or where layouts cannot be compared."""
    common = common_overrides(load_config(path, overrides), num_steps)
    config = load_config(path, [*overrides, *common, *REFERENCE.overrides], 1)
    if notes := layout_dependence(config, layout_of(config, 1)):
        raise ConfigError(
            "\n".join(f"{note}: depends on the layout by its nature, so layouts differ" for note in notes)
        )
    return config


def load_cases(path: Path, overrides: list[str], num_steps: int, num_ranks: int, rows: list[Row]) -> list[Case]:
    """The rows with their configs, as far as they are offered; of rows that mean the same, the first."""
    common = common_overrides(load_config(path, overrides), num_steps)
    cases: list[Case] = []
    for row in rows:
        try:
            config = load_config(path, [*overrides, *common, *row.overrides], num_ranks)
        except ConfigError as error:
            cases.append(Case(row, None, str(error).splitlines()[0]))
            continue
        if notes := layout_dependence(config, layout_of(config, num_ranks)):
            cases.append(Case(row, None, f"depends on the layout: {notes[0]}"))
        elif config not in [case.config for case in cases]:
            cases.append(Case(row, config))
    return cases


def rows_of(config: Config, num_ranks: int, engines: list[str], layouts: list[str] | None, on_gpu: bool) -> list[Row]:
    """The layout of the config itself, if its engine is among them and no layouts are named; then the default rows."""
    rows = default_rows(num_ranks, engines, layouts, on_gpu)
    if layouts or config.engine.name not in engines:
        return rows
    sizes = [f"{key}={size}" for key in SIZES if (size := getattr(config.parallel, key)) > 1]
    return [Row(config.engine.name, ",".join(sizes) or "data", "as configured", ()), *rows]


def default_rows(num_ranks: int, engines: list[str], layouts: list[str] | None, on_gpu: bool) -> list[Row]:
    """A row for each engine, layout and variant, in this order.

    Args:
        layouts: those to try. None: what each engine offers of expert, expert tensor, tensor and pipeline parallelism, in
            sizes that divide the ranks.
        on_gpu: otherwise Megatron-Core has to be emulated.
    """
    rows = []
    for engine in engines:
        for layout in layouts or layouts_for(engine, num_ranks):
            sizes = parse_layout(layout)
            parallel = ", ".join(f"{key}: {size}" for key, size in sizes.items())
            for variant in VARIANTS[engine]:
                if variant == "zero_stage=3" and max(sizes.get("expert", 1), sizes.get("tensor", 1)) > 1:
                    continue  # there ZeRO shards the experts itself
                if variant == "sequence_parallel=true" and sizes.get("tensor", 1) == 1:
                    continue
                settings = [f"name={engine}", variant]
                if not on_gpu and (engine == "megatron" or (engine == "deepspeed" and sizes.get("tensor", 1) > 1)):
                    settings.append("emulate_cuda=true")
                section = ", ".join(setting.replace("=", ": ") for setting in settings)
                rows.append(Row(engine, layout, variant, (f"parallel={{{parallel}}}", f"engine={{{section}}}")))
    return rows


def layouts_for(engine: str, num_ranks: int) -> list[str]:
    """`data`, each kind of parallelism that the engine offers alone, and those that fold over each other together."""
    sizes = [size for size in TRIED if num_ranks % size == 0]
    offered = {key: not SUPPORT[f"parallel.{key}"][engine] for key in SIZES}
    found = ["data"]
    if offered["expert"]:
        found += [f"expert={size}" for size in sorted({*sizes, num_ranks} - {1})]
    if num_ranks % 2 == 0:
        found += [f"{key}=2" for key in ("expert_tensor", "tensor", "pipeline") if offered[key]]
        found += ["pipeline=2,pipeline_interleaving=2"] if offered["pipeline_interleaving"] else []
    if num_ranks % 4 == 0:
        found += [f"{key}=2,expert=2" for key in ("expert_tensor", "tensor") if offered["expert"] and offered[key]]
    return found


def parse_layout(layout: str) -> dict[str, int]:
    """`expert=2,tensor=2` -> the sizes; empty for `data`. Raises ConfigError."""
    sizes = {}
    for part in layout.split(",") if layout != "data" else ():
        key, _, size = part.partition("=")
        if key not in SIZES or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--layouts: {layout!r} is not valid; valid are data, or sizes of {', '.join(SIZES)}, such as expert=2,tensor=2"
            )
        sizes[key] = int(size)
    return sizes


def parse_engines(text: str | None) -> list[str]:
    """`native,deepspeed` -> the names; by default all that this version has. Raises ConfigError."""
    names = text.replace(",", " ").split() if text else list(ENGINES)
    if wrong := [name for name in names if name not in ENGINES]:
        raise ConfigError(f"--engines: there is no {wrong[0]!r}; valid are {', '.join(ENGINES)}")
    return names
