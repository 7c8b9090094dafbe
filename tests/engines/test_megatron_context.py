"""Context parallelism: refused where TransformerEngine is missing; with a stand-in for its attention it trains as native does.

The stand-in gathers keys and values of all ranks. TransformerEngine itself has not been run.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_dist.config import ConfigError, build_config
from tests.support.equality import Tree, changed, differences, trace

pytest.importorskip("megatron.core")

from tests.engines.test_megatron import FLOAT32, MEGATRON, SEQUENCE, parallel, reference

LAYOUTS: dict[str, tuple[int, Tree]] = {
    "2 ranks": (2, parallel(context=2)),
    "2 ranks, experts": (2, parallel(context=2, expert=2)),
    "4 ranks, tensor": (4, parallel(context=2, tensor=2)),
    "4 ranks, tensor, sequence": (4, changed(parallel(context=2, tensor=2, expert=2), SEQUENCE)),
    "4 ranks, pipeline": (4, changed(parallel(context=2, pipeline=2), {"training": {"micro_batch_size": 2}})),
}


class _AllRows(torch.autograd.Function):
    """[s, ...] of each rank -> [S, ...] in order of position; gradients are summed."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.ranks = group, group.size()
        parts = [torch.empty_like(value) for _ in range(ctx.ranks)]
        dist.all_gather(parts, value.contiguous(), group=group)
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves[::-1]])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        chunks, rank = total.chunk(2 * ctx.ranks), ctx.group.rank()
        return torch.cat([chunks[rank], chunks[2 * ctx.ranks - 1 - rank]]), None


@contextmanager
def stand_in() -> Iterator[None]:
    """On each rank: attention over split sequences in the place of TransformerEngine's, and no check for it."""
    from megatron.core import parallel_state

    from moe_dist.engines import megatron_model, registry

    class Attention(megatron_model.CoreAttention):
        def forward(self, query: Any, key: Any, value: Any, mask: Any, **ignored: Any) -> torch.Tensor:
            group = parallel_state.get_context_parallel_group()
            chunks = torch.arange(len(query) * group.size()).chunk(2 * group.size())
            position = torch.cat([chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]])
            mask = torch.cat(chunks)[None] > position[:, None]
            return super().forward(query, _AllRows.apply(key, group), _AllRows.apply(value, group), mask[None, None])

    kept = registry.check_megatron, megatron_model.core_attention_of
    registry.check_megatron = lambda config, device: None  # type: ignore[assignment]
    megatron_model.core_attention_of = lambda config: Attention
    try:
        yield
    finally:
        registry.check_megatron, megatron_model.core_attention_of = kept


@pytest.mark.parametrize("name", LAYOUTS)
def test_with_a_stand_in_it_trains_as_native_does(name: str) -> None:
    num_ranks, changes = LAYOUTS[name]
    result = trace(changed(FLOAT32, changes, MEGATRON), num_ranks, 3, (0,), stand_in)
    expected = reference("adamw")
    assert abs(result.losses[0] - expected.losses[0]) < 1e-6
    assert differences(result, expected, 1e-5, 1e-5) == []


def test_it_is_refused_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dist.engines import megatron_groups

    monkeypatch.setattr(megatron_groups, "has_transformer_engine", lambda: False)
    config = build_config(changed(FLOAT32, MEGATRON, parallel(context=2)), 2)
    with pytest.raises(
        ConfigError, match=r"^parallel\.context: 2 is not offered with .*emulate_cuda.*needs CUDA; use 1$"
    ):
        megatron_groups.check_megatron(config, torch.device("cpu"))
    config = build_config(
        changed(FLOAT32, parallel(context=2), {"engine": {"name": "megatron", "sharding": "full"}}), 2
    )
    with pytest.raises(
        ConfigError, match=r"^parallel\.context: 2 needs TransformerEngine, .* not installed: .*, or use 1$"
    ):
        megatron_groups.check_megatron(config, torch.device("cuda"))


def test_a_run_ends_with_that_message(tmp_path: Path) -> None:
    overrides = ["parallel.context=2", "engine={name: megatron, emulate_cuda: true}", "model.num_kv_heads=3"]
    command = [sys.executable, "-m", "moe_dist", "train", "configs/quickstart.yaml", *overrides, "--ranks", "2"]
    root = Path(__file__).parents[2]
    output = subprocess.run([*command, "--output", str(tmp_path / "run")], cwd=root, capture_output=True, text=True)
    assert output.returncode != 0
    assert "parallel.context: 2 is not offered with engine.emulate_cuda: true" in output.stderr
