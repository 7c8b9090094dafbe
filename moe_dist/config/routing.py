"""The section `routing`: the method, its settings, and everything that balances it."""

from typing import Annotated, Literal

from pydantic import Field

from moe_dist.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Switch
from moe_dist.config.methods import MethodName


class SequenceGroup(Section):
    """Routing groups of n consecutive sequences of the global batch."""

    sequences: PositiveInt = 1
    """Sequences in a group; must divide training.micro_batch_size."""


class ExpertGroupsConfig(Section):
    """Equal blocks of consecutive experts, such as those of a device or a node."""

    count: PositiveInt
    """Number of groups; must divide moe.num_experts."""
    keep: PositiveInt | None = None
    """A token chooses inside its n best groups only (node-limited routing). null: no limit."""
    score: Literal["max", "top_2_sum"] = "top_2_sum"
    """What makes a group good: its best score (DeepSeek-V2), or the sum of its two best, bias included (DeepSeek-V3)."""


class ZeroExpertsConfig(Section):
    """Experts that compute nothing: the token itself is their output, so they never travel (LongCat, arXiv 2509.01322)."""

    count: PositiveInt
    """How many; they stand behind the routed experts in the router."""
    target: PositiveFloat
    """Routed experts that a token should use on average, less than routing.top_k; the bias rule holds it."""


class LoadAdjustmentConfig(Section):
    """Logits are lowered where the load was high: logit -= strength * (recent load / mean - 1)."""

    strength: PositiveFloat
    """In units of the logits."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """The recent load is an exponential moving average over optimiser steps."""


class ExpertChoiceConfig(Section):
    """Settings of method: expert_choice."""

    max_experts: PositiveInt | None = None
    """A token is chosen by at most this many experts, at least routing.top_k. null: by any number."""


class HashConfig(Section):
    """Settings of method: hash."""

    table: Literal["balanced", "random", "clustered", "dispersed"] = "balanced"
    """Built from the training text. balanced: frequent tokens first, each to the least loaded experts; clustered: similar
    tokens together; dispersed: similar tokens apart."""
    file: str | None = None
    """A table made by `moe-dist hash-table`, instead of one made at the start of the run."""
    multi: Switch = False
    """MultiHash: the j-th of top_k independent hashes chooses in the j-th of top_k blocks of experts; weights are 1."""
    weights: Literal["constant", "learned"] = "constant"
    """constant: 1 / top_k, and no router weight; learned: scores of a linear router at the table's experts (DeepSeek-V4)."""


class SinkhornConfig(Section):
    """Settings of method: sinkhorn."""

    epsilon: PositiveFloat = 0.5
    """Entropic regularisation, in standard deviations of the logits of a routing group."""
    iterations: PositiveInt = 10
    """A fixed number, so that all ranks do the same."""


class OptimalTransportConfig(Section):
    """Settings of method: optimal_transport, and of gatepro_ot."""

    iterations: PositiveInt = 4
    """Sweeps of coordinate descent on the prices, warm-started from those of earlier steps."""


class BaseLayersConfig(Section):
    """Settings of method: base."""

    rounds: PositiveInt = 100
    """Most rounds of the auction; what is then left is assigned greedily."""


class GateProConfig(Section):
    """Settings of method: gatepro."""

    penalty: NonNegativeFloat | Literal["hard"] = 1e-4
    """What the loser of a pair of most similar experts loses of its logit; hard: it comes after all experts that win."""
    start_step: NonNegativeInt = 0
    """The competition is on from this optimiser step ..."""
    stop_step: PositiveInt | None = None
    """... to before this one. null: to the end."""


class GateProOTConfig(Section):
    """Settings of method: gatepro_ot."""

    matching: Literal["optimal_transport", "greedy"] = "optimal_transport"
    """By prices and rounding, or greedily by falling affinity."""
    weights: Literal["constant", "score"] = "score"
    """1 / top_k, or the scores of the projection; there is no router weight to train in either case."""


class ExpertThresholdConfig(Section):
    """Settings of method: expert_threshold."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the moving average of each expert's threshold."""


