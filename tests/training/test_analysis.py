"""`moe-dist analyse` and `moe-dist hash-table` on a small run."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_dist.cli.main import app
from moe_dist.config import ConfigError, load_config
from moe_dist.routing.tables import SavedTable, load_table, save_table
from moe_dist.training.analysis import config_of_run
from moe_dist.training.data import TextData
from moe_dist.training.hash_tables import table_of
from tests.support.distributed import run_ranks
from tests.support.runs import start, write_config

HASH = ["routing.method=hash", "routing.bias.rule=none", "routing.losses={}"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("analysis"))


def train(tiny: Path, overrides: list[str], folder: Path) -> list[list[list[int]]]:
    """A run; the hash tables of its layers, as this rank has them, if it has any."""
    run = start(tiny, overrides, folder)
    run.run()
    tables = [dict(router.balance.values()).get("table") for router in run.engine.routers]
    return [[] if table is None else table.tolist() for table in tables]


def test_analysis_of_a_run(tiny: Path, tmp_path: Path) -> None:
    overrides = ["training.checkpoint={interval: 4, keep: 3}", "training.evaluation.tokens=256"]
    run_ranks(2, train, tiny, [*overrides, "training.evaluation.interval=8", "parallel.expert=2"], tmp_path / "run")
    last_evaluation = json.loads((tmp_path / "run/routing.json").read_text())
    result = CliRunner().invoke(app, ["analyse", str(tmp_path / "run"), "--tokens", "256"])
    assert result.exit_code == 0, result.output
    analysed = json.loads((tmp_path / "run/routing.json").read_text())
    assert (last_evaluation["step"], last_evaluation["tokens"]) == (analysed["step"], analysed["tokens"]) == (8, 256)
    for number, layer in last_evaluation["layers"].items():
        np.testing.assert_allclose(layer["coactivation"], analysed["layers"][number]["coactivation"], atol=5e-7)
    result = CliRunner().invoke(app, ["analyse", str(tmp_path / "run"), "--tokens", "128"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run/routing.json").read_text())
    assert (found["step"], found["tokens"], list(found["layers"])) == (8, 128, ["1", "2"])
    for layer in found["layers"].values():
        rate_EE = np.array(layer["coactivation"])
        assert rate_EE.shape == (8, 8)
        assert set(np.diag(rate_EE)) <= {0.0, 1.0}
        used = np.diag(rate_EE) > 0
        np.testing.assert_allclose(rate_EE[used].sum(1), 2, rtol=1e-12)  # itself, and the other of k = 2
        assert layer["saturation"].keys() == {"4"}
        assert 0 < layer["saturation"]["4"] <= 1
        assert len(layer["specialisation"]) == len(layer["ids"]) == 8


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DIR: '.*' holds no config.yaml, so no run"):
        config_of_run(tmp_path)


@pytest.mark.parametrize("kind", ["balanced", "random", "clustered", "dispersed"])
def test_a_run_makes_its_table_and_all_ranks_have_it(kind: str, tiny: Path, tmp_path: Path) -> None:
    overrides = [*HASH, f"routing.hash.table={kind}", "training.steps=1", "parallel.expert=2"]
    first, second = run_ranks(2, train, tiny, overrides, tmp_path / "run")
    assert first == second
    config = load_config(tiny, overrides, 2)
    table = table_of(config, TextData(config)).table_VK
    assert np.array(first).shape == (2, *table.shape)
    assert first[0] != first[1]  # permuted anew for each layer
    for layer in np.array(first):  # by one permutation of the experts
        assert len({(a, b) for a, b in zip(layer.ravel(), table.ravel(), strict=True)}) == len(set(table.ravel()))


def test_the_command_saves_the_table_that_a_run_reads(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    words = ["hash-table", str(tiny), *HASH, "routing.hash.table=balanced", "--output", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "MaxVio on the training text" in result.output
    config = load_config(tiny, [*HASH, f"routing.hash.file={path}"])
    np.testing.assert_array_equal(table_of(config, TextData(config)).table_VK, load_table(path).table_VK)


def test_a_table_of_another_size_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    save_table(path, SavedTable(np.zeros((257, 1), dtype=np.int64), "random", 0, 8, np.ones(257, dtype=np.int64)))
    config = load_config(tiny, [*HASH, f"routing.hash.file={path}"])
    with pytest.raises(
        ValueError, match="is for 257 tokens, 1 experts a token and 8 experts; this run has 257, 2 and 8"
    ):
        table_of(config, TextData(config))
