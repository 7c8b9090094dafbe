"""Checks of the section `routing` against itself and the experts."""

from collections.abc import Iterator

from moe_dist.config.errors import ConfigError, show
from moe_dist.config.methods import METHODS, refusal
from moe_dist.config.routing import CapacityConfig, RoutingConfig


def check_routing(routing: RoutingConfig, num_experts: int) -> None:
    """The checks of a layer that is used without a whole Config. Raises ConfigError."""
    if problems := list(routing_problems(routing, num_experts)):
        raise ConfigError("\n".join(problems))


def routing_problems(routing: RoutingConfig, num_experts: int) -> Iterator[str]:
    """What is wrong, one message each."""
    yield from _weights(routing)
    yield from _refused(routing)
    yield from _method(routing, num_experts)
    yield from _balancing(routing)
    outputs = num_experts + (routing.zero_experts.count if routing.zero_experts else 0)
    if routing.top_k > outputs:
        added = " + routing.zero_experts.count" if routing.zero_experts else ""
        yield f"routing.top_k: {routing.top_k} is more than moe.num_experts{added} = {outputs}; use at most that"
        return
    yield from _expert_groups(routing, num_experts)
    if routing.capacity:
        yield from _capacity(routing, routing.capacity)


def features_in_use(routing: RoutingConfig) -> dict[str, str]:
    """What of `moe_dist.config.methods.FEATURES` the config asks for: feature -> the override that takes it away."""
    losses = routing.losses
    used = {
        f"losses.{name}": f"routing.losses.{name}.coefficient=0"
        for name in type(losses).model_fields
        if name != "scaling" and getattr(losses, name).coefficient
    }
    if routing.bias.rule != "none":
        used["bias"] = "routing.bias.rule=none"
    for name in ("load_adjustment", "zero_experts", "capacity"):
        if getattr(routing, name) is not None:
            used[name] = f"routing.{name}=null"
    if routing.expert_groups is not None and routing.expert_groups.keep is not None:
        used["expert_groups.keep"] = "routing.expert_groups.keep=null"
    if routing.capacity is not None and routing.capacity.overflow == "reroute":
        used["capacity.overflow"] = "routing.capacity.overflow=drop"
    return used


def keys_that_look_ahead(routing: RoutingConfig) -> list[str]:
    """The keys, with their values, by which the routing of a token depends on later tokens in training."""
    keys = [] if METHODS[routing.method].causal else [f"routing.method: {routing.method}"]
    if routing.capacity is not None and routing.capacity.policy != "position":
        keys.append(f"routing.capacity.policy: {routing.capacity.policy}")
    return keys


def _weights(routing: RoutingConfig) -> Iterator[str]:
    if routing.top_k == 1 and routing.score == "softmax_top_k":
        yield "routing.score: softmax_top_k with routing.top_k = 1 gives a constant weight and no gradient; use softmax"
    elif routing.top_k == 1 and routing.renormalise:
        yield "routing.renormalise: true with routing.top_k = 1 gives a constant weight and no gradient; use false"
    elif routing.renormalise and routing.score == "softmax_top_k":
        yield "routing.renormalise: true has no effect with routing.score: softmax_top_k, which sums to 1; use false"
    if routing.logit_normalisation is not None and routing.temperature != 1:
        yield (
            f"routing.temperature: {routing.temperature} has no effect with routing.logit_normalisation, which cancels it; "
            "use 1, or change logit_normalisation instead"
        )


def _refused(routing: RoutingConfig) -> Iterator[str]:
    for feature, remedy in features_in_use(routing).items():
        if feature == "capacity.overflow" and refusal(routing.method, "capacity"):
            continue  # it goes with the capacity
        if reason := refusal(routing.method, feature):
            key = "bias.rule" if feature == "bias" else feature
            yield f"routing.{key}: is not for routing.method: {routing.method}: {reason}; use {remedy}"


