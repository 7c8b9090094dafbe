"""The table of routing.method: hash, from the training text or from a file.

Shape letters: V vocabulary, K experts per token, D width of an embedding, N tokens of the text.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_dist.config import Config, ConfigError
from moe_dist.engines.engine import Engine
from moe_dist.routing.hash import HashRouter
from moe_dist.routing.tables import SavedTable, balanced_table, load_table, multi_hash, random_table
from moe_dist.training.data import Data
from moe_dist.training.folder import complete_checkpoints

DIMENSIONS = 32
"""Of the vectors that stand for tokens where no embeddings are given."""


def set_tables(engine: Engine, data: Data) -> None:
    """Give every hash router its table; collective. Rank 0 makes it: k-means may round otherwise on another machine."""
    routers = [router for router in engine.routers if isinstance(router, HashRouter)]
    if not routers:
        return
    answer: list[npt.NDArray | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [table_of(engine.config, data).table_VK]
        except ValueError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    assert answer[0] is not None
    for router in routers:
        router.set_table(answer[0])


def table_of(config: Config, data: Data) -> SavedTable:
    """The table that a config means: of routing.hash.file, or made from the training text.

    Raises:
        ValueError: if the file holds none, or one of another size.
    """
    hash_config = config.routing.hash
    if hash_config.file is None:
        return make_table(config, data, None)
    saved = load_table(hash_config.file)
    shape = (*saved.table_VK.shape, saved.num_experts)
    needed = (config.model.vocab_size or data.vocab_size, config.routing.top_k, config.moe.num_experts)
    if shape != needed:
        raise ValueError(
            f"routing.hash.file: {hash_config.file!r} is for {shape[0]} tokens, {shape[1]} experts a token and {shape[2]} "
            f"experts; this run has {needed[0]}, {needed[1]} and {needed[2]}"
        )
    return saved


def make_table(config: Config, data: Data, embedding_VD: npt.NDArray | None) -> SavedTable:
    """Make the table that `routing.hash.table` names from the training text.

    Args:
        embedding_VD: vectors in which similar tokens are near; default from how often tokens stand side by side.
    """
    vocab_size, num_experts = config.model.vocab_size or data.vocab_size, config.moe.num_experts
    stream_N, kind, seed = data.training_stream(), config.routing.hash.table, config.training.seed
    count_V = np.bincount(stream_N, minlength=vocab_size)

    def make(experts: int, top_k: int, seed: int) -> npt.NDArray[np.int64]:
        if kind == "random":
            return random_table(vocab_size, experts, top_k, seed)
        if kind == "balanced":
            return balanced_table(count_V, experts, top_k, seed if config.routing.hash.multi else None)
        from moe_dist.routing import clusters  # imports scipy, which takes a while

        vector_VD = embedding_VD
        if vector_VD is None:
            vector_VD = clusters.cooccurrence_vectors(stream_N, vocab_size, min(DIMENSIONS, vocab_size - 1))
        if kind == "clustered":
            return clusters.clustered_table(vector_VD, experts, top_k, seed)
        return clusters.dispersed_table(vector_VD, count_V, experts, top_k, seed)

    if config.routing.hash.multi:
        table_VK = multi_hash(
            lambda size, block_seed: make(size, 1, block_seed), num_experts, config.routing.top_k, seed
        )
    else:
        table_VK = make(num_experts, config.routing.top_k, seed)
    return SavedTable(table_VK, kind, seed, num_experts, count_V)


def trained_embedding(run: Path) -> npt.NDArray:
    """The input embedding [V, D] of the last checkpoint of a run. Raises ConfigError if there is none."""
    checkpoints = complete_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"--embeddings: {str(run)!r} holds no complete checkpoint")
    name = "model.embedding.weight"
    saved = dcp.FileSystemReader(checkpoints[-1]).read_metadata().state_dict_metadata[name]
    assert isinstance(saved, TensorStorageMetadata)
    state = {name: torch.empty(saved.size)}
    dcp.load(state, checkpoint_id=checkpoints[-1], no_dist=True)
    return state[name].double().numpy()
