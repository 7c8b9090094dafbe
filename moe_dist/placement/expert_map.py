"""Which rank owns which expert: data, not arithmetic."""

from dataclasses import dataclass
from functools import cached_property

import torch

WIDTH_DIMENSION = {"w_gate": 1, "w_up": 1, "w_down": 0}
"""Of an expert's weights by their unpacked names: which dimension is the FFN width, along which slices are cut."""


@dataclass(frozen=True)
class ExpertMap:
    """For each expert-parallel rank the global ids of its experts, in the order of its weight stack."""

    experts_of_rank: tuple[tuple[int, ...], ...]

    @staticmethod
    def contiguous(num_experts: int, num_ranks: int) -> "ExpertMap":
        """Equal blocks of consecutive experts. Raises ValueError if the ranks do not divide the experts."""
        if num_experts % num_ranks:
            raise ValueError(f"num_experts: {num_experts} is not a multiple of the {num_ranks} expert-parallel ranks")
        return ExpertMap.from_owners([e * num_ranks // num_experts for e in range(num_experts)])

    @staticmethod
    def from_owners(owner_E: list[int]) -> "ExpertMap":
        """From the rank of each expert; ranks may own different numbers of experts."""
        return ExpertMap(
            tuple(tuple(e for e, owner in enumerate(owner_E) if owner == rank) for rank in range(max(owner_E) + 1))
        )

    def sliced(self, num_slices: int) -> "ExpertMap":
        """The map of slices for expert tensor parallelism.

        Each expert is cut along its FFN width into `num_slices` experts of their own; slice j of expert e has the number
        e * num_slices + j. Each rank becomes `num_slices` consecutive ones, that hold slice 0, 1, ... of its experts.
        """
        return ExpertMap(
            tuple(
                tuple(e * num_slices + j for e in experts)
                for experts in self.experts_of_rank
                for j in range(num_slices)
            )
        )

    @cached_property
    def num_experts(self) -> int:
        return sum(len(experts) for experts in self.experts_of_rank)

    @cached_property
    def num_experts_of_rank(self) -> list[int]:
        return [len(experts) for experts in self.experts_of_rank]

    @cached_property
    def slot_E(self) -> torch.Tensor:
        """int64 [E]: place of each expert when experts are ordered by owner, then by place on the owner."""
        return torch.argsort(self.expert_of_slot_E)

    @cached_property
    def expert_of_slot_E(self) -> torch.Tensor:
        """int64 [E]: the expert at each place, the inverse of slot_E."""
        return torch.tensor([e for experts in self.experts_of_rank for e in experts])
