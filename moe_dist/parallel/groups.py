"""Process groups of a run, from one device mesh.

Expert parallelism folds over the data ranks (arXiv 2504.14960): the data ranks form a mesh [expert_data, expert,
expert_tensor]. Each [expert, expert_tensor] of it is an expert-parallel group; the ranks along expert_tensor hold slices
of the same experts, those along expert_data the same slices. Dense parameters are shared by all data ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_dist.parallel.environment import Environment

TELEMETRY_TIMEOUT = timedelta(minutes=5)
"""How long a rank's telemetry waits for that of others, which may write to a slow disk or a slow sink."""


@dataclass(frozen=True)
class ParallelGroups:
    """Meshes of the native engine; each but `same_experts` has one axis, and `get_group()` gives its process group."""

    data: DeviceMesh
    """All ranks that hold different tokens."""
    expert: DeviceMesh
    """The ranks over which the experts of a layer, or slices of them, are spread."""
    expert_data: DeviceMesh
    """The ranks that hold the same experts, and the same slice of each."""
    same_experts: DeviceMesh
    """[expert_tensor, expert_data]: the ranks that hold any slice of the same experts."""
    device: torch.device

    @property
    def expert_parallel_group(self) -> dist.ProcessGroup | None:
        """None where one rank holds all experts, so that nothing needs to be sent."""
        return self.expert.get_group() if self.expert.size() > 1 else None

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()


def build_groups(expert_parallel: int, device: torch.device, expert_tensor: int = 1) -> ParallelGroups:
    """Build the groups over all ranks; collective. `expert_parallel * expert_tensor` must divide the number of ranks.

    Groups are made once for each layout: every gloo group costs threads that wake up a hundred times a second.
    """
    return _build_groups(dist.group.WORLD, expert_parallel, device, expert_tensor)


@lru_cache
def _build_groups(
    world: dist.ProcessGroup | None, expert_parallel: int, device: torch.device, expert_tensor: int
) -> ParallelGroups:
    num_ranks, size = dist.get_world_size(), expert_parallel * expert_tensor
    assert num_ranks % size == 0, f"{num_ranks} ranks do not divide into expert groups of {size}"
    ranks = torch.arange(num_ranks).view(-1, expert_parallel, expert_tensor)
    # expert_data last: experts are cut into slices first, and the slices into shards.
    names = ("expert", "expert_tensor", "expert_data")
    mesh = DeviceMesh(device.type, ranks.permute(1, 2, 0), mesh_dim_names=names)
    return ParallelGroups(
        data=init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("data",)),
        expert=mesh["expert", "expert_tensor"]._flatten("expert_parallel"),
        expert_data=mesh["expert_data"],
        same_experts=mesh["expert_tensor", "expert_data"],
        device=device,
    )


def telemetry_group() -> dist.ProcessGroup | None:
    """All ranks, over gloo, for what is collected beside training; None for one rank. Collective; made once."""
    return _telemetry_group(dist.group.WORLD) if dist.get_world_size() > 1 else None


@lru_cache
def _telemetry_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=TELEMETRY_TIMEOUT)


@contextmanager
def process_group(environment: Environment) -> Iterator[torch.device]:
    """The default process group for the time of the block: NCCL with a CUDA device for every rank, else gloo."""
    _divide_cores(environment)
    num_devices = torch.cuda.device_count()
    if num_devices >= environment.local_num_ranks or (
        num_devices == 1 and environment.launcher in ("slurm", "openmpi")
    ):
        # A scheduler may show each rank its own device only.
        device = torch.device("cuda", environment.local_rank if num_devices > 1 else 0)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if environment.launcher == "single":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        environment.export()
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    yield device
    # Only in good order: after a failure this would wait for ranks that wait for this one.
    dist.destroy_process_group()


def _divide_cores(environment: Environment) -> None:
    """One thread budget per rank, so that ranks do not fight for cores; a budget the user set is kept."""
    # torchrun sets OMP_NUM_THREADS to 1 where the user set nothing, so there 1 says nothing of the user's wish.
    unset = "1" if environment.launcher == "torchrun" else None
    if os.environ.get("OMP_NUM_THREADS", unset) == unset:
        torch.set_num_threads(max(1, available_cores() // environment.local_num_ranks))


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class NodeGroups:
    """An expert-parallel group whose consecutive blocks of `ranks_per_node` ranks each stand on one node."""

    ranks_per_node: int
    node: int
    """The block of this rank."""
    inside: dist.ProcessGroup | None
    """The ranks of this node; None where it is one."""
    between: dist.ProcessGroup
    """The ranks of the same place on every node."""


@lru_cache
def build_node_groups(expert_parallel_group: dist.ProcessGroup, ranks_per_node: int) -> NodeGroups:
    """Split the expert-parallel group of every rank by nodes, once for each; collective over all ranks of the default group.

    Raises ValueError if the nodes do not divide the group, or one node holds all of it.
    """
    num_ranks = dist.get_world_size(expert_parallel_group)
    if num_ranks % ranks_per_node or num_ranks == ranks_per_node:
        raise ValueError(
            f"parallel.ranks_per_node: {ranks_per_node} does not divide the {num_ranks} ranks of an expert-parallel group "
            "into two or more nodes; use a smaller divisor, or parallel.dispatch: flat"
        )
    # NCCL wants every rank at the making of every group, its own or not.
    ranks_of: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks_of, dist.get_process_group_ranks(expert_parallel_group))
    groups = sorted({tuple(ranks) for ranks in ranks_of})
    blocks = [list(ranks[i : i + ranks_per_node]) for ranks in groups for i in range(0, num_ranks, ranks_per_node)]
    columns = [list(ranks[place::ranks_per_node]) for ranks in groups for place in range(ranks_per_node)]
    return NodeGroups(
        ranks_per_node=ranks_per_node,
        node=dist.get_rank(expert_parallel_group) // ranks_per_node,
        inside=dist.new_subgroups_by_enumeration(blocks)[0] if ranks_per_node > 1 else None,
        between=dist.new_subgroups_by_enumeration(columns)[0],
    )
