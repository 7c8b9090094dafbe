"""How many parameters a config means, without building the model."""

from dataclasses import dataclass

from moe_dist.config.layout import moe_layers
from moe_dist.config.schema import BYTE_VOCABULARY, Config


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: of the routed experts and of everything else, and of the experts that one token uses."""

    experts: int
    active_experts: int
    rest: int


def size_of(config: Config) -> ModelSize:
    """The parameters of the model of a config."""
    num_moe = len(moe_layers(config))
    num_dense = config.model.num_layers - num_moe
    routed = num_moe * _expert(config)
    layers = (
        config.model.num_layers * _attention(config)
        + num_dense * 3 * config.model.hidden_size * config.model.ffn_size
        + num_moe * (_router(config) + _shared_experts(config))
    )
    return ModelSize(
        experts=routed * config.moe.num_experts,
        active_experts=routed * config.routing.top_k,
        rest=layers + _embeddings(config),
    )


def flops_per_token(config: Config) -> float:
    """Floating-point operations that training a token needs, forward and backward (arXiv 2204.02311, appendix B).

    6 for each active weight, of which the router's are, but not the input embedding's, and 12 x heads x head size x sequence
    length for the attention scores of a layer, as if no position were masked. What is computed again in backward, empty rows
    and what a balancing method computes are no part of it.
    """
    size, model = size_of(config), config.model
    looked_up = 0 if model.tie_embeddings else (model.vocab_size or BYTE_VOCABULARY) * model.hidden_size
    width = model.num_heads * (model.head_size or model.hidden_size // model.num_heads)
    attention = 12 * model.num_layers * width * config.training.sequence_length
    return 6.0 * (size.rest + size.active_experts - looked_up) + attention


def _embeddings(config: Config) -> int:
    """Input and output embedding, and the last norm."""
    model = config.model
    tables = 1 if model.tie_embeddings else 2
    return tables * (model.vocab_size or BYTE_VOCABULARY) * model.hidden_size + model.hidden_size


def _attention(config: Config) -> int:
    """Projections of one layer, its two norms, and the norms of queries and keys."""
    model = config.model
    head_size = model.head_size or model.hidden_size // model.num_heads
    query, key = model.num_heads * head_size, (model.num_kv_heads or model.num_heads) * head_size
    qk_norm = {"none": 0, "head": 2 * head_size, "width": query + key}[model.qk_norm]
    return model.hidden_size * (2 * query + 2 * key + 2) + qk_norm


def _expert(config: Config) -> int:
    matrices = {"swiglu": 3, "gelu": 2}[config.moe.activation]
    return matrices * config.model.hidden_size * config.moe.ffn_size


def _router(config: Config) -> int:
    return config.model.hidden_size * config.moe.num_experts


def _shared_experts(config: Config) -> int:
    gate = config.model.hidden_size if config.moe.shared_gate else 0
    return config.moe.num_shared_experts * _expert(config) + gate
