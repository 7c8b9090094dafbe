"""The rows of `moe-dist verify`, as data: engines, layouts and what overrides they mean."""

from pathlib import Path

import pytest

from moe_dist.config import ConfigError, layout_of, load_config
from moe_dist.config.verification import (
    default_rows,
    layouts_for,
    load_cases,
    load_reference,
    parse_engines,
    parse_layout,
    rows_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Nothing but defaults: 8 experts, 16 sequences a step, precision auto."""
    (tmp_path / "config.yaml").touch()
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("engine", "num_ranks", "layouts"),
    [
        ("native", 1, ["data"]),
        ("native", 2, ["data", "expert=2", "expert_tensor=2"]),
        ("native", 3, ["data", "expert=3"]),
        ("native", 4, ["data", "expert=2", "expert=4", "expert_tensor=2", "expert_tensor=2,expert=2"]),
        ("native", 8, ["data", "expert=2", "expert=4", "expert=8", "expert_tensor=2", "expert_tensor=2,expert=2"]),
        ("deepspeed", 2, ["data", "expert=2", "tensor=2"]),
        ("deepspeed", 4, ["data", "expert=2", "expert=4", "tensor=2", "tensor=2,expert=2"]),
        (
            "megatron",
            2,
            ["data", "expert=2", "expert_tensor=2", "tensor=2", "pipeline=2", "pipeline=2,pipeline_interleaving=2"],
        ),
        (
            "megatron",
            4,
            [
                *("data", "expert=2", "expert=4", "expert_tensor=2", "tensor=2", "pipeline=2"),
                "pipeline=2,pipeline_interleaving=2",
                *("expert_tensor=2,expert=2", "tensor=2,expert=2"),
            ],
        ),
    ],
)
def test_layouts_are_those_that_the_engine_offers(engine: str, num_ranks: int, layouts: list[str]) -> None:
    assert layouts_for(engine, num_ranks) == layouts


def test_each_layout_has_the_variants_of_its_engine() -> None:
    rows = default_rows(2, ["native", "deepspeed"], None, on_gpu=False)
    assert [str(row) for row in rows] == [
        "native data, sharding=replicate",
        "native data, sharding=full",
        "native expert=2, sharding=replicate",
        "native expert=2, sharding=full",
        "native expert_tensor=2, sharding=replicate",
        "native expert_tensor=2, sharding=full",
        *(f"deepspeed data, zero_stage={stage}" for stage in range(4)),
        *(f"deepspeed expert=2, zero_stage={stage}" for stage in range(3)),  # stage 3 would shard the experts itself
        *(f"deepspeed tensor=2, zero_stage={stage}" for stage in range(3)),
    ]
    assert rows[3].overrides == ("parallel={expert: 2}", "engine={name: native, sharding: full}")
    assert rows[7].overrides == ("parallel={}", "engine={name: deepspeed, zero_stage: 1}")


def test_megatron_is_emulated_without_gpus_only() -> None:
    for on_gpu, emulated in ((False, ", emulate_cuda: true"), (True, "")):
        rows = default_rows(4, ["megatron"], ["tensor=2,expert=2"], on_gpu)
        assert [row.overrides for row in rows] == [
            (
                "parallel={tensor: 2, expert: 2}",
                f"engine={{name: megatron, {variant}{emulated}}}",
            )
            for variant in ("distributed_optimizer: false", "distributed_optimizer: true", "sequence_parallel: true")
        ]
        (_, cut, *_), (_, whole, *_) = (
            default_rows(2, ["deepspeed"], [layout], on_gpu) for layout in ("tensor=2", "expert=2")
        )
        assert cut.overrides[1] == f"engine={{name: deepspeed, zero_stage: 1{emulated}}}"
        assert whole.overrides[1] == "engine={name: deepspeed, zero_stage: 1}"


def test_sequence_parallelism_is_tried_with_tensor_parallelism_only() -> None:
    rows = default_rows(2, ["megatron"], ["data", "expert=2"], on_gpu=False)
    assert {row.variant for row in rows} == {"distributed_optimizer=false", "distributed_optimizer=true"}


def test_interleaved_stages_get_a_micro_batch_each(path: Path) -> None:
    rows = default_rows(2, ["megatron"], ["pipeline=2", "pipeline=2,pipeline_interleaving=2"], on_gpu=False)
    cases = load_cases(path, [], 20, 2, rows)
    assert all(case.config is not None for case in cases), cases
    steps = [layout_of(case.config, 2).accumulation_steps for case in cases if case.config is not None]
    assert steps == [1, 1, 2, 2]


def test_the_layout_of_the_config_comes_first_and_what_means_the_same_is_not_run_twice(path: Path) -> None:
    overrides = ["parallel.expert=2", "engine.sharding=replicate"]
    rows = rows_of(load_config(path, overrides, 2), 2, ["native"], None, on_gpu=False)
    cases = load_cases(path, overrides, 20, 2, rows)
    assert [str(case.row) for case in cases] == [
        "native expert=2, as configured",
        "native data, sharding=replicate",
        "native data, sharding=full",
        "native expert=2, sharding=full",
        "native expert_tensor=2, sharding=replicate",
        "native expert_tensor=2, sharding=full",
    ]
    assert all(case.config is not None for case in cases)
    only = rows_of(load_config(path, overrides, 2), 2, ["native"], ["data"], on_gpu=False)
    assert {row.layout for row in only} == {"data"}


@pytest.mark.parametrize(
    ("layout", "overrides", "reason"),
    [
        ("tensor=2", [], "parallel.tensor: 2 is not offered by engine.name: native"),
        ("expert=4", [], "--ranks: 2 is not valid; it should be 4 or a multiple of it"),
        (
            "data",
            ["training.micro_batch_size=4", "routing.losses.load_balance={coefficient: 0.1, scope: global_batch}"],
            "depends on the layout: routing.losses.load_balance.scope: global_batch with accumulation",
        ),
    ],
)
def test_what_cannot_be_run_says_why(path: Path, layout: str, overrides: list[str], reason: str) -> None:
    for case in load_cases(path, overrides, 20, 2, default_rows(2, ["native"], [layout], on_gpu=False)):
        assert case.config is None
        assert case.reason.startswith(reason), case.reason


def test_all_train_alike_in_a_precision_that_can_be_compared(path: Path) -> None:
    overrides = ["parallel.expert=2", "training.schedule={warmup_steps: 10}", "training.steps=7"]
    for precision, verified in (("auto", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        training = load_reference(path, [*overrides, f"training.precision={precision}"], 20).training
        assert training.precision == verified
        assert (training.steps, training.schedule.name, training.schedule.warmup_steps) == (20, "constant", 0)


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps", "rate"),
    [(0, 20, 1e-3), (4, 2, 3.75e-4), (4, 4, 6.25e-4), (4, 20, 9.25e-4), (100_000, 20, 1.05e-7)],
)
def test_the_rate_is_the_mean_of_the_warm_up(path: Path, warmup_steps: int, num_steps: int, rate: float) -> None:
    overrides = [f"training.schedule={{warmup_steps: {warmup_steps}}}", "training.optimizer.learning_rate=1.0e-3"]
    (case,) = load_cases(path, overrides, num_steps, 1, default_rows(1, ["native"], ["data"], on_gpu=False))[:1]
    assert case.config is not None
    for config in (case.config, load_reference(path, overrides, num_steps)):
        assert config.training.optimizer.learning_rate == pytest.approx(rate, rel=1e-2)


def test_the_reference_is_native_on_one_rank(path: Path) -> None:
    reference = load_reference(path, ["parallel={expert: 2, overlap_chunks: 2}"], 20)
    assert (reference.parallel, reference.engine.sharding) == (type(reference.parallel)(), "replicate")


def test_what_depends_on_the_layout_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"group: rank .*: depends on the layout by its nature, so layouts differ"):
        load_reference(path, ["routing={capacity: {factor: 1.0}, group: rank}"], 20)


@pytest.mark.parametrize("layout", ["experts=2", "expert", "expert=0", "expert=x", "", "data,expert=2"])
def test_a_layout_that_is_none(layout: str) -> None:
    with pytest.raises(
        ConfigError,
        match="valid are data, or sizes of expert, expert_tensor, tensor, context, pipeline, pipeline_interleaving, such as",
    ):
        parse_layout(layout)


def test_engines() -> None:
    assert parse_engines("deepspeed, native") == ["deepspeed", "native"]
    assert "native" in parse_engines(None)
    with pytest.raises(ConfigError, match="--engines: there is no 'fsdp'; valid are native, deepspeed, megatron"):
        parse_engines("native,fsdp")
