"""The experiments that the documents report: their configs, how their numbers are summed up, and that the text has them."""

import json

import pytest

from benchmarks import loss_free
from moe_dist.config import load_config

GRID = [loss_free.Run(method, value, 2) for method, values in loss_free.GRID.items() for value in values]
LOOK = [
    loss_free.Run(method, value, loss_free.LOOK_SEED) for method, values in loss_free.LOOK.items() for value in values
]


@pytest.mark.parametrize("run", [*GRID, *LOOK], ids=lambda run: run.name)
def test_every_run_of_loss_free_is_what_its_name_says(run):
    config = load_config(loss_free.CONFIG, loss_free.overrides(run), 1)
    balancing = (config.routing.losses.load_balance.coefficient, config.routing.bias.rule)
    assert balancing == ((float(run.value), "none") if run.method == "alpha" else (0, run.method))
    assert run.method == "alpha" or config.routing.bias.rate == float(run.value)
    assert config.training.seed == run.seed
    assert (config.training.steps == loss_free.LOOK_STEPS) == (run.seed == loss_free.LOOK_SEED)


@pytest.mark.parametrize("rule", loss_free.LOOK)
def test_rates_of_the_grid_are_the_two_that_balanced_best_in_the_look(rule):
    look = [run for run in json.loads(loss_free.RESULTS.read_text())["look"] if run["method"] == rule]
    assert [run["value"] for run in look] == list(loss_free.LOOK[rule])
    best = sorted(look, key=lambda run: run["max_vio_global"])[:2]
    assert {run["value"] for run in best} == set(loss_free.GRID[rule])


MADE_UP = [
    {
        "method": method,
        "value": value,
        "seed": seed,
        "val_loss": loss,
        "max_vio_global": 0.5,
        "max_vio_batch": 1.0 + seed,
    }
    for method, value, losses in [
        ("alpha", "1e-2", (2.0, 2.5)),
        ("alpha", "0", (2.1, 2.2)),
        ("sign", "1e-2", (2.0, 2.4)),
    ]
    for seed, loss in enumerate(losses)
]


def test_table_has_mean_and_spread_of_the_seeds():
    rows = loss_free.table(MADE_UP).splitlines()
    assert rows[0] == "| balancing | validation loss | MaxVio_global | MaxVio_batch |"
    assert rows[2] == "| alpha 1e-2 | 2.250 (2.000 to 2.500) | 0.500 (0.500 to 0.500) | 1.500 (1.000 to 2.000) |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| alpha 1e-2", "| alpha 0", "| sign, u = 1e-2"]


def test_judgement_is_against_the_alpha_of_lowest_loss_seed_by_seed():
    rows = loss_free.judgement(MADE_UP).splitlines()
    assert rows[0] == "| less alpha 0 | mean | seed 0 | seed 1 |"
    assert rows[2:] == ["| alpha 1e-2 | +0.100 | -0.100 | +0.300 |", "| sign, u = 1e-2 | +0.050 | -0.100 | +0.200 |"]


def test_measure_takes_the_last_evaluation_and_the_last_quarter_of_the_batches(tmp_path):
    run = loss_free.Run("sign", "1e-2", 0)
    steps = [
        {"step": step, "loss": 1.0, "balance": {"mean": {"max_vio_batch": step / 10}}} for step in (10, 20, 30, 40)
    ]
    evaluations = [{"step": step, "val_loss": 3.0 - step / 40, "max_vio_global": step / 80} for step in (20, 40)]
    (tmp_path / run.name).mkdir()
    lines = [json.dumps(record) + "\n" for record in sorted(steps + evaluations, key=lambda record: record["step"])]
    (tmp_path / run.name / "metrics.jsonl").write_text("".join(lines))
    numbers = loss_free.measure(run, tmp_path)
    assert (numbers["val_loss"], numbers["max_vio_global"], numbers["max_vio_batch"]) == (2.0, 0.5, 4.0)


def test_the_document_has_the_tables_of_the_recorded_numbers():
    results = json.loads(loss_free.RESULTS.read_text())
    document = (loss_free.ROOT / "docs/experiments.md").read_text()
    for part in (
        loss_free.table(results["look"]),
        loss_free.table(results["runs"]),
        loss_free.judgement(results["runs"]),
    ):
        assert part in document
