"""Process groups of a run, from one device mesh.

Expert parallelism folds over the data ranks (arXiv 2504.14960): the data ranks form a mesh [expert_data, expert], whose
rows are expert-parallel groups and whose columns hold the same experts. Dense parameters are shared by all data ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_dist.parallel.environment import Environment


@dataclass(frozen=True)
class ParallelGroups:
    """Meshes of the native engine; each has one axis, and `get_group()` gives its process group."""

    data: DeviceMesh
    """All ranks that hold different tokens."""
    expert: DeviceMesh
    """The ranks over which the experts of a layer are spread."""
    expert_data: DeviceMesh
    """The ranks that hold the same experts."""
    device: torch.device

    @property
    def expert_parallel_group(self) -> dist.ProcessGroup | None:
        """None where one rank holds all experts, so that nothing needs to be sent."""
        return self.expert.get_group() if self.expert.size() > 1 else None

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()


def build_groups(expert_parallel: int, device: torch.device) -> ParallelGroups:
    """Build the groups over all ranks; collective. `expert_parallel` must divide the number of ranks."""
    num_ranks = dist.get_world_size()
    assert num_ranks % expert_parallel == 0, f"{num_ranks} ranks do not divide into expert groups of {expert_parallel}"
    mesh = init_device_mesh(
        device.type, (num_ranks // expert_parallel, expert_parallel), mesh_dim_names=("expert_data", "expert")
    )
    return ParallelGroups(
        data=mesh._flatten("data"), expert=mesh["expert"], expert_data=mesh["expert_data"], device=device
    )


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
