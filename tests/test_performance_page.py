"""docs/performance.md shows what benchmarks/results has, and its tables say what was measured."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where the scripts find each other

import common
import kernels_gpu
import layer
import parts
import performance_tables as tables
import plots
import scaling
from peers import Shape

SHAPE = Shape(4, 8, 16, 2, 2)
OTHER = Shape(4, 8, 16, 4, 2)
RUN = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef-dirty",
    "machine": {"cpu": "A processor", "cores": 2},
    "versions": {"python": "3.11", "torch": "2.13", "deepspeed": None},
    "dtype": "float32",
}


def rows_of(table: str) -> dict[str, list[str]]:
    """Cells by the first one."""
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


def layer_report(ranks: int = 1, load: str = "uniform", dtype: str = "float32") -> dict:
    """As benchmarks/layer.py writes it: forward, backward and total of two rounds in seconds; limit, ours, one peer."""

    def row(*total: float) -> torch.Tensor:
        seconds = torch.tensor(total, dtype=torch.float64)
        return torch.stack([seconds / 3, seconds * 2 / 3, seconds])

    bounds = {"limit": row(0.1, 0.3), **({"heaviest": row(0.2, 0.4)} if load == "zipf" else {})}
    seconds = bounds | {"bmm": row(0.1, 0.3), "moe_dist": row(0.2, 0.28), "megatron": row(0.9, 0.7)}
    result = {
        "shape": vars(SHAPE),
        "gemms": "bmm",
        "gemm_flops_per_second": 7e9,
        "rows": {name: layer.describe_row(value, bounds, SHAPE) for name, value in seconds.items()},
        "left_out": {"hf_eager": "no module"},
        "differing": ["deepspeed"],
    }
    square = {"size": 64, "flops_per_second": 9e9}
    settings = {"ranks": ranks, "load": load, "rounds": 2, "threads_per_rank": 2, "malloc": "default"}
    return {**RUN, **settings, "benchmark": "layer", "device": "cpu", "dtype": dtype, "square_gemm": square} | {
        "shapes": [result]
    }


def memory_report() -> dict:
    row = {"peak": 4e6, "activation": 3e6, "saved": 2e6, "held": 1e6}
    rows = {"moe_dist": row, "megatron": {key: 2 * value for key, value in row.items()}, "wrong": row}
    result = {"shape": vars(SHAPE), "malloc": "default", "rows": rows, "left_out": {}, "differing": ["wrong"]}
    result["repeats"] = {name: [row, row] for name, row in rows.items()}
    return {**RUN, "benchmark": "memory", "device": "cpu", "layers": 4, "shapes": [result]}


def scaling_report() -> dict:
    points = []
    for shape, seconds in ((SHAPE, 0.002), (OTHER, 0.003)):
        rows = scaling.point_rows({"bmm": [0.001]}, {}, {"moe_dist": [seconds]}, shape.tokens)
        points.append({"shape": vars(shape), "ranks": 1, "rows": rows, "differing": {}})
    points[1]["differing"] = {"megatron": 0.5}
    cost = common.summary([0.001])
    fake = {"experts": 8, "ranks": 1024, "path": "static", "build_ms": 2.0, "dispatch": cost, "layer": cost}
    return {**RUN, "benchmark": "scaling", "sweeps": {"experts": points, "ranks": points[:1], "fake ranks": [fake]}}


def parts_report() -> dict:
    operators = [("aten::mm", 1.0), ("mkldnn::_linear_pointwise", 0.5), ("aten::mul_", 0.25), ("aten::empty", 0.125)]
    found = parts.shares(operators, 2)
    times = {"limit_ms": 1.0, "step_ms": 2.0, "profiled_ms": 4.0}
    result = {"shape": vars(SHAPE), "dtype": "bfloat16", **times, "shares": found}
    return {**RUN, "benchmark": "parts", "rounds": 1, "results": [result]}


def dispatch_report() -> dict:
    rows = {}
    for name, seconds, between in (
        ("all-to-all", 0.001, 2e6),
        ("moe_dist", 0.002, 2e6),
        ("moe_dist hierarchical", 0.003, 1e6),
    ):
        rows[name] = common.summary([seconds]) | {"bytes": 3e6, "bytes_between_nodes": between}
    result = {"shape": vars(SHAPE), "load": "zipf", "heaviest_rank": 1.5, "rows": rows, "left_out": {}, "differing": {}}
    return {**RUN, "benchmark": "dispatch", "ranks": 4, "nodes": 2, "rounds": 1, "results": [result]}


def kernels_report() -> dict:
    values = {"torch": torch.ones(2), "triton": torch.ones(2), "off": torch.zeros(2)}
    rows: dict[str, Callable[[], object]] = {name: lambda value=value: [value] for name, value in values.items()}
    case = SimpleNamespace(
        name="swiglu", rows={"torch": rows["torch"], "off": rows["off"], "triton": rows["triton"]}, flops=0
    )
    seconds = {"torch": [0.004], "triton": [0.002]}
    found = kernels_gpu.measure(case, lambda steps: {name: seconds[name] for name in steps})
    return {
        **RUN,
        "benchmark": "kernels",
        "gpu": "A GPU",
        "rounds": 1,
        "shapes": [{"shape": vars(SHAPE), "cases": [found]}],
    }


RECORDS = {
    "layer_cpu_float32": layer_report(),
    "layer_cpu_2ranks_zipf": layer_report(2, "zipf"),
    "memory_cpu": memory_report(),
    "scaling_cpu": scaling_report(),
    "parts_cpu": parts_report(),
    "dispatch_cpu_4ranks": dispatch_report(),
    "kernels_gpu": kernels_report(),
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of those of the repository, with a copy of the page and no records."""
    (tmp_path / "performance.md").write_text(plots.PAGE.read_text())
    monkeypatch.setattr(plots, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    return tmp_path


def test_the_page_shows_the_records() -> None:
    page = plots.PAGE.read_text()
    for kind, name in plots.tables_and_plots(page):
        block = next(found[0] for found in plots.BLOCK.finditer(page) if (found[2], found[3]) == (kind, name))
        assert plots.filled(block) == block, f"{kind} {name}: run benchmarks/plots.py"


def test_the_images_of_the_page_are_there() -> None:
    for name in re.findall(r"\]\(images/([^)]+)\)", plots.PAGE.read_text()):
        assert (plots.IMAGES / name).stat().st_size < 200_000, name


def test_every_record_of_the_page_has_its_command_and_every_plot_a_place() -> None:
    page = plots.PAGE.read_text()
    shown = plots.tables_and_plots(page)
    commands = re.findall(r"python (benchmarks/\w+\.py)[^\n]* --json benchmarks/results/(\w+)\.json", page)
    assert sorted(name for _, name in commands) == sorted(name for kind, name in shown if kind == "table")
    assert all((plots.ROOT / script).exists() for script, _ in commands)
    assert sorted(name for kind, name in shown if kind == "plot") == sorted(plots.PLOTS)
    assert {name for plot in plots.PLOTS.values() for name in plot.records} <= {name for _, name in commands}


def test_no_figure_is_typed_by_hand() -> None:
    prose = plots.BLOCK.sub("", plots.PAGE.read_text())
    prose = re.sub(r"```.*?```|`[^`]*`|\(arXiv [\d.]+\)", "", prose, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d+|\d+ ?(?:%|ms\b|MB\b|times)", prose) == []


def test_without_records_the_page_says_so(elsewhere: Path) -> None:
    page = plots.filled(plots.PAGE.read_text())
    blocks = {(found[2], found[3]): found[0].splitlines()[1:-1] for found in plots.BLOCK.finditer(page)}
    assert blocks["table", "memory_cpu"] == blocks["plot", "layer"] == [plots.NOT_RECORDED]
    assert blocks["table", "kernels_gpu"] == blocks["plot", "gpu"] == [plots.NOT_RUN]
    assert "](images/" not in page


def test_origin() -> None:
    first, second = tables.origin(RECORDS["layer_cpu_2ranks_zipf"], "name").splitlines()
    assert first == "A processor, 2 cores, float32, 2 ranks, 2 threads a rank, 2 rounds, zipf load, malloc default."
    assert second == (
        "[2026-01-02, commit 0123456 with changes](../benchmarks/results/name.json); python 3.11, torch 2.13."
    )
    assert tables.origin(RECORDS["kernels_gpu"], "name").startswith("A GPU, float32, 1 round.\n")


def test_layers_by_medians_and_minima() -> None:
    text = tables.table_of(RECORDS["layer_cpu_float32"], "name")
    rows = rows_of(text)
    assert rows["limit"] == ["200.0 ms, 7 GFLOP/s"]
    assert rows["moe_dist"] == ["1.20 (2.00)"]
    assert rows["megatron"] == ["4.00 (7.00)"]
    assert "bmm" not in rows
    assert "One square GEMM of 64: 9 GFLOP/s" in text
    assert "Left out: hf_eager (no module)." in text
    assert text.endswith("not timed there: deepspeed.")
    skewed = rows_of(tables.layer(RECORDS["layer_cpu_2ranks_zipf"]))
    assert skewed["moe_dist"] == ["0.80 (1.00)"], "over the heaviest rank's time"


def test_memory_beside_the_peer() -> None:
    rows = rows_of(tables.memory(RECORDS["memory_cpu"]))
    assert rows["moe_dist"] == ["4.0 (0.50)", "3.0 (0.50)", "2.0 (0.50)", "1.0 (0.50)"]
    assert "wrong" not in rows


def test_growth_over_the_first_point() -> None:
    text = tables.scaling(RECORDS["scaling_cpu"])
    assert rows_of(text)["4"] == ["250.00, 1.00", "750.00, 1.50, 3.00"]
    assert "E *" in text
    assert "megatron differs at 4, not timed." in text
    assert rows_of(text)["8"] == ["1024", "static", "2.0", "1.00", "1.00"]


def test_parts_add_up_to_the_step() -> None:
    rows = rows_of(tables.parts(RECORDS["parts_cpu"]))
    assert rows["bfloat16"] == ["4, 8, 16, 2, 2", "1.0", "2.0", "4.0", "75 %", "12 %", "0 %", "0 %", "12 %"]


def test_parts_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "parts.json"
    monkeypatch.setattr(sys, "argv", ["parts.py", "--shape", "32,8,8,4,2", "--rounds", "1", "--json", str(file)])
    monkeypatch.setattr(parts, "set_environment", lambda malloc: None)
    monkeypatch.setattr(parts, "run_ranks", lambda ranks, function, *arguments: function(*arguments))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parts.main()
    finally:
        dist.destroy_process_group()
    results = json.loads(file.read_text())["results"]
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        assert sum(result["shares"].values()) == pytest.approx(1)
        assert all(0 < result["shares"][part] < 1 for part in parts.PARTS)
    assert "products" in capsys.readouterr().out


def test_dispatch_over_the_bare_exchange() -> None:
    rows = rows_of(tables.dispatch(RECORDS["dispatch_cpu_4ranks"]))
    assert rows["moe_dist hierarchical"] == ["3.0 (3.0)", "3.00 (3.00)", "3.0", "1.0"]


def test_kernels_over_torch() -> None:
    text = tables.kernels(RECORDS["kernels_gpu"])
    assert "| swiglu | triton | 2.000 | 2.000 | 0.50 |" in text
    assert "swiglu: off differs, not timed." in text


def test_everything_is_drawn_again_alike(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, report in RECORDS.items():
        (elsewhere / f"{name}.json").write_text(json.dumps(report))
    plots.main()
    said = capsys.readouterr().out
    drawn = {path.name: path.read_bytes() for path in elsewhere.glob("*.svg")}
    assert set(drawn) == {f"performance_{name}.svg" for name in plots.PLOTS if name != "gpu"}
    assert "performance_gpu.svg: skipped" in said
    assert "table memory_cpu" not in said
    assert "table layer_cpu_bfloat16: skipped" in said
    assert b">7.0<" not in drawn["performance_layer.svg"], "bars have medians"
    assert b">4.0<" in drawn["performance_layer.svg"], "the number of a bar that is cut"
    page = plots.PAGE.read_text()
    assert plots.filled(page) == page
    assert set(re.findall(r"images/(performance_\w+\.svg)", page)) == set(drawn)
    plots.main()
    assert {path.name: path.read_bytes() for path in elsewhere.glob("*.svg")} == drawn
