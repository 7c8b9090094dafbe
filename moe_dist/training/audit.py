"""The audit of a config: its router, with random weights, on small batches, on a few ranks of this machine.

The rule by which a router decides depends neither on the hidden size nor on the number of tokens, so both are small here.
"""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import multiprocessing

from moe_dist.config import Config, RoutingConfig, layout_of
from moe_dist.config.methods import METHODS
from moe_dist.config.routing import CapacityConfig, SequenceGroup
from moe_dist.config.schema import BYTE_VOCABULARY
from moe_dist.initial import draw_normal
from moe_dist.parallel.groups import available_cores
from moe_dist.routing import build_router
from moe_dist.routing.audit import LATER, Findings, audit_router
from moe_dist.routing.capacity import factor_now

HIDDEN_SIZE = 32
TOKENS = 128
"""Of a rank's batch, roughly."""
TRIALS = 40


def audit(config: Config, num_ranks: int) -> Findings:
    """Audit the router of a config on so many gloo ranks; a failing rank ends all, and is raised here with its traceback."""
    if num_ranks == 1:
        return audit_rank(config, TRIALS, None)
    with TemporaryDirectory(prefix="moe_dist_audit_") as folder:
        multiprocessing.spawn(_work, (num_ranks, config, TRIALS, folder), num_ranks)
        return pickle.loads(Path(folder, "findings").read_bytes())


def audit_rank(config: Config, num_trials: int, group: dist.ProcessGroup | None) -> Findings:
    """The part of one rank; all ranks of `group` call it alike."""
    num_sequences, length = batch_shape(config.routing)
    routing = _scaled(config, num_sequences, length)
    router = build_router(HIDDEN_SIZE, config.moe.num_experts, routing, group, BYTE_VOCABULARY)
    for name, parameter in router.named_parameters():  # all that is learned, so that scores are spread and nothing is 0
        draw_normal(parameter, name, config.training.seed, HIDDEN_SIZE**-0.5)
    return audit_router(
        router,
        HIDDEN_SIZE,
        vocab_size=BYTE_VOCABULARY,
        num_sequences=num_sequences,
        length=length,
        num_trials=num_trials,
        num_steps=config.training.steps,
        group=group,
    )


def batch_shape(routing: RoutingConfig) -> tuple[int, int]:
    """Sequences of a rank's batch, and their length: two routing groups of several sequences, or four sequences."""
    per_group = routing.group.sequences if isinstance(routing.group, SequenceGroup) else 1
    num_sequences = 2 * max(2, per_group)
    return num_sequences, max(8, TOKENS // num_sequences)


def contradictions(routing: RoutingConfig, num_experts: int, findings: Findings) -> list[str]:
    """Where the documentation of the method says something else than was found; nothing is said of k = E, where all is chosen."""
    problems = []
    for mode, training in (("training", True), ("evaluation", False)):
        finding = (findings.training if training else findings.evaluation)[LATER]
        assert finding is not None
        by_method = not METHODS[routing.method].causal and (training or routing.evaluation == "as_trained")
        if finding.examples and not by_method and not _limit_looks_ahead(routing.capacity, training):
            problems.append(
                f"routing.method: {routing.method} is documented as causal in {mode}, but its routing depends on later tokens"
            )
        if by_method and not finding.examples and routing.top_k < num_experts:
            problems.append(
                f"routing.method: {routing.method} is documented as looking at later tokens in {mode}, but no trial shows it"
            )
    return problems


def _limit_looks_ahead(capacity: CapacityConfig | None, training: bool) -> bool:
    """All policies but one: later tokens that compete for an expert decide which tokens are among the best, or the luckiest."""
    return capacity is not None and factor_now(capacity, training) is not None and capacity.policy != "position"


def _work(rank: int, num_ranks: int, config: Config, num_trials: int, folder: str) -> None:
    torch.set_num_threads(max(1, available_cores() // num_ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    findings = audit_rank(config, num_trials, dist.group.WORLD)
    if rank == 0:
        Path(folder, "findings").write_bytes(pickle.dumps(findings))
    dist.destroy_process_group()


def _scaled(config: Config, num_sequences: int, length: int) -> RoutingConfig:
    """The routing with a capacity.minimum that is as large for a routing group of the audit as the run's is for its own."""
    routing, capacity = config.routing, config.routing.capacity
    if capacity is None:
        return routing
    share = length / config.training.sequence_length
    if not isinstance(routing.group, SequenceGroup):
        share *= num_sequences / layout_of(config).micro_batch_size
    minimum = max(1, round(capacity.minimum * share))
    return routing.model_copy(update={"capacity": capacity.model_copy(update={"minimum": minimum})})