def _method(routing: RoutingConfig, num_experts: int) -> Iterator[str]:
    method = routing.method
    if method == "base" and routing.top_k != 1:
        yield (
            f"routing.top_k: {routing.top_k} is not for routing.method: base, which gives each token one expert; use 1, "
            "or routing.method: optimal_transport"
        )
    if method == "hash":
        yield from _hash(routing, num_experts)
    cap = routing.expert_choice.max_experts
    if method == "expert_choice" and cap is not None and not routing.top_k <= cap <= num_experts:
        yield (
            f"routing.expert_choice.max_experts: {cap} is not valid; it should be from routing.top_k = {routing.top_k}, "
            f"which tokens get on average, to moe.num_experts = {num_experts}"
        )
    stop = routing.gatepro.stop_step
    if method == "gatepro" and stop is not None and stop <= routing.gatepro.start_step:
        yield f"routing.gatepro.stop_step: {stop} is not after start_step = {routing.gatepro.start_step}"
    if routing.evaluation == "as_trained" and not METHODS[method].uses_group:
        yield (
            f"routing.evaluation: as_trained has no effect with routing.method: {method}, which routes alike in both; "
            "use causal"
        )
    if routing.dual_decay != RoutingConfig().dual_decay and not METHODS[method].uses_group:
        yield (
            f"routing.dual_decay: {routing.dual_decay} has no effect with routing.method: {method}, which has no prices; "
            f"use {RoutingConfig().dual_decay}, the default"
        )
    if method == "gatepro_ot" and routing.router_bias:
        yield "routing.router_bias: true is not for routing.method: gatepro_ot, which has no parameters; use false"


def _hash(routing: RoutingConfig, num_experts: int) -> Iterator[str]:
    if routing.hash.multi and num_experts % routing.top_k:
        yield (
            f"routing.hash.multi: true needs blocks of equally many experts; routing.top_k = {routing.top_k} does not "
            f"divide moe.num_experts = {num_experts}"
        )
    if routing.hash.weights == "learned":
        return
    idle = [f"losses.{name}" for name in ("z", "simbal", "orthogonality", "importance")]
    for feature, remedy in features_in_use(routing).items():
        if feature in idle:
            yield (
                f"routing.{feature}: is not for routing.hash.weights: constant: there is no router weight that it could "
                f"change; use {remedy}, or routing.hash.weights=learned"
            )
    for key, is_set in (
        ("router_bias", routing.router_bias),
        ("input_jitter", routing.input_jitter > 0),
        ("similarity", routing.similarity != "dot"),
        ("temperature", routing.temperature != 1),
        ("logit_normalisation", routing.logit_normalisation is not None),
    ):
        if is_set:
            yield f"routing.{key}: has no effect with routing.hash.weights: constant; leave it out, or use learned"
    if routing.capacity is not None and routing.capacity.policy in ("weight", "batch_priority"):
        yield (
            f"routing.capacity.policy: {routing.capacity.policy} has no effect with routing.hash.weights: constant, where no "
            "weight is higher than another; use position or random, or routing.hash.weights=learned"
        )


def _balancing(routing: RoutingConfig) -> Iterator[str]:
    losses = routing.losses
    for name in ("device", "communication"):
        if getattr(losses, name).coefficient and routing.expert_groups is None:
            yield f"routing.losses.{name}: needs groups of experts; set routing.expert_groups={{count: n}}"
    if losses.load_balance.adaptive is not None and routing.capacity is None:
        yield "routing.losses.load_balance.adaptive: follows the drop rate; set routing.capacity, or use null"
    if losses.load_balance.adaptive is not None and not losses.load_balance.coefficient:
        yield (
            "routing.losses.load_balance.adaptive: starts from routing.losses.load_balance.coefficient, and 0 switches the loss "
            "off; set the coefficient above 0, or use null"
        )
    if routing.zero_experts is not None:
        if routing.zero_experts.target >= routing.top_k:
            yield (
                f"routing.zero_experts.target: {routing.zero_experts.target} should be less than routing.top_k = "
                f"{routing.top_k}"
            )
        if routing.bias.rule in ("none", "multiplicative"):
            yield (
                f"routing.bias.rule: {routing.bias.rule} does not hold routing.zero_experts.target; use proportional, sign, "
                "momentum or quantile"
            )
        for name in ("load_balance", "device", "communication", "importance"):
            if getattr(losses, name).coefficient:
                yield (
                    f"routing.losses.{name}: is not for routing.zero_experts, which are balanced by the bias; use "
                    f"routing.losses.{name}.coefficient=0"
                )
        if routing.load_adjustment is not None:
            yield (
                "routing.load_adjustment: is not for routing.zero_experts, which are balanced by the bias; use "
                "routing.load_adjustment=null"
            )


