"""What every router is. Shape letters: T tokens, H hidden."""

from torch import Tensor, nn

from moe_dist.routing.balance import BalanceState
from moe_dist.routing.types import Routing, Tokens


class Router(nn.Module):
    """`router(hidden_TH, tokens) -> Routing`, with the state of its balancing."""

    balance: BalanceState

    def forward(self, hidden_TH: Tensor, tokens: Tokens) -> Routing:
        """Decide for each token which experts it uses, and with what weight."""
        raise NotImplementedError
