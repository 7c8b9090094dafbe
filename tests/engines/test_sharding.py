"""FSDP's part in it. Each rank holds dense parameters over the data ranks, experts over those of their expert-data group."""

import warnings

import pytest
from torch.distributed.fsdp import FSDPModule

from moe_dist.config import build_config
from moe_dist.config.layout import owner_of_expert
from moe_dist.model import Transformer
from tests.engines.test_equality import LAYOUTS
from tests.support.distributed import run_ranks
from tests.support.equality import BASE, VOCABULARY, Tree, build_engine, changed, train_step


def held(tree: Tree) -> tuple[dict[str, int], dict[str, int], dict[str, int], int]:
    """Values of each parameter on this rank, those of its moments, in how many copies, and the modules FSDP wraps."""
    engine, _ = build_engine(tree)
    values = {p.name: p.local.numel() for p in engine.parameters}
    moments = {p.name: engine.optimizer.state[p.local]["exp_avg"].numel() for p in engine.parameters}
    wrapped = sum(isinstance(module, FSDPModule) for module in engine.model.modules())
    return values, moments, {p.name: p.replicas for p in engine.parameters}, wrapped


def rows_of(size: int, shards: int, place: int) -> int:
    """FSDP gives each rank ceil(size / shards) rows as long as there are any."""
    each = -(-size // shards)
    return max(0, min(each, size - place * each))


@pytest.mark.parametrize(
    ("layout", "dense_shards", "dense_copies", "expert_shards", "expert_copies"),
    [
        ("1 rank", 1, 1, 1, 1),
        ("2 ranks, data", 1, 2, 1, 2),
        ("2 ranks, data, sharded", 2, 1, 2, 1),
        ("2 ranks, expert 2", 1, 2, 1, 1),
        ("2 ranks, expert 2, unequal", 1, 2, 1, 1),
        ("4 ranks, expert 2", 1, 4, 1, 2),
        ("4 ranks, expert 2, sharded", 4, 1, 2, 1),
        ("4 ranks, expert 4, sharded", 4, 1, 1, 1),
        ("2 ranks, slices 2", 1, 2, 1, 1),
        ("4 ranks, slices 2", 1, 4, 1, 2),
        ("4 ranks, slices 2, accumulated, sharded", 4, 1, 2, 1),
        ("4 ranks, expert 2, slices 2, unequal, recomputed", 1, 4, 1, 1),
    ],
)
def test_each_rank_holds_its_part(
    layout: str, dense_shards: int, dense_copies: int, expert_shards: int, expert_copies: int
) -> None:
    num_ranks, changes = LAYOUTS[layout]
    config = build_config(changed(BASE, changes), num_ranks)
    owners, ranks_of_experts, slices = owner_of_expert(config), config.parallel.expert, config.parallel.expert_tensor
    for rank, (values, moments, copies, wrapped) in enumerate(run_ranks(num_ranks, held, changed(BASE, changes))):
        assert values == moments
        # Three layers and the whole, and the experts of two layers where another rank holds the same.
        assert wrapped == (0 if num_ranks == 1 else 6 if expert_shards * expert_copies > 1 else 4)
        for name, parameter in Transformer(build_config(BASE), VOCABULARY).named_parameters():
            if ".moe.experts." in name:
                own = owners.count(rank // slices % ranks_of_experts) * parameter[0].numel() // slices // expert_shards
                assert (values[name], copies[name]) == (own, expert_copies), name
            else:
                rows = rows_of(len(parameter), dense_shards, rank % dense_shards)
                assert (values[name], copies[name]) == (rows * parameter[0].numel(), dense_copies), name


def said_by_fsdp(tree: Tree) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, data = build_engine(tree)
        for step in range(2):
            train_step(engine, data, step)
    return [str(warning.message) for warning in caught if "FSDP" in str(warning.message)]


@pytest.mark.parametrize("layout", ["2 ranks, data", "2 ranks, data, sharded"])
def test_fsdp_has_nothing_to_warn_of(layout: str) -> None:
    """For instance of a module that returns a view, on which its hooks may not run."""
    num_ranks, changes = LAYOUTS[layout]
    assert run_ranks(num_ranks, said_by_fsdp, changed(BASE, changes)) == [[]] * num_ranks
