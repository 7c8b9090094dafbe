"""Device, threads and process groups of a rank."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from moe_dist.parallel.environment import Environment
from moe_dist.parallel.groups import available_cores, build_groups, process_group
from tests.support.distributed import run_ranks

SINGLE = Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")
THIRD_OF_FOUR = Environment(2, 4, 2, 4, "127.0.0.1", 1, "slurm")


def members(expert_parallel: int, expert_tensor: int = 1) -> dict[str, list[int]]:
    groups = build_groups(expert_parallel, torch.device("cpu"), expert_tensor)
    names = ("data", "expert", "expert_data")
    return {name: dist.get_process_group_ranks(getattr(groups, name).get_group()) for name in names}


def test_expert_parallelism_folds_over_the_data_ranks() -> None:
    assert run_ranks(4, members, 2) == [
        {"data": [0, 1, 2, 3], "expert": [0, 1], "expert_data": [0, 2]},
        {"data": [0, 1, 2, 3], "expert": [0, 1], "expert_data": [1, 3]},
        {"data": [0, 1, 2, 3], "expert": [2, 3], "expert_data": [0, 2]},
        {"data": [0, 1, 2, 3], "expert": [2, 3], "expert_data": [1, 3]},
    ]


def test_slices_of_an_expert_are_on_consecutive_ranks() -> None:
    assert run_ranks(4, members, 1, 2) == [
        {"data": [0, 1, 2, 3], "expert": [0, 1], "expert_data": [0, 2]},
        {"data": [0, 1, 2, 3], "expert": [0, 1], "expert_data": [1, 3]},
        {"data": [0, 1, 2, 3], "expert": [2, 3], "expert_data": [0, 2]},
        {"data": [0, 1, 2, 3], "expert": [2, 3], "expert_data": [1, 3]},
    ]
    assert run_ranks(4, members, 2, 2) == [
        {"data": [0, 1, 2, 3], "expert": [0, 1, 2, 3], "expert_data": [rank]} for rank in range(4)
    ]


def ranks_with_the_same_experts(expert_parallel: int, expert_tensor: int) -> list[list[int]]:
    return build_groups(expert_parallel, torch.device("cpu"), expert_tensor).same_experts.mesh.tolist()


def test_slices_come_before_shards() -> None:
    """[expert_tensor, expert_data]."""
    assert run_ranks(4, ranks_with_the_same_experts, 1, 2) == [[[0, 2], [1, 3]]] * 4
    assert run_ranks(4, ranks_with_the_same_experts, 2, 2) == [[[0], [1]], [[0], [1]], [[2], [3]], [[2], [3]]]
    assert run_ranks(4, ranks_with_the_same_experts, 2, 1) == [[[0, 2]], [[1, 3]], [[0, 2]], [[1, 3]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What process_group asks of torch, which does nothing."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: asked.update(backend=backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.update(destroyed=True))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.update(threads=number))
    monkeypatch.setattr(Environment, "export", lambda self: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return asked


@pytest.mark.parametrize(
    ("launcher", "num_devices", "device"),
    [
        ("torchrun", 4, "cuda:2"),
        ("slurm", 8, "cuda:2"),
        ("slurm", 1, "cuda:0"),
        ("torchrun", 1, "cpu"),
        ("slurm", 0, "cpu"),
    ],
    ids=["all devices seen", "more than needed", "each rank sees its own", "too few", "none"],
)
def test_device(started: dict, monkeypatch: pytest.MonkeyPatch, launcher: str, num_devices: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    with process_group(dataclasses.replace(THIRD_OF_FOUR, launcher=launcher)) as chosen:
        assert chosen == torch.device(device)
    assert started["backend"] == ("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    assert started["destroyed"]


def test_a_failure_leaves_at_once(started: dict) -> None:
    """Leaving the group in order would wait for ranks that wait for this one."""
    with pytest.raises(RuntimeError, match="a step failed"), process_group(SINGLE):
        raise RuntimeError("a step failed")
    assert "destroyed" not in started


@pytest.mark.parametrize(
    ("given", "launcher", "divided"),
    [(None, "single", True), ("1", "torchrun", True), ("1", "slurm", False), ("3", "torchrun", False)],
    ids=["unset", "set by torchrun", "set by the user", "set by the user under torchrun"],
)
def test_one_thread_budget_per_rank(
    started: dict, monkeypatch: pytest.MonkeyPatch, given: str | None, launcher: str, divided: bool
) -> None:
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with process_group(dataclasses.replace(SINGLE, launcher=launcher)):
        pass
    assert started.get("threads") == (available_cores() if divided else None)