def _expert_groups(routing: RoutingConfig, num_experts: int) -> Iterator[str]:
    groups = routing.expert_groups
    if groups is None:
        return
    if num_experts % groups.count:
        yield f"routing.expert_groups.count: {groups.count} does not divide moe.num_experts = {num_experts}"
    elif groups.keep is not None and groups.keep > groups.count:
        yield f"routing.expert_groups.keep: {groups.keep} is more than routing.expert_groups.count = {groups.count}"
    elif groups.keep is not None and groups.keep * (num_experts // groups.count) < routing.top_k:
        yield (
            f"routing.expert_groups.keep: {groups.keep} groups have {groups.keep * (num_experts // groups.count)} experts, "
            f"fewer than routing.top_k = {routing.top_k}"
        )
    if routing.zero_experts is not None and groups.keep is not None:
        yield "routing.expert_groups.keep: is not for routing.zero_experts, which are in no group; use null"
    uses = {"expert_groups.keep", "losses.device", "losses.communication"} & features_in_use(routing).keys()
    if routing.capacity is not None and routing.capacity.level == "expert_group":
        uses.add("capacity")
    if all(refusal(routing.method, use) for use in uses):
        yield (
            "routing.expert_groups: nothing uses them; use routing.expert_groups=null, or set keep, the coefficient of "
            "routing.losses.device or communication, or routing.capacity.level: expert_group"
        )


def _capacity(routing: RoutingConfig, capacity: CapacityConfig) -> Iterator[str]:
    if capacity.renormalise and routing.top_k == 1 and not METHODS[routing.method].varies:
        yield (
            "routing.capacity.renormalise: true has no effect with routing.top_k = 1, "
            "where a dropped token has no other expert; use false"
        )
    if capacity.policy == "choice" and routing.top_k == 1 and not METHODS[routing.method].varies:
        yield (
            "routing.capacity.policy: choice has no effect with routing.top_k = 1, where a token has no second choice; "
            "use position"
        )
    yield from _idle_auto(routing, capacity)
    if capacity.maximum_factor is not None and "auto" not in (capacity.factor, capacity.evaluation_factor):
        yield "routing.capacity.maximum_factor: bounds factor: auto only; leave it out, or use routing.capacity.factor=auto"
    if capacity.level == "expert_group" and routing.expert_groups is None:
        yield "routing.capacity.level: expert_group needs groups of experts; set routing.expert_groups={count: n}"
    if capacity.level == "expert_group" and capacity.pad:
        yield "routing.capacity.pad: true needs a capacity of each expert; use routing.capacity.level=expert, or pad=false"


def _idle_auto(routing: RoutingConfig, capacity: CapacityConfig) -> Iterator[str]:
    """What factor: auto without a bound makes idle: it drops nothing, so all it can do is to size padding."""
    if capacity.maximum_factor is not None:
        return
    for key in ("factor", "evaluation_factor"):
        if getattr(capacity, key) == "auto" and not capacity.pad:
            yield (
                f"routing.capacity.{key}: auto drops nothing without routing.capacity.maximum_factor, and pads nothing "
                "without routing.capacity.pad; set one of these, or a number"
            )
    if capacity.factor == "auto" and routing.losses.load_balance.adaptive is not None:
        yield (
            "routing.losses.load_balance.adaptive: follows the drop rate, which is 0 with routing.capacity.factor: auto; set "
            "routing.capacity.maximum_factor, or use null"
        )
    if capacity.factor == "auto" and capacity.evaluation_factor in ("auto", None):
        for key, default in (("policy", "position"), ("overflow", "drop"), ("renormalise", False)):
            if (value := getattr(capacity, key)) != default:
                yield (
                    f"routing.capacity.{key}: {show(value)} has no effect with routing.capacity.factor: auto, which drops "
                    f"nothing; use {show(default)}, or set routing.capacity.maximum_factor"
                )
