"""The benchmarks of memory, scaling and dispatch: what they measure is what they say, shown on small cases."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # where the scripts find each other

import common
import dispatch
import journeys
import memory
import scaling
import telemetry
from peers import Shape

MB = 1e6
OWN_ROWS = ["moe_dist", "moe_dist hierarchical", "plain torch"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, one_rank: None) -> Callable[..., str]:
    """Runs the script of a benchmark inside this process; gives what it printed."""

    def on_one_rank(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
        assert ranks == 1
        return json.loads(json.dumps(function(*arguments)))

    def run(script: Any, *arguments: str) -> None:
        monkeypatch.setattr(script, "run_ranks", on_one_rank)
        monkeypatch.setattr(script, "set_environment", lambda *arguments: None)
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
        script.main()

    return run


class Hoarder:
    """A layer of known size: weights of 36 MB, 40 MB kept for backward, 48 MB in use for a moment in forward.

    Each is above 32 MB, so that malloc maps and unmaps it at once.
    """

    def __init__(self, problem: Any) -> None:
        self.layer = nn.Linear(1, 9_000_000, bias=False)
        self.hidden_TH = problem.hidden_TH

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        kept = torch.full((10_000_000,), 0.5)
        torch.ones(12_000_000)
        return hidden_TH * _Keep.apply(self.layer.weight, kept)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, kept)
        return kept[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(ctx.saved_tensors[0]), None


def measure_hoarder() -> dict[str, float]:
    memory.COMPETITORS["hoarder"] = Hoarder
    return memory.measure_stack("hoarder", Shape(8, 8, 8, 8, 2), 2, "cpu")


def test_memory_of_a_stack_whose_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in common.MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    row = common.run_ranks(1, measure_hoarder)
    assert row["saved"] == pytest.approx(40 * MB, rel=0.001)
    assert row["held"] == pytest.approx(40 * MB, abs=1 * MB)
    # The most is in use in the second layer's forward. A gradient comes when what was kept goes.
    assert row["activation"] == pytest.approx((2 * 40 + 48) * MB, abs=2 * MB)
    assert row["peak"] == pytest.approx((2 * 36 + 2 * 40 + 48) * MB, abs=2 * MB)
    assert row["output norm"] > 0


def test_memory_of_a_row_that_computes_something_else_is_not_counted() -> None:
    sizes = dict.fromkeys(memory.KINDS, 2e6)
    rows = {"moe_dist": {**sizes, "output norm": 5.0, "gradient norm": 2.0}}
    rows["megatron"] = {**rows["moe_dist"], "peak": 4e6}
    rows["wrong"] = {**rows["moe_dist"], "gradient norm": 2.01}
    assert memory.differing(rows) == ["wrong"]
    result = {"shape": vars(Shape(1, 2, 3, 4, 2)), "malloc": "default", "rows": rows, "differing": ["wrong"]}
    *_, ours, megatron, wrong, absent = memory.table({**result, "left_out": {"hf": "no module"}}, 4).splitlines()
    assert ours.split() == ["moe_dist", "2.0", "0.50", "2.0", "1.00", "2.0", "1.00", "2.0", "1.00"]
    assert megatron.split()[:3] == ["megatron", "4.0", "1.00"]
    assert wrong == "wrong: DIFFERS from moe_dist, not counted"
    assert absent == "hf: left out (no module)"


def test_memory_script(run_here: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "memory.json"
    run_here(
        memory, "--shape", "64,16,8,8,2", "--rows", "moe_dist", "--layers", "2", "--repeats", "2", "--json", str(file)
    )
    report = json.loads(file.read_text())
    assert [found["malloc"] for found in report["shapes"]] == list(common.MALLOCS)
    for found in report["shapes"]:
        assert len(found["repeats"]["moe_dist"]) == 2
        # What the experts' backward needs at least: rows and what goes into the activation, [T k, H] and [T k, 2F].
        assert found["rows"]["moe_dist"]["saved"] >= 64 * 2 * (16 + 2 * 8) * 4
    assert report["versions"]["torch"] == torch.__version__
    assert "malloc: keeps freed memory" in capsys.readouterr().out


def test_sweeps_change_one_number() -> None:
    base = Shape(4096, 256, 128, 64, 4)
    experts, top_k, tokens = (scaling.SHAPES[name](base) for name in ("experts", "top_k", "tokens"))
    assert (experts[0].experts, experts[-1].experts) == (16, 256)
    assert {shape.flops() for shape in experts} == {base.flops()}, "active FLOPs are constant"
    assert {(shape.tokens, shape.hidden, shape.ffn, shape.experts) for shape in top_k} == {(4096, 256, 128, 64)}
    assert {(shape.hidden, shape.ffn, shape.experts, shape.top_k) for shape in tokens} == {(256, 128, 64, 4)}
    assert base in experts
    assert base in top_k
    assert base in tokens


def test_cost_per_token_growth_and_limit() -> None:
    exchange = {"all-to-all": [0.001, 0.003, 0.001]}
    rows = scaling.point_rows({"bmm": [0.004], "loop": [0.003]}, exchange, {"moe_dist": [0.008] * 3}, 1000)
    assert rows["limit"]["median_ms"] == pytest.approx(4)
    assert rows["moe_dist"]["us_per_token"] == pytest.approx(8)
    assert rows["moe_dist"]["of_limit"] == pytest.approx(2)
    slower = scaling.point_rows({"bmm": [0.004]}, {}, {"moe_dist": [0.012]}, 1000)
    points = [
        {"shape": {**vars(Shape(1000, 8, 8, experts, 2))}, "ranks": 1, "rows": found, "differing": {"wrong": 0.5}}
        for experts, found in ((16, rows), (256, slower))
    ]
    last = scaling.table("experts", points).splitlines()[-2:]
    assert last[0].split() == ["256", "moe_dist", "12.00", "1.50", "3.00"]
    assert "DIFFERS" in last[1]


def test_scaling_script(
    run_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "REAL_RANKS", (1,))
    monkeypatch.setattr(scaling, "FAKE_RANKS", (1, 4))
    monkeypatch.setattr(scaling, "FAKE_EXPERTS", (8, 16))
    monkeypatch.setattr(scaling, "FAKE_NODE", 2)
    file = tmp_path / "scaling.json"
    run_here(scaling, "--shape", "64,8,8,16,2", "--rounds", "1", "--sweep", "top_k,ranks", "--json", str(file))
    sweeps = json.loads(file.read_text())["sweeps"]
    assert [point["shape"]["top_k"] for point in sweeps["top_k"]] == [2, 4, 8, 16]
    assert all({"limit", "moe_dist"} <= point["rows"].keys() for point in sweeps["top_k"])
    fake = [(point["experts"], point["ranks"], point["path"]) for point in sweeps["fake ranks"]]
    both, three = ("dropless", "static"), ("dropless", "static", "hierarchical")
    assert fake == [(e, r, p) for e, r, paths in ((8, 1, both), (8, 4, three), (16, 4, three)) for p in paths]
    assert all(len(point["layer"]["rounds_ms"]) == 1 for point in sweeps["fake ranks"])
    assert "host cost" in capsys.readouterr().out


def dispatch_alike(num_experts: int, path: str) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """What arrives on a rank of a group whose ranks all hold the same tokens, and what the layer makes of it."""
    layer = scaling.fake_layer(num_experts, dist.get_world_size(), path)
    hidden_TH = torch.randn(num_experts // 2, scaling.FAKE_WIDTH, generator=torch.Generator().manual_seed(0))
    rows_RH, segments, _ = layer.dispatcher.dispatch(hidden_TH, layer.router(hidden_TH, scaling.Tokens()))
    output_TH = layer(hidden_TH)
    output_TH.sum().backward()
    return rows_RH.detach(), segments.sizes, output_TH.detach()


@pytest.mark.parametrize("path", ["dropless", "static"])
def test_a_fake_rank_receives_what_it_would_among_real_ones_with_its_tokens(path: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    real_rows_RH, real_sizes, _ = run_ranks(4, dispatch_alike, 8, path)[0]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with scaling.mirrored_all_to_all():
            rows_RH, sizes, output_TH = dispatch_alike(8, path)
    finally:
        dist.destroy_process_group()
    assert sizes == real_sizes == [1] * 8
    assert torch.equal(rows_RH, real_rows_RH)
    assert output_TH.isfinite().all()


def measure_dispatch(shape: Shape) -> tuple[dict, int, int]:
    """The benchmark on two nodes, and this rank's pairs for other ranks and for the other node."""
    rank_TK = journeys.draw_load(shape, "zipf", 2).expert_TK // (shape.experts // 4)
    own = dist.get_rank()
    result = dispatch.measure(shape, "zipf", 2, OWN_ROWS, 1)
    return result, int((rank_TK != own).sum()), int((rank_TK // 2 != own // 2).sum())


def test_dispatch_on_four_real_ranks_as_two_nodes() -> None:
    results = run_ranks(4, measure_dispatch, Shape(32, 8, 1, 8, 4))
    result = results[0][0]
    assert result["differing"] == result["left_out"] == {}
    assert list(result["rows"]) == ["all-to-all", *OWN_ROWS]
    row_bytes, counts = 8 * 4, 2 * 8
    for key, place, other_ranks in (("bytes", 1, 3), ("bytes_between_nodes", 2, 2)):
        given = {name: row[key] for name, row in result["rows"].items()}
        # Rows go there and back, forward and backward; the mean over ranks of what comes back is that of what goes.
        assert given["all-to-all"] == 4 * row_bytes * sum(found[place] for found in results) / 4
        assert given["moe_dist"] == given["plain torch"] == given["all-to-all"] + other_ranks * counts
    assert given["moe_dist hierarchical"] < given["all-to-all"], "a token crosses once"


def test_a_journey_that_goes_astray_is_found(one_rank: None) -> None:
    load = journeys.draw_load(Shape(16, 8, 1, 8, 2), "uniform", 1)
    right = journeys.plain_torch(load)

    def astray(hidden_TH: torch.Tensor, weight_TK: torch.Tensor, experts: journeys.Experts) -> torch.Tensor:
        def swapped(rows_RH: torch.Tensor, sizes: list[int], places: list[int]) -> torch.Tensor:
            return experts(rows_RH, sizes, places[1:] + places[:1])

        return right.run(hidden_TH, weight_TK, swapped)

    expected = journeys.expected_results(load)
    errors = common.relative_errors(journeys.checked_results(right, load), expected)
    assert max(errors.values()) <= dispatch.TOLERANCE
    errors = common.relative_errors(journeys.checked_results(right._replace(run=astray), load), expected)
    assert min(errors.values()) > 100 * dispatch.TOLERANCE


def test_zipf_is_heavier_than_uniform_and_experts_of_a_token_differ(one_rank: None) -> None:
    shape = Shape(4096, 8, 1, 16, 2)
    counts = {}
    for name in journeys.ZIPF_EXPONENT:
        expert_TK = journeys.draw_load(shape, name, 1).expert_TK
        assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
        counts[name] = expert_TK[:, 0].bincount(minlength=16).sort(descending=True).values / 4096
    # The first choice is in proportion to 1 / i.
    shares_E = (1 / torch.arange(1, 17)) / (1 / torch.arange(1, 17)).sum()
    torch.testing.assert_close(counts["zipf"], shares_E, atol=0.03, rtol=0)
    torch.testing.assert_close(counts["uniform"], torch.full((16,), 1 / 16), atol=0.03, rtol=0)


def count_collectives() -> list[int]:
    """Bytes that rank 0 of four gives each rank in one collective of each kind."""
    group = dist.new_group([0, 2])
    if dist.get_rank() not in (0, 2):
        return []
    splits = [1, 2] if dist.get_rank() == 0 else [2, 1]
    with dispatch.CountBytes() as counted:
        dist.all_to_all_single(torch.zeros(3, 2), torch.zeros(3, 2), splits, splits, group=group)
        dist.all_gather_into_tensor(torch.zeros(2, 5), torch.zeros(1, 5), group=group)
        dist.reduce_scatter_tensor(torch.zeros(1, 7), torch.zeros(2, 7), group=group)
    return counted.given_to


def test_bytes_are_counted_by_global_rank() -> None:
    counted = run_ranks(4, count_collectives)
    assert counted[0] == [8 + 20 + 28, 0, 2 * 8 + 20 + 28, 0]


def test_the_cost_of_records_is_taken_in_turns(
    run_here: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["training.global_batch_size=2", "training.sequence_length=16", "model.num_layers=2", "moe.num_experts=4"]
    run_here(telemetry, "--ranks", "1", "--rounds", "2", "--json", str(tmp_path / "cost.json"), *small)
    report = json.loads((tmp_path / "cost.json").read_text())
    assert [len(turns) for turns in report["turns"].values()] == [2, 2]
    assert len(report["recorder_share"]) == 2
    assert all(0 < share < 1 for share in report["recorder_share"])
    printed = capsys.readouterr().out
    assert {line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")} >= {
        *telemetry.KINDS,
        "ratio",
    }
    assert "inside the recorder's calls: median" in printed
