"""Hash tables: the experts of each token id, fixed before training (hash layers, arXiv 2106.04426).

A table is int64 [V, K]: for every id K different experts. Tables that balance do so on the counts of a corpus, in
integers. Ids that the corpus lacks are spread evenly on their own: by their counts of 0 all would fit on one expert.

Tables and permutations are the same on every machine and with every version of numpy. Those that need to know which ids are
similar are in moe_dist.routing.clusters.

Shape letters: V vocabulary, E experts, K experts per token, B blocks of S experts.
"""

import hashlib
import heapq
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FIELDS = {
    "table": ("integers [V, K]", 2, "iu"),
    "kind": ("text", 0, "U"),
    "seed": ("an integer", 0, "iu"),
    "num_experts": ("an integer", 0, "iu"),
    "counts": ("integers [V]", 1, "iu"),
}
"""Of a saved table: what each array holds, its number of axes, and the kinds of dtype that it may have."""


def random_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> Integers:
    """Every K different experts are equally likely for every id; int64 [V, K]."""
    raw_VK = raw_bits(vocab_size * top_k, "random table", seed).reshape(vocab_size, top_k)
    table_VK = np.empty((vocab_size, top_k), dtype=np.int64)
    for k in range(top_k):
        # Of the E - k experts that the id does not have yet, the pick-th: step over those that it has, lowest first.
        pick_V = (raw_VK[:, k] % (num_experts - k)).astype(np.int64)
        for taken_V in np.sort(table_VK[:, :k], axis=1).T:
            pick_V += pick_V >= taken_V
        table_VK[:, k] = pick_V
    return table_VK


def balanced_table(count_V: Integers, num_experts: int, top_k: int, seed: int | None = None) -> Integers:
    """Ids by falling count, each to the K experts of least load so far, of equals the lower; int64 [V, K].

    The balanced hash of arXiv 2106.04426. An id adds the same load, count / K, to each of its experts.

    Args:
        count_V: how often the corpus has each id.
        seed: shuffles ids of similar counts, so that the hashes of `multi_hash` differ; None: strictly by count.
    """
    table_VK = np.empty((len(count_V), top_k), dtype=np.int64)
    seen, unseen = by_falling_count(count_V, seed)
    # Load and expert as one integer, load * E + expert: quick to compare, and never rounded.
    heap = list(range(num_experts))
    for token_id, count in zip(seen, count_V[seen].tolist(), strict=True):
        lightest = [heapq.heappop(heap) for _ in range(top_k)]
        table_VK[token_id] = [entry % num_experts for entry in lightest]
        for entry in lightest:
            heapq.heappush(heap, entry + count * num_experts)
    table_VK[unseen] = in_turn(len(unseen), num_experts, top_k)
    return table_VK


def multi_hash(make: Callable[[int, int], Integers], num_experts: int, top_k: int, seed: int) -> Integers:
    """K independent hashes, the j-th within the j-th of K equal blocks of consecutive experts; int64 [V, K].

    MultiHash, arXiv 2106.04426: an FFN split into K segments, each chosen by a hash of its own, is the sum of
    K narrow experts, one from each block.

    Args:
        make: (number of experts, seed) -> table [V, 1]; called for each block, with its size and a seed of its own.

    Raises:
        ValueError: K does not divide E.
    """
    size, rest = divmod(num_experts, top_k)
    if rest:
        raise ValueError(
            f"routing.hash.multi: true gives each of routing.top_k = {top_k} hashes an equal share of moe.num_experts = "
            f"{num_experts}, which is not a multiple; change one of the two, or use false"
        )
    return np.hstack([block * size + make(size, seed * top_k + block) for block in range(top_k)])


def permuted(table_VK: Integers, num_experts: int, layer: int, seed: int, num_blocks: int = 1) -> Integers:
    """The table with its experts renamed by a permutation of (seed, layer), for each layer another; int64 [V, K].

    Args:
        num_blocks: of consecutive experts, within which they are permuted: K for a table of `multi_hash`, else 1.
    """
    raw_BS = raw_bits(num_experts, "layer", seed, layer).reshape(num_blocks, -1)
    first_B = np.arange(0, num_experts, raw_BS.shape[1])
    name_BS = first_B[:, None] + np.argsort(raw_BS, axis=1, kind="stable")
    return name_BS.reshape(-1)[table_VK]


