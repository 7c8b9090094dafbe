"""The layout of ranks that a config means: pure arithmetic, shared by the checks, `moe-dist config` and the process groups."""

import math
from dataclasses import dataclass

from moe_dist.config.methods import METHODS
from moe_dist.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions of a run.

    Pipeline stages are blocks of consecutive ranks; inside a stage, consecutive ranks are tensor-parallel and hold the same
    tokens, and consecutive groups of these are context-parallel and hold parts of the same sequences. Expert parallelism folds
    over the ranks of a stage: consecutive ranks form an expert-parallel group (each holds other experts), and the ranks of equal
    place in these groups form an expert-data group (the same experts). With expert tensor parallelism, consecutive ranks of an
    expert-parallel group hold slices of the same experts.
    """

    num_ranks: int
    tensor: int
    context: int
    pipeline: int
    data: int
    expert: int
    expert_tensor: int
    expert_data: int
    micro_batch_size: int
    accumulation_steps: int

    @property
    def copies(self) -> int:
        """Ranks that read the same sequences."""
        return self.tensor * self.context * self.pipeline

    def data_groups(self) -> list[list[int]]:
        """Ranks of each group that reads different sequences, and holds the same dense weights."""
        stage, step = self.num_ranks // self.pipeline, self.tensor * self.context
        return [
            list(range(first, start + stage, step))
            for start in range(0, self.num_ranks, stage)
            for first in range(start, start + step)
        ]

    def context_groups(self) -> list[list[int]]:
        """Ranks of each group that holds parts of the same sequences."""
        size = self.tensor * self.context
        return [
            list(range(first, start + size, self.tensor))
            for start in range(0, self.num_ranks, size)
            for first in range(start, start + self.tensor)
        ]

    def tensor_groups(self) -> list[list[int]]:
        """Ranks of each group that splits attention and dense layers."""
        return self._blocks(self.tensor)

    def stages(self) -> list[list[int]]:
        """Ranks of each pipeline stage."""
        return self._blocks(self.num_ranks // self.pipeline)

    def expert_groups(self) -> list[list[int]]:
        """Ranks of each expert-parallel group: expert * expert_tensor of them."""
        return self._blocks(self.expert * self.expert_tensor)

    def expert_tensor_groups(self) -> list[list[int]]:
        """Ranks of each group that holds the slices of the same experts."""
        return self._blocks(self.expert_tensor)

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks of each group that holds the same experts, and the same slice of each."""
        size, stage = self.expert * self.expert_tensor, self.num_ranks // self.pipeline
        return [
            list(range(start + place, start + stage, size))
            for start in range(0, self.num_ranks, stage)
            for place in range(size)
        ]

    def _blocks(self, size: int) -> list[list[int]]:
        return [list(range(start, start + size)) for start in range(0, self.num_ranks, size)]


def fewest_ranks(config: Config) -> int:
    """The smallest number of ranks that the `parallel` section allows."""
    parallel = config.parallel
    return math.lcm(parallel.expert * parallel.expert_tensor, parallel.tensor * parallel.context) * parallel.pipeline


def layout_of(config: Config, num_ranks: int | None = None) -> Layout:
    """The layout of a config that has passed the checks."""
    num_ranks = num_ranks or fewest_ranks(config)
    parallel, training = config.parallel, config.training
    data = num_ranks // (parallel.tensor * parallel.context * parallel.pipeline)
    micro_batch_size = micro_batch_size_of(config, training.global_batch_size // data)
    return Layout(
        num_ranks=num_ranks,
        tensor=parallel.tensor,
        context=parallel.context,
        pipeline=parallel.pipeline,
        data=data,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        expert_data=num_ranks // parallel.pipeline // (parallel.expert * parallel.expert_tensor),
        micro_batch_size=micro_batch_size,
        accumulation_steps=training.global_batch_size // (data * micro_batch_size),
    )


def micro_batch_size_of(config: Config, share: int) -> int:
    """Sequences of one forward of a rank that has `share` of them in a step."""
    stages = config.parallel.pipeline if config.parallel.pipeline_interleaving > 1 else 1
    return config.training.micro_batch_size or share // (1 if share % stages else stages)


def layers_of_stage(config: Config, stage: int) -> list[list[int]]:
    """Numbers of the layers of each chunk of a pipeline stage: chunk 0 of all stages comes first, then chunk 1 of all."""
    stages, chunks = config.parallel.pipeline, config.parallel.pipeline_interleaving
    size = config.model.num_layers // (stages * chunks)
    firsts = [(chunk * stages + stage) * size for chunk in range(chunks)]
    return [list(range(first, first + size)) for first in firsts]


def owner_of_expert(config: Config) -> list[int]:
    """For each expert its expert-parallel rank: parallel.expert_map, or contiguous equal blocks."""
    per_rank = config.moe.num_experts // config.parallel.expert
    return config.parallel.expert_map or [e // per_rank for e in range(config.moe.num_experts)]


def moe_layers(config: Config) -> list[int]:
    """Numbers of the layers that are MoE layers."""
    model = config.model
    first = model.num_dense_layers
    return [i for i in range(first, model.num_layers) if (i - first) % model.moe_every == 0]


def layout_dependence(config: Config, layout: Layout) -> list[str]:
    """What of this run depends, by its nature, on the layout of ranks; empty if nothing does."""
    routing, notes = config.routing, []
    method = METHODS[routing.method]
    grouped = [method.uses_group and f"routing.method: {routing.method}", routing.capacity and "routing.capacity"]
    if decides := " and ".join(key for key in grouped if key):
        if routing.group == "rank":
            notes.append(f"routing.group: rank ({decides}: decided over what one rank holds in one forward)")
        elif layout.accumulation_steps > 1 and (routing.group == "global" or routing.method == "base"):
            key = "routing.method: base" if routing.group != "global" else "routing.group: global"
            notes.append(f"{key} with accumulation ({decides}: decided over what all ranks hold in one forward)")
    for name in ("load_balance", "device", "communication"):
        loss = getattr(routing.losses, name)
        if loss.coefficient and loss.scope == "micro_batch":
            notes.append(f"routing.losses.{name}.scope: micro_batch (loads of one rank's forward)")
        if loss.coefficient and loss.scope == "global_batch" and layout.accumulation_steps > 1:
            notes.append(
                f"routing.losses.{name}.scope: global_batch with accumulation (early micro-batches see partial loads)"
            )
    for name in ("importance", "load"):
        if getattr(routing.losses, name).coefficient and layout.accumulation_steps > 1:
            notes.append(
                f"routing.losses.{name} with accumulation (of the sums over what all ranks hold in one forward)"
            )
    return notes
