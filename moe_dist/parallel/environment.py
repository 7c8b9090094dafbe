"""Who this process is among the ranks, whatever started it."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.config.errors import ConfigError


@dataclass(frozen=True)
class Environment:
    """One process among `num_ranks`."""

    rank: int
    num_ranks: int
    local_rank: int
    local_num_ranks: int
    master_address: str
    master_port: int
    launcher: str
    """torchrun (also deepspeed, which sets the same variables), openmpi, slurm, or single."""

    def export(self) -> None:
        """Set the variables that torch.distributed and DeepSpeed read, under whatever names the launcher gave them."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.num_ranks),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_num_ranks),
            LOCAL_SIZE=str(self.local_num_ranks),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
        )


# For each launcher: rank, number of ranks, local rank, then the names under which the number of ranks on this node is found.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")),
}

_INTERACTIVE_STEP = "4294967290"
"""The step that SLURM makes of an salloc shell itself (SLURM_INTERACTIVE_STEP of slurm.h)."""


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Read the launcher's variables; torchrun's win, because SLURM's also exist inside `salloc` without `srun`.

    Raises ConfigError if a launcher set only some of what it should.
    """
    for launcher, (rank, size, local_rank, local_sizes) in _LAUNCHERS.items():
        if rank not in variables:
            continue
        if launcher == "slurm" and variables.get("SLURM_STEP_ID", _INTERACTIVE_STEP) == _INTERACTIVE_STEP:
            continue  # inside salloc, but not started by srun
        for name in (size, local_rank):
            if name not in variables:
                raise ConfigError(f"{name}: not set, though {rank} is; start the ranks by torchrun, deepspeed or srun")
        local_size = next((variables[name] for name in local_sizes if name in variables), variables[size])
        address, port = _master(launcher, variables)
        return Environment(
            rank=int(variables[rank]),
            num_ranks=int(variables[size]),
            local_rank=int(variables[local_rank]),
            local_num_ranks=_of_node(local_size, int(variables.get("SLURM_NODEID", "0"))),
            master_address=address,
            master_port=port,
            launcher=launcher,
        )
    return Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")


def ranks_of_a_node(configured: int | None) -> int:
    """`parallel.ranks_per_node`: by default as many as the launcher started on this node."""
    return configured or read_environment().local_num_ranks


def _of_node(counts: str, node: int) -> int:
    """The count of one node, where SLURM writes 4(x2),3 for nodes of 4, 4 and 3 ranks; one number holds for all nodes."""
    each: list[int] = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        each += [int(count)] * int(times or 1)
    return each[min(node, len(each) - 1)]


def _master(launcher: str, variables: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in variables:
        return variables["MASTER_ADDR"], int(variables.get("MASTER_PORT", "29500"))
    if launcher == "slurm":
        # Any port that all tasks of the job derive alike will do.
        return _first_slurm_host(variables), 20000 + int(variables.get("SLURM_JOB_ID", "0")) % 20000
    raise ConfigError(
        "MASTER_ADDR: not set; give the address of the host of rank 0, for instance by -x MASTER_ADDR=HOST"
    )


def _first_slurm_host(variables: Mapping[str, str]) -> str:
    nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"MASTER_ADDR: not set, and scontrol cannot say which is the first host of {nodes!r}"
        ) from None
    return listing.stdout.split()[0]
