"""benchmarks/layer.py: its problem is what it says, its table and JSON are whole, and a wrong layer is not timed.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where the scripts find each other

import layer
import layer_tables
from peers import COMPETITORS, LOADS, OURS, PRESETS, Problem, Shape, make_problem, reference
from peers.ours import Ours
from peers.problem import CLEAR_GAP, chosen_experts, zipf_shares

ROOT = Path(__file__).parents[1]
SHAPE = Shape(64, 32, 16, 4, 2)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_two_ranks_with_skewed_loads_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    arguments = ["--shape", "64,32,16,4,2", "--ranks", "2", "--load", "zipf", "--rounds", "2", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/layer.py", *arguments, "--peers", ",".join([*OURS, "hf_eager"])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    report = json.loads(file.read_text())
    assert {"commit", "machine", "versions", "ranks", "dtype", "load", "square_gemm", "tolerance"} < set(report)
    (result,) = report["shapes"]
    exchanges = ["all-to-all", "all-to-all as routed"]
    assert list(result["rows"]) == ["limit", "heaviest", "loop of mm", "bmm", *exchanges, *OURS]
    assert not result["differing"]
    assert list(result["left_out"]) == ["hf_eager"]
    assert max(error for errors in result["largest_differences"].values() for error in errors.values()) < 1e-4
    # Of shares 24/25, 12/25, 8/25 and 6/25 of the tokens, rank 0 owns the first two.
    assert result["heaviest_rank"] == pytest.approx(36 / 25, rel=0.1)
    for row in result["rows"].values():
        assert len(row["rounds_ms"]) == 2
        assert row["median_of_limit"] == pytest.approx(row["median_ms"] / result["rows"]["limit"]["median_ms"])
        assert row["min_of_heaviest"] == pytest.approx(row["min_ms"] / result["rows"]["heaviest"]["min_ms"])
    for name in [
        *result["rows"],
        "hf_eager: left out (one rank only",
        "| x heaviest",
        *(f"| {name} |" for name in OURS),
    ]:
        assert f"\n{name}" in run.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_layers_agree_and_a_wrong_one_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, one_rank: None, dtype: torch.dtype
) -> None:
    class Wrong(Ours):
        def run_backward(self) -> None:
            super().run_backward()
            self.layer.experts.w_down.grad[1] *= 1.5

    class Absent(Ours):
        def build(self, problem: Problem, **moe: object) -> torch.nn.Module:
            raise ImportError("no such package")

    monkeypatch.setitem(COMPETITORS, "wrong", Wrong)
    monkeypatch.setitem(COMPETITORS, "absent", Absent)
    names = [*OURS, "wrong", "absent"]
    options = argparse.Namespace(peers=names, dtype=str(dtype).removeprefix("torch."), load="uniform", rounds=1)
    result = layer.measure(make_problem(SHAPE, 0, 1, dtype=dtype), options)
    assert list(result["rows"]) == ["limit", "loop of mm", "bmm", *OURS]
    assert result["differing"] == ["wrong"]
    wrong = result["largest_differences"]["wrong"]
    assert [key for key, error in wrong.items() if error > layer.TOLERANCE[options.dtype]] == ["down gradient"]
    assert result["left_out"] == {"absent": "no such package"}
    report = {"device": "cpu", "tolerance": layer.TOLERANCE[options.dtype]}
    assert "wrong: DIFFERS from the reference, not timed (down gradient by" in layer_tables.table(result, report)


def test_overview_has_a_column_for_every_shape_and_a_row_for_every_layer() -> None:
    def rows(**medians: float) -> dict:
        row = {"forward_flops_per_second": 3e14, "backward_flops_per_second": 4e14}
        return {name: row | {"median_of_limit": value, "min_of_limit": 1} for name, value in medians.items()}

    shapes = [{"shape": vars(SHAPE), "rows": rows(limit=1, bmm=1, ours=1.1)}]
    shapes.append({"shape": vars(Shape(8, 4, 2, 4, 2)), "rows": rows(limit=1, ours=1.2, other=1.3)})
    report = {"device": "cpu", "shapes": shapes}
    assert layer_tables.overview(report).splitlines() == [
        "| x limit: median (min) | 64, 32, 16, 4, 2 | 8, 4, 2, 4, 2 |",
        "|---|---|---|",
        "| ours | 1.10 (1.00) | 1.20 (1.00) |",
        "| other | - | 1.30 (1.00) |",
    ]
    on_gpu = layer_tables.overview(report | {"device": "some GPU"})
    assert on_gpu.splitlines()[3] == "| other | - | 1.30 (1.00), 300 / 400 TFLOP/s |"


def test_reference_is_the_same_for_every_number_of_ranks(one_rank: None) -> None:
    def whole(parts: list[tuple[Problem, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        return {
            key: torch.cat([expected[key] for _, expected in parts]) for key in parts[0][1] if key != "router gradient"
        }

    parts = run_ranks(2, problem_and_reference)
    first, second = (problem for problem, _ in parts)
    assert torch.equal(first.router_EH, second.router_EH)
    alone = Problem(
        Shape(2 * SHAPE.tokens, *(getattr(SHAPE, key) for key in ("hidden", "ffn", "experts", "top_k"))),
        0,
        1,
        *(torch.cat([getattr(first, key), getattr(second, key)]) for key in ("hidden_TH", "grad_TH")),
        first.router_EH,
        *(torch.cat([getattr(first, key), getattr(second, key)]) for key in ("gate_up_LHG", "down_LFH")),
    )
    expected = reference(alone)
    torch.testing.assert_close(
        whole(parts), {key: value for key, value in expected.items() if key != "router gradient"}
    )
    torch.testing.assert_close(sum(part["router gradient"] for _, part in parts), expected["router gradient"])
    whole_problem = make_problem(SHAPE, 0, 1)
    assert torch.equal(whole_problem.gate_up_LHG, alone.gate_up_LHG)
    assert torch.equal(whole_problem.down_LFH, alone.down_LFH)


def problem_and_reference() -> tuple[Problem, dict[str, torch.Tensor]]:
    problem = make_problem(SHAPE, dist.get_rank(), 2)
    return problem, reference(problem)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choices_do_not_hang_on_rounding(load: str, dtype: torch.dtype) -> None:
    problem = make_problem(Shape(512, 64, 8, 16, 3), 0, 1, load, dtype)
    logits_TE = problem.hidden_TH.double() @ problem.router_EH.double().T
    top_TK = logits_TE.topk(4).values
    assert (top_TK[:, 2] - top_TK[:, 3]).min() > 0.99 * CLEAR_GAP[dtype]
    rounded_TK = (problem.hidden_TH @ problem.router_EH.T).topk(3).indices
    assert torch.equal(rounded_TK.sort().values, chosen_experts(problem).sort().values)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (256, 4), (128, 8), (4, 4)])
def test_zipf_shares(experts: int, top_k: int) -> None:
    share_E = zipf_shares(experts, top_k)
    assert share_E.sum().item() == pytest.approx(top_k)
    assert share_E.max() <= 1
    below = (share_E < 1).nonzero().flatten()
    constant = share_E[below] * (below + 1)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


def test_zipf_loads_follow_the_shares() -> None:
    problem = make_problem(Shape(8192, 64, 8, 16, 2), 0, 1, "zipf")
    load_E = chosen_experts(problem).flatten().bincount(minlength=16).double() / 8192
    torch.testing.assert_close(load_E, zipf_shares(16, 2), rtol=0.15, atol=0)


def test_presets_are_shapes_that_can_be_measured() -> None:
    assert [len(PRESETS[name]) for name in ("cpu", "gpu")] == [5, 4]
    for shape in {shape for shapes in PRESETS.values() for shape in shapes}:
        assert layer.what_is_wrong(shape, 1) is None
        assert layer.what_is_wrong(shape, 8) is None


@pytest.mark.parametrize(
    ("shape", "ranks", "message"),
    [
        (Shape(64, 32, 16, 6, 2), 4, "6 experts cannot be spread over 4 ranks"),
        (Shape(64, 32, 16, 4, 1), 1, "k must be at least 2"),
        (Shape(63, 32, 16, 4, 2), 1, "must be a multiple of E"),
    ],
)
def test_shapes_that_cannot_be_measured(shape: Shape, ranks: int, message: str) -> None:
    assert message in (layer.what_is_wrong(shape, ranks) or "")
