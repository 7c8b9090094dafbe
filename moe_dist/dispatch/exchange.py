"""What stands around a dispatcher and brings tokens to the node or rank of their experts first."""

from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_dist.config.deepep import most_choices
from moe_dist.config.schema import Config
from moe_dist.dispatch.deepep import DeepEPExchange
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.dispatch.types import Hop
from moe_dist.parallel.environment import ranks_of_a_node
from moe_dist.parallel.groups import build_node_groups
from moe_dist.placement import ExpertMap
from moe_dist.routing.types import Routing


class Exchange(Protocol):
    """An nn.Module without parameters; hierarchical.py describes the contract."""

    inner_map: ExpertMap
    inner_group: dist.ProcessGroup | None

    def send(self, hidden_TH: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing, Any]:
        """Rows [U, H] for the experts of `inner_map`, their routing, and the ticket."""

    def bring_back(self, out_UH: torch.Tensor, ticket: Any) -> torch.Tensor:
        """[T, H]: the sums of each token's rows."""

    def hop(self, ticket: Any) -> Hop | None:
        """The rows that `send` moved; None where it moves none, or does not learn how many."""


def build_exchange(config: Config, expert_map: ExpertMap, group: dist.ProcessGroup | None) -> Exchange | None:
    """The exchange that `parallel.dispatch` names, for all layers of a model; None: flat. Collective over all ranks.

    Args:
        expert_map: over the ranks of `group`, so of slices with expert tensor parallelism.
        group: the expert-parallel group.

    Raises ValueError if the nodes do not divide the group, or DeepEP cannot be used.
    """
    parallel = config.parallel
    if group is None or parallel.dispatch == "flat":
        return None
    if parallel.dispatch == "deepep":
        return DeepEPExchange(expert_map, group, config.model.hidden_size, most_choices(config))
    return HierarchicalExchange(expert_map, build_node_groups(group, ranks_of_a_node(parallel.ranks_per_node)))