def expected_max_vio(count_V: Integers, table_VK: Integers, num_experts: int) -> float:
    """MaxVio, (max - mean) / mean of the loads, that the table gives on a corpus of these counts."""
    load_E = np.bincount(table_VK.reshape(-1), np.repeat(count_V, table_VK.shape[1]), minlength=num_experts)
    return float(load_E.max() / load_E.mean()) - 1


def unavoidable_max_vio(count_V: Integers, num_experts: int, top_k: int) -> float:
    """max(p_max E / K - 1, 0): no table gives less, as every expert of the most frequent id has all of its tokens."""
    return max(float(count_V.max() / count_V.sum()) * num_experts / top_k - 1, 0.0)


@dataclass(frozen=True)
class SavedTable:
    """A table and what it was made from."""

    table_VK: Integers
    kind: str
    seed: int
    num_experts: int
    count_V: Integers


def save_table(path: str | Path, saved: SavedTable) -> None:
    """Write an .npz file of the arrays in FIELDS."""
    kind, seed, num_experts = (np.array(value) for value in (saved.kind, saved.seed, saved.num_experts))
    with open(path, "wb") as file:  # to a path, numpy would add .npz
        np.savez_compressed(
            file, table=saved.table_VK, kind=kind, seed=seed, num_experts=num_experts, counts=saved.count_V
        )


def load_table(path: str | Path) -> SavedTable:
    """What save_table wrote.

    Raises:
        ValueError: the file cannot be read, or does not hold K different experts from 0 to E - 1 for each id.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("there is no .npz file of this name")
        with np.load(path) as arrays:
            table, kind, seed, num_experts, counts = fields = [arrays[name] for name in FIELDS]
        _check(fields)
    except Exception as error:  # of a damaged file, numpy and zipfile raise errors of all kinds
        raise ValueError(f"routing.hash.file: {str(path)!r} holds no valid table: {error}") from error
    return SavedTable(table.astype(np.int64), str(kind), int(seed), int(num_experts), counts.astype(np.int64))


def _check(fields: list[npt.NDArray[Any]]) -> None:
    for (name, (words, num_axes, kinds)), array in zip(FIELDS.items(), fields, strict=True):
        if array.ndim != num_axes or array.dtype.kind not in kinds:
            raise ValueError(f"its {name} is {array.dtype} {list(array.shape)}; it should be {words}")
    table, _, _, num_experts, counts = fields
    if table.size == 0:
        raise ValueError(f"its table {list(table.shape)} is empty")
    if len(counts) != len(table) or counts.min() < 0:
        raise ValueError(f"its counts should be {len(table)} numbers of at least 0, one for each id of its table")
    outside = np.argwhere((table < 0) | (table >= num_experts))
    if len(outside):
        expert = table[tuple(outside[0])]
        raise ValueError(
            f"id {outside[0, 0]} has expert {expert}, but num_experts = {num_experts}: 0 to {num_experts - 1}"
        )
    twice = np.flatnonzero((np.diff(np.sort(table, axis=1)) == 0).any(axis=1))
    if len(twice):
        raise ValueError(f"id {twice[0]} has an expert twice: {table[twice[0]].tolist()}")


def by_falling_count(count_V: Integers, seed: int | None) -> tuple[Integers, Integers]:
    """The ids that a corpus has by falling count, and those that it lacks; of equals, lower ids first.

    With a seed, counts are first multiplied by random factors from 1 to 2: the balance of a greedy assignment is as good,
    as rare ids still come last, but which ids are together is another matter. Ids without a count are shuffled.
    """
    raw_V = np.zeros(len(count_V), np.uint64) if seed is None else raw_bits(len(count_V), "order", seed)
    factor_V = 256 + (raw_V >> 56).astype(np.int64)  # in integers, which hold counts up to 2^54
    order_V = np.lexsort((raw_V, -count_V * factor_V))
    num_seen = np.count_nonzero(count_V)
    return order_V[:num_seen], order_V[num_seen:]


def in_turn(num_ids: int, num_experts: int, top_k: int) -> Integers:
    """[num_ids, K]: experts 0 to E - 1 over and over, so that no expert has two ids more than another."""
    return np.arange(num_ids * top_k).reshape(num_ids, top_k) % num_experts


def uniform(size: int, *key: str | int) -> Floats:
    """Random numbers above 0, up to 1."""
    return ((raw_bits(size, *key) >> 11) + 1).astype(np.float64) / 2**53


def raw_bits(size: int, *key: str | int) -> npt.NDArray[np.uint64]:
    """64 random bits each, a function of the key; numpy promises that they never change, but not so for Generator."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(size)
