"""`moe-dist hash-table`: make and save the table of routing.method: hash."""

from pathlib import Path

from moe_dist.config import Config, ConfigError
from moe_dist.routing.tables import expected_max_vio, save_table, unavoidable_max_vio
from moe_dist.training.data import TextData
from moe_dist.training.hash_tables import make_table, trained_embedding


def make(config: Config, output: Path, embeddings: Path | None) -> None:
    """Write the table to `output`, and tell how balanced it is on the text it was made from."""
    if config.routing.method != "hash":
        raise ConfigError(f"routing.method: {config.routing.method} has no table; use hash")
    embedding_VD = None if embeddings is None else trained_embedding(embeddings)
    try:
        saved = make_table(config, TextData(config), embedding_VD)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    save_table(output, saved)
    top_k = config.routing.top_k
    print(f"{saved.kind} table of {len(saved.table_VK)} tokens x {top_k} experts of {saved.num_experts} in {output}")
    print(
        f"MaxVio on the training text {expected_max_vio(saved.count_V, saved.table_VK, saved.num_experts):.3f}; "
        f"no table has less than {unavoidable_max_vio(saved.count_V, saved.num_experts, top_k):.3f}"
    )
    print(f"use it by routing.hash.file={output}")
