"""What one rank reads in one forward.

Shape letters: B sequences of a micro-batch, S sequence length, T = B S tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_dist.routing import Tokens

IGNORED = -100
"""The target of a position that does not count; what torch's cross_entropy ignores by default."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    input_BS: Tensor
    """int64 tokens."""
    target_BS: Tensor
    """int64 next tokens, IGNORED where the position does not count."""
    padding_BS: Tensor | None
    """bool, True where there is no token. None: no padding."""
    document_BS: Tensor | None
    """int64, other numbers for other documents of a sequence. None: attention crosses documents."""
    sequence_B: Tensor
    """int64 index of each sequence in the global batch, or in the evaluation set."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def at(self, position_S: Tensor) -> "Batch":
        """The batch at these positions of each sequence."""
        per_token = {name: value for name, value in vars(self).items() if name.endswith("_BS") and value is not None}
        return replace(self, **{name: value[:, position_S] for name, value in per_token.items()})

    def num_targets(self) -> int:
        """Positions that count in the loss. Reads the batch on the host: call it before `to`."""
        return int((self.target_BS != IGNORED).sum())

    def num_tokens(self) -> int:
        """Tokens that are not padding. Reads the batch on the host: call it before `to`."""
        return self.input_BS.numel() if self.padding_BS is None else int((~self.padding_BS).sum())

    def tokens(self, share: float = 1.0, step: int = 0) -> Tokens:
        """What the routers may know of the tokens, and the share that they are of the tokens of optimiser step `step`."""
        num_sequences, length = self.input_BS.shape
        position_S = torch.arange(length, device=self.input_BS.device)
        local_B = torch.arange(num_sequences, device=self.input_BS.device)
        return Tokens(
            id_T=self.input_BS.flatten(),
            sequence_T=local_B.repeat_interleave(length),
            position_T=position_S.repeat(num_sequences),
            global_index_T=(self.sequence_B[:, None] * length + position_S).flatten(),
            padding_T=None if self.padding_BS is None else self.padding_BS.flatten(),
            num_sequences=num_sequences,
            step=step,
            share=share,
        )
