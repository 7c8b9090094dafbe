"""Hash layers (arXiv 2106.04426): the experts of a token are looked up by its id in a fixed table. Causal.

The table is made from the training text (`moe_dist.routing.tables`), once for all layers, whose experts are permuted anew in
each. Weights are constant, or learned scores at the table's experts (DeepSeek-V4).

Shape letters: T tokens, H hidden, E experts, K experts per token, V vocabulary.
"""

import numpy.typing as npt
import torch
from torch import Tensor

from moe_dist.config.errors import ConfigError
from moe_dist.routing.router import Router
from moe_dist.routing.tables import permuted, random_table
from moe_dist.routing.types import Choice, Tokens


class HashRouter(Router):
    """Its table is random until `set_table`."""

    def build(self) -> None:
        """See Router. Raises ConfigError without a vocab_size."""
        if self.vocab_size is None:
            raise ConfigError("routing.method: hash needs the size of the vocabulary; give vocab_size")
        self.weight = self.bias = None
        if self.routing.hash.weights == "learned":
            super().build()
        self.balance.add_value("table_VK", torch.zeros(self.vocab_size, self.routing.top_k, dtype=torch.int64))

    def initialise(self, seed: int, name: str) -> None:
        """See Router."""
        super().initialise(seed, name)
        assert self.vocab_size is not None
        self.set_table(random_table(self.vocab_size, self.num_experts, self.routing.top_k, seed))

    def set_table(self, table_VK: npt.NDArray) -> None:
        """Take a table of `moe_dist.routing.tables`, its experts permuted for this layer."""
        layer = int(number) if (number := self.name.rpartition(".")[2]).isdecimal() else 0
        num_blocks = self.routing.top_k if self.routing.hash.multi else 1
        own_VK = permuted(table_VK, self.num_experts, layer, self.seed, num_blocks)
        self.balance.table_VK.copy_(torch.from_numpy(own_VK))

    def logits(self, hidden_TH: Tensor, tokens: Tokens) -> Tensor:
        """See Router; without learned weights all are 0."""
        if self.weight is not None:
            return super().logits(hidden_TH, tokens)
        return hidden_TH.new_zeros(len(hidden_TH), self.num_experts)

    def choose(self, logits_TE: Tensor, scores_TE: Tensor, tokens: Tokens, counts: bool) -> Choice:
        """See Router."""
        if tokens.id_T is None:
            raise ValueError(f"{self.name}: routing.method: hash looks tokens up by their ids; give Tokens(id_T=...)")
        return Choice(self.balance.table_VK[tokens.id_T])

    def weights(self, logits_TE: Tensor, scores_TE: Tensor, choice: Choice) -> Tensor:
        """See Router. Constant: 1 / k; 1 for MultiHash, whose experts are the segments of one FFN."""
        if self.weight is not None:
            return super().weights(logits_TE, scores_TE, choice)
        share = 1.0 if self.routing.hash.multi else 1 / self.routing.top_k
        return torch.full_like(choice.expert_TK, share * self.routing.scaling_factor, dtype=logits_TE.dtype)