class BiasConfig(Section):
    """Loss-free balancing: a bias per expert, for selection only, changed once per optimiser step."""

    rule: Literal["none", "sign", "proportional", "multiplicative", "momentum", "quantile"] = "none"
    """sign: bias += rate * sign(error), where error = (mean load - load) / mean load (arXiv 2408.15664, Algorithm 1);
    proportional: bias += rate * error; multiplicative: scores times a factor, factor += rate * sign(error);
    momentum: a moving average of rate * tanh(slope * error) (SMEBU, arXiv 2602.17004);
    quantile: the bias that would have balanced the step, from histograms, without a rate (arXiv 2607.24653)."""
    rate: PositiveFloat = 1e-3
    """Size of one update, in units of the scores (multiplicative: relative to them, so that it needs a larger one)."""
    final_rate: NonNegativeFloat | None = None
    """The rate falls linearly to this value over training.steps. Default: it stays."""
    stop_step: PositiveInt | None = None
    """From this optimiser step on the bias stays as it is (DeepSeek-V3). null: it never does."""
    centre: Switch = True
    """Keep the mean of the biases at 0 (1 for multiplicative), which no choice depends on."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """momentum: weight of the earlier updates in the average."""
    slope: PositiveFloat = 2.0
    """momentum: how soon tanh saturates."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """quantile: weight of the earlier biases in a moving average."""


class AdaptiveConfig(Section):
    """Skywork-MoE's coefficient: c = decay * c + (1 - decay) * min(ratio * drop rate, maximum), each step and layer."""

    ratio: PositiveFloat = 0.2
    """xi of arXiv 2406.06563."""
    maximum: PositiveFloat = 0.01
    """Largest coefficient."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """beta of arXiv 2406.06563."""


class BalanceLossConfig(Section):
    """A load-balance loss, normalised so that uniform routing gives exactly the coefficient."""

    coefficient: NonNegativeFloat = 0.0
    """0 switches it off."""
    scope: Literal["micro_batch", "sequence", "global_batch"] = "sequence"
    """Over which tokens loads are counted. micro_batch: those of this rank's forward; sequence: each sequence on its own;
    global_batch: all ranks, summed over the accumulation steps so far (arXiv 2501.11873)."""


class LoadBalanceLossConfig(BalanceLossConfig):
    """Loads of single experts: Switch (scope: micro_batch), GShard (choices: first), DeepSeek-V3 (scope: sequence)."""

    choices: Literal["all", "first"] = "all"
    """first: only the best expert of each token counts in the loads, as in GShard (arXiv 2006.16668)."""
    adaptive: AdaptiveConfig | None = None
    """Let the coefficient follow the drop rate of the layer, starting from `coefficient`. Needs routing.capacity."""


class CoefficientConfig(Section):
    """An auxiliary loss with a coefficient."""

    coefficient: NonNegativeFloat = 0.0
    """0 switches it off."""


class LossesConfig(Section):
    """Auxiliary losses of the router."""

    scaling: Literal["uniform", "paper"] = "uniform"
    """uniform: a coefficient means the same for every number of experts and of experts per token; paper: as printed in the
    papers (Switch over k choices: k times as much; GShard: 1 / E^2; communication: by routing.expert_groups.keep; similarity
    losses: sums over pairs of experts instead of means)."""
    load_balance: LoadBalanceLossConfig = LoadBalanceLossConfig()
    """Of experts."""
    device: BalanceLossConfig = BalanceLossConfig()
    """Of routing.expert_groups (DeepSeekMoE, arXiv 2401.06066)."""
    communication: BalanceLossConfig = BalanceLossConfig()
    """Of the tokens sent to each of routing.expert_groups (DeepSeek-V2, arXiv 2405.04434)."""
    importance: CoefficientConfig = CoefficientConfig()
    """Squared coefficient of variation of the summed weights of each expert (arXiv 1701.06538)."""
    load: CoefficientConfig = CoefficientConfig()
    """Squared coefficient of variation of a smooth estimate of the loads; only with noise (arXiv 1701.06538)."""
    z: CoefficientConfig = CoefficientConfig()
    """mean(logsumexp(logits)^2) (arXiv 2202.08906)."""
    simbal: CoefficientConfig = CoefficientConfig()
    """|W W^T - I|_1 of the router weight (SimBal, arXiv 2506.14038)."""
    orthogonality: CoefficientConfig = CoefficientConfig()
    """Squared cosines between the rows of the router weight (as ERNIE 4.5 keeps its router orthogonal)."""


class CapacityConfig(Section):
    """A limit on the pairs that an expert takes from one routing group: ceil(factor * k * tokens / experts).

    With zero-computation experts, k is their target: what routed experts get if the load is balanced."""

    factor: PositiveFloat | Literal["auto"]
    """Room over the balanced load; 1.0 is exactly the balanced load. auto: what the fullest expert needs."""
    maximum_factor: PositiveFloat | None = None
    """Upper bound on auto."""
    minimum: PositiveInt = 1
    """Least capacity of an expert in a routing group, in pairs."""
    evaluation_factor: PositiveFloat | Literal["auto"] | None = None
    """The factor in evaluation. null: no limit there."""
    policy: Literal["position", "choice", "weight", "random", "batch_priority"] = "position"
    """Which pairs stay when an expert is full: the earliest (causal); first choices of all tokens before second ones, each by
    position (GShard, arXiv 2006.16668, and DeepSpeed's top-2); those of highest weight; random ones (DeepSpeed's top-1); or
    those of the tokens with the highest score (V-MoE, arXiv 2106.05974). By all but position, a later token may take an
    earlier one's place."""
    overflow: Literal["drop", "reroute"] = "drop"
    """reroute: a token goes on to its next best expert that has room."""
    level: Literal["expert", "expert_group"] = "expert"
    """expert_group: the limit is on each of routing.expert_groups as a whole (devices or nodes; DeepSeek-V2)."""
    renormalise: Switch = False
    """Scale the weights of a token's kept pairs up to the sum they had before dropping."""
    pad: Switch = False
    """Send exactly the capacity to every expert, padded by empty rows: static shapes, no exchange of counts."""


