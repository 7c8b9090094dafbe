"""`moe-dist verify` as a user meets it: the table, the exit codes, what fails, and how mistakes end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.cli.main import app
from tests.support.runs import write_config

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
"""Seconds after which a test gives up: many times what anything here takes."""

PLANTED = """
from moe_dist.engines.native import NativeEngine

accumulate = NativeEngine.accumulate


def faulty(self, *args):
    result = accumulate(self, *args)
    for name, parameter in self.model.named_parameters():
        if ".moe.experts." in name:
            parameter.grad.div_(self.layout.expert)
    return result


NativeEngine.accumulate = faulty
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that make configs/quickstart.yaml tiny."""
    text = write_config(tmp_path_factory.mktemp("config")).parent / "text"
    return [
        "model={hidden_size: 32, num_layers: 3, num_dense_layers: 1, num_heads: 2, ffn_size: 48, qk_norm: head}",
        "moe.ffn_size=16",
        f"data={{source: files, paths: ['{text}']}}",
        "training.global_batch_size=4",
        "training.sequence_length=32",
        "training.precision=bfloat16",
        "training.evaluation.interval=null",
    ]


def run(small: list[str], *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "moe_dist", "verify", "configs/quickstart.yaml", *small, "--ranks", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=outer | environment, timeout=TIMEOUT)


def rows(stdout: str) -> dict[str, list[str]]:
    """The lines of the table by engine and layout, in columns."""
    lines = (line.split("  ") for line in stdout.partition("engine  ")[2].splitlines()[1:])
    cells = ([cell.strip() for cell in line if cell.strip()] for line in lines)
    return {f"{engine} {layout}": rest for engine, layout, *rest in (line for line in cells if len(line) > 2)}


def test_rows_are_the_same_and_what_is_not_offered_says_why(small: list[str], tmp_path: Path) -> None:
    options = ["--engines", "native", "--steps", "4", "--layouts", "data expert=2 expert=4", "--output", str(tmp_path)]
    result = run(small, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(
        "4 steps in float32 (training.precision: bfloat16 rounds too coarsely to compare), constant learning rate; 2 ranks"
    )
    found = rows(result.stdout)
    assert list(found) == [
        f"native {layout}, sharding={sharding}"
        for layout in ("data", "expert=2", "expert=4")
        for sharding in ("replicate", "full")
    ]
    for name, (*figures, verdict) in found.items():
        assert verdict in (["not run"] if "expert=4" in name else ["same", "same, but for a flip"])
        if verdict == "same":
            weights, first_loss, losses, norm, loads, biases, gradients, parameter = figures
            assert (weights, loads, biases) == ("0", "0", "0")
            assert float(first_loss) <= 1e-6
            assert float(gradients) <= 1e-5
            assert max(float(losses), float(norm)) <= 1e-4
            assert parameter.endswith((".weight", "w_gate", "w_up", "w_down"))
    rows_not_run = "native expert=4, sharding=replicate; native expert=4, sharding=full"
    assert f"{rows_not_run}: not run: --ranks: 2 is not valid; it should be 4 or" in result.stdout
    records = json.loads((tmp_path / "verify.json").read_text())
    assert [record["verdict"] for record in records] == [cells[-1] for cells in found.values()]
    assert {record["engine"] for record in records} == {"native"}
    assert records[0]["failures"] == []


def test_a_row_that_differs_ends_with_exit_code_1(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    options = ["--engines", "native", "--steps", "2", "--layouts", "expert=2"]
    result = run(small, *options, "parallel.expert=2", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("2 of 2 rows differ from the reference")
    assert {cells[-1] for cells in rows(result.stdout).values()} == {"DIFFERS"}
    assert "native expert=2, sharding=full: step 0: gradient of layers.1.experts." in result.stdout
    assert "more differences" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "fsdp"], "--engines: there is no 'fsdp'; valid are native, deepspeed, megatron"),
        (
            ["--layouts", "experts=2"],
            "--layouts: 'experts=2' is not valid; valid are data, or sizes of expert, expert_tensor",
        ),
        (["--steps", "1"], "Invalid value for '--steps'"),
        (["routing.top_k=9"], "routing.top_k: 9 is more than moe.num_experts = 8"),
        (
            ["routing.losses.load_balance.scope=micro_batch"],
            "micro_batch (loads of one rank's forward): depends on the layout",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(ROOT / "configs/quickstart.yaml"), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("moe-dist: error: ")
    assert message in result.stderr
    assert result.stdout == ""


def in_a_worker(monkeypatch: pytest.MonkeyPatch, local_num_ranks: int, *arguments: str) -> str:
    variables = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local_num_ranks}
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    result = CliRunner().invoke(app, ["verify", str(ROOT / "configs/quickstart.yaml"), *arguments])
    assert result.exit_code == 2
    return result.stderr


def test_ranks_and_launcher_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    told = in_a_worker(monkeypatch, 4, "--ranks", "2")
    assert "--ranks: 2 is not valid; the launcher started 4 ranks, so leave it out" in told


def test_several_nodes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--output: needed on several nodes: a folder on storage that all of them share" in in_a_worker(
        monkeypatch, 2
    )