class RoutingConfig(Section):
    """Which experts a token uses, with what weight, and how the load is kept balanced."""

    method: MethodName = "top_k"
    """See docs/routing.md for each."""
    score: Literal["softmax", "softmax_top_k", "sigmoid", "sqrt_softplus"] = "softmax"
    """softmax over all experts; softmax_top_k: softmax over the chosen (Mixtral); sigmoid (DeepSeek-V3); sqrt_softplus:
    sqrt(log(1 + exp(logit))) (DeepSeek-V4)."""
    top_k: PositiveInt = 2
    """Experts per token (on average, where the method lets it vary)."""
    renormalise: Switch = False
    """Divide a token's weights by their sum. softmax_top_k is normalised already."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies the weights after renormalisation (DeepSeek-V3: 2.5)."""
    weight_on: Literal["output", "input"] = "output"
    """Whether the weight multiplies what leaves the expert, or what enters it (Llama 4)."""
    similarity: Literal["dot", "cosine"] = "dot"
    """Logits are dot products or cosines of the hidden state and the rows of the router weight."""
    temperature: PositiveFloat = 1.0
    """Divides the logits; cosines need one well below 1."""
    router_bias: Switch = False
    """A learned bias of the logits (gpt-oss)."""
    logit_normalisation: PositiveFloat | None = None
    """Each token's logits are centred, divided by their standard deviation and multiplied by this (Skywork-MoE)."""
    input_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training, what the router sees is multiplied by uniform noise in 1 +- this (Switch: 0.01)."""
    init_std: PositiveFloat = 0.006
    """Standard deviation of the router's initial weight (arXiv 2408.15664: 0.006)."""
    group: SequenceGroup | Literal["global", "rank"] = SequenceGroup()
    """Tokens over which a decision on more than one token is taken: {sequences: n}, rank (this rank's micro-batch), or global
    (the micro-batches of all ranks)."""
    expert_groups: ExpertGroupsConfig | None = None
    """For node-limited routing, the device and communication losses, and capacity of level expert_group."""
    zero_experts: ZeroExpertsConfig | None = None
    """Experts that compute nothing."""
    load_adjustment: LoadAdjustmentConfig | None = None
    """Load-aware adjustment of the logits."""
    evaluation: Literal["causal", "as_trained"] = "causal"
    """How methods that look at other tokens in training route in evaluation: each token by its own scores, adjusted by moving
    averages of what balanced the training steps, or as in training."""
    dual_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of these moving averages."""
    expert_choice: ExpertChoiceConfig = ExpertChoiceConfig()
    hash: HashConfig = HashConfig()
    sinkhorn: SinkhornConfig = SinkhornConfig()
    optimal_transport: OptimalTransportConfig = OptimalTransportConfig()
    base: BaseLayersConfig = BaseLayersConfig()
    gatepro: GateProConfig = GateProConfig()
    gatepro_ot: GateProOTConfig = GateProOTConfig()
    expert_threshold: ExpertThresholdConfig = ExpertThresholdConfig()
    bias: BiasConfig = BiasConfig()
    """Loss-free balancing."""
    losses: LossesConfig = LossesConfig()
    """Auxiliary losses."""
    capacity: CapacityConfig | None = None
    """null: dropless."""
