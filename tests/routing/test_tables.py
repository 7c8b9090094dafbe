"""Hash tables against plain loops: who is where, how balanced it is, and that it is always the same."""

import runpy
import sys
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.routing import tables
from moe_dist.routing.clusters import clustered_table, cooccurrence_vectors, dispersed_table, k_means
from moe_dist.routing.tables import (
    SavedTable,
    balanced_table,
    expected_max_vio,
    load_table,
    multi_hash,
    permuted,
    random_table,
    save_table,
    unavoidable_max_vio,
)

Array = np.ndarray[Any, Any]
Make = Callable[[Array, Array, int, int, int], Array]

KINDS: dict[str, Make] = {
    "random": lambda count, vector, experts, k, seed: random_table(len(count), experts, k, seed),
    "balanced": lambda count, vector, experts, k, seed: balanced_table(count, experts, k),
    "balanced, shuffled": lambda count, vector, experts, k, seed: balanced_table(count, experts, k, seed),
    "clustered": lambda count, vector, experts, k, seed: clustered_table(vector, experts, k, seed),
    "dispersed": lambda count, vector, experts, k, seed: dispersed_table(vector, count, experts, k, seed),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def zipf(vocab_size: int, total: int = 10**8) -> Array:
    return (total / np.arange(1, vocab_size + 1)).astype(np.int64)


def planted_vectors(vocab_size: int, clusters: int, dimensions: int = 4) -> Array:
    """Ids of the same remainder by `clusters` lie together, far from the others."""
    generator = np.random.default_rng(0)
    centre_CD = 100 * np.eye(max(clusters, dimensions))[:clusters]
    return centre_CD[np.arange(vocab_size) % clusters] + generator.normal(size=(vocab_size, centre_CD.shape[1]))


def members_per_expert(table: Array, ids: Array, num_experts: int) -> Array:
    return np.bincount(table[ids].reshape(-1), minlength=num_experts)


def is_even(members: Array) -> bool:
    return bool(members.max() - members.min() <= 1)


@st.composite
def corpora(draw: Any) -> tuple[Array, Array, int, int, int]:
    """Counts (some 0), vectors (some zero, the first E not), E, K and a seed."""
    experts = draw(st.integers(1, 6))
    counts = st.sampled_from([0, 0, 1, 2, 3, 10, 100, 10**6])
    count = np.array(draw(st.lists(counts, min_size=experts, max_size=30)))
    count[draw(st.integers(0, len(count) - 1))] += 1
    vector = np.random.default_rng(draw(st.integers(0, 9))).normal(size=(len(count), 2))
    vector[sorted(draw(st.sets(st.sampled_from(range(len(count))))) - set(range(experts)))] = 0
    return count, vector, experts, draw(st.integers(1, experts)), draw(st.integers(0, 3))


@every_kind
@settings(max_examples=40, deadline=None)
@given(corpus=corpora())
def test_every_id_has_different_experts_and_always_the_same(kind: str, corpus: Any) -> None:
    count, vector, experts, k, seed = corpus
    table = KINDS[kind](count, vector, experts, k, seed)
    assert (table.dtype, table.shape) == (np.int64, (len(count), k))
    assert all(len(set(row)) == k and set(row) <= set(range(experts)) for row in table.tolist())
    np.testing.assert_array_equal(KINDS[kind](count.copy(), vector.copy(), experts, k, seed), table)
    assert expected_max_vio(count, table, experts) >= unavoidable_max_vio(count, experts, k) - 1e-12


def test_no_torch_is_needed() -> None:
    with patch.dict(sys.modules, {"torch": None}):
        runpy.run_path(tables.__file__)


# Random.


def raw_bits(size: int, key: str) -> list[int]:
    return np.random.PCG64(int.from_bytes(sha256(key.encode()).digest()[:8], "little")).random_raw(size).tolist()


def test_random_table_never_changes() -> None:
    """Written down once. Runs that go on with a later version of numpy, or on another machine, rely on it."""
    expected = [[7, 6, 4], [3, 0, 4], [7, 0, 3], [2, 3, 4], [6, 0, 1], [1, 7, 2]]
    assert random_table(6, 8, 3, seed=0).tolist() == expected
    assert random_table(6, 8, 3, seed=1).tolist() != expected


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 9), vocab=st.integers(1, 20), seed=st.integers(0, 2**63), data=st.data())
def test_random_table_draws_from_the_experts_that_are_left(experts: int, vocab: int, seed: int, data: Any) -> None:
    k = data.draw(st.integers(1, experts))
    raw, expected = iter(raw_bits(vocab * k, f"random table/{seed}")), []
    for _ in range(vocab):
        left = list(range(experts))
        expected.append([left.pop(next(raw) % len(left)) for _ in range(k)])
    assert random_table(vocab, experts, k, seed).tolist() == expected


def test_random_table_is_uniform() -> None:
    """Each of 4 * 3 ordered pairs for 1000 of 12000 ids, within 4 standard deviations of 30."""
    pair, times = np.unique(random_table(12000, 4, 2, seed=0), axis=0, return_counts=True)
    assert len(pair) == 12
    assert np.abs(times - 1000).max() < 4 * 30.3


# Balanced.


def test_balanced_by_hand() -> None:
    """5 -> 0; 4 -> 1; 3 -> 1 (4 < 5); 1 -> 0 (5 < 7); the unseen ids 3, 5 and 6 in turn."""
    assert balanced_table(np.array([5, 1, 4, 0, 3, 0, 0]), 2, 1).tolist() == [[0], [0], [1], [0], [1], [1], [0]]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), scale=st.sampled_from([1, 10**9]))
def test_balanced_against_a_plain_loop(corpus: Any, scale: int) -> None:
    count, _, experts, k, _ = corpus
    order = sorted(range(len(count)), key=lambda i: -count[i])
    expected: dict[int, list[int]] = {}
    for seen in (True, False):
        load = [Fraction(0)] * experts
        for i in order:
            if (count[i] > 0) == seen:
                expected[i] = sorted(range(experts), key=lambda e: load[e])[:k]
                for e in expected[i]:
                    load[e] += Fraction(int(count[i]) or 1, k)
    assert balanced_table(count * scale, experts, k).tolist() == [expected[i] for i in range(len(count))]


@pytest.mark.parametrize("shuffled", [None, 0], ids=["by count", "shuffled"])
@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (64, 1), (64, 6)])
@pytest.mark.parametrize(("vocab", "delta"), [(257, 0.03), (8000, 0.001)])
def test_max_vio_is_the_unavoidable_or_small(
    vocab: int, delta: float, experts: int, k: int, shuffled: int | None
) -> None:
    """routing.md, oracle 12: max load / mean <= max(p_max E / k, 1 + delta); no id of a uniform corpus is too frequent."""
    for count in (zipf(vocab), np.full(vocab, 1000)):
        p_max = count.max() / count.sum()
        rounding = experts * p_max / k if count[0] == count[-1] else 0  # V K / E equal ids may be no integer
        max_vio = expected_max_vio(count, balanced_table(count, experts, k, shuffled), experts)
        assert max_vio <= max(p_max * experts / k, 1 + max(delta, rounding)) - 1 + 1e-9


@pytest.mark.parametrize(("experts", "k", "expected"), [(64, 1, 4.84), (8, 1, 0.0), (64, 6, 0.0)])
def test_max_vio_of_a_known_corpus(experts: int, k: int, expected: float) -> None:
    """Zipf's law with 32k ids, as in routing.md; a random table is worse."""
    count = zipf(32000)
    assert expected_max_vio(count, balanced_table(count, experts, k), experts) == pytest.approx(expected, abs=0.005)
    assert expected_max_vio(count, random_table(32000, experts, k, seed=0), experts) > expected + 0.3


@pytest.mark.parametrize("seed", [None, 3])
def test_ids_that_the_corpus_lacks_are_spread_evenly(seed: int | None) -> None:
    count = zipf(257, total=1000) * (np.arange(257) % 2)
    table = balanced_table(count, 8, 3, seed)
    assert is_even(members_per_expert(table, count == 0, 8))


@pytest.mark.parametrize("unseen", [False, True])
def test_seeds_shuffle_who_is_together(unseen: bool) -> None:
    """Of the ids together in one hash, 1/E are together in another; strictly by count, they would be the same."""
    count, experts = zipf(4000) * (not unseen), 8
    first, second = (balanced_table(count, experts, 1, seed)[:, 0] for seed in (0, 1))
    together = np.zeros((experts, experts))
    np.add.at(together, (first, second), 1)
    ratio = (together**2).sum() / (together.sum(1) ** 2).sum()
    assert ratio == pytest.approx(1 / experts, rel=0.05)


# Clustered and dispersed.


@settings(max_examples=30, deadline=None)
@given(corpus=corpora())
def test_clustered_is_the_nearest_centroids(corpus: Any) -> None:
    _, vector, experts, k, seed = corpus
    known = vector.any(axis=1)
    centroid = k_means(vector[known], experts, seed)
    table = clustered_table(vector, experts, k, seed)
    distance = ((vector[known][:, None] - centroid) ** 2).sum(-1)
    np.testing.assert_array_equal(table[known], np.argsort(distance, axis=1)[:, :k])
    assert is_even(members_per_expert(table, ~known, experts))


def test_clusters_that_are_there_are_found() -> None:
    vector = planted_vectors(300, clusters=6)
    cluster = clustered_table(vector, 6, 1, seed=0)[:, 0]
    assert [len(set(cluster[i::6])) for i in range(6)] == [1] * 6
    assert len(set(cluster[:6])) == 6
    for i in range(6):
        np.testing.assert_allclose(k_means(vector, 6, seed=0)[cluster[i]], vector[i::6].mean(axis=0))


def test_k_means_ends_where_every_centroid_is_the_mean_of_its_members() -> None:
    vector = np.random.default_rng(0).normal(size=(60, 2))
    for seed in range(5):
        centroid = k_means(vector, 4, seed)
        nearest = ((vector[:, None] - centroid) ** 2).sum(-1).argmin(axis=1)
        np.testing.assert_allclose(centroid, [vector[nearest == c].mean(axis=0) for c in range(4)])
    assert not np.array_equal(k_means(vector, 4, seed=0), k_means(vector, 4, seed=1))


@pytest.mark.parametrize("different", [0, 1, 3])
def test_too_few_different_vectors(different: int) -> None:
    vector = np.repeat(np.arange(different + 1.0), 5)[:, None] * [1, 2]
    with pytest.raises(ValueError, match=rf"moe.num_experts: 4 clusters, .* the {different} different vectors"):
        clustered_table(vector, 4, 1, seed=0)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora())
def test_dispersed_spreads_every_cluster_evenly(corpus: Any) -> None:
    count, vector, experts, k, seed = corpus
    cluster = clustered_table(vector, experts, 1, seed)[:, 0]
    cluster[~vector.any(axis=1)] = -1
    table = dispersed_table(vector, count, experts, k, seed)
    for c in range(-1, experts):
        assert is_even(members_per_expert(table, cluster == c, experts))
        assert is_even(members_per_expert(table, (cluster == c) & (count == 0), experts))
    assert is_even(members_per_expert(table, count >= 0, experts))


def test_dispersed_leaves_room_for_the_last_members() -> None:
    """Each of 3 experts must have 2 of the 3 members of a cluster, also an expert that a frequent id has made heavy."""
    vector, count = planted_vectors(12, clusters=4), np.array([10**6, *range(1, 12)])
    for seed in range(20):
        table = dispersed_table(vector[:, :3], count, 3, 2, seed)
        cluster = clustered_table(vector[:, :3], 3, 1, seed)[:, 0]
        assert all(is_even(members_per_expert(table, cluster == c, 3)) for c in range(3))


def test_dispersed_puts_similar_ids_on_different_experts() -> None:
    table = dispersed_table(planted_vectors(64, clusters=8), zipf(64), 8, 1, seed=0)
    assert [len(set(table[i::8, 0].tolist())) for i in range(8)] == [8] * 8


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (16, 4), (64, 6)])
def test_dispersed_is_nearly_as_balanced_as_even_numbers_of_ids_allow(experts: int, k: int) -> None:
    """An expert of the most frequent id has V K / E ids too: with the rarest of all, its load is the least there can be."""
    count, vector = zipf(4000), planted_vectors(4000, clusters=experts)
    least = count[0] + count[len(count) - (len(count) * k // experts - 1) :].sum()
    floor = max(least / (count.sum() * k / experts) - 1, 0)
    assert floor <= expected_max_vio(count, dispersed_table(vector, count, experts, k, seed=0), experts) <= floor + 0.05
    assert expected_max_vio(count, clustered_table(vector, experts, k, seed=0), experts) > floor + 0.1


# MultiHash and layers.


@every_kind
def test_multi_hash_has_one_expert_of_each_block(kind: str) -> None:
    count, vector = zipf(100), planted_vectors(100, clusters=4)
    made = []

    def make(experts: int, seed: int) -> Array:
        made.append((KINDS[kind](count, vector, experts, 1, seed), experts, seed))
        return made[-1][0]

    table = multi_hash(make, 12, 3, seed=5)
    np.testing.assert_array_equal(table, np.hstack([made[0][0], made[1][0] + 4, made[2][0] + 8]))
    assert (table // 4 == [0, 1, 2]).all()
    assert [experts for _, experts, _ in made] == [4, 4, 4]
    assert len({seed for _, _, seed in made}) == 3
    if kind == "balanced, shuffled":
        assert expected_max_vio(count, table, 12) <= unavoidable_max_vio(count, 12, 3) + 0.01


def test_multi_hash_needs_equal_blocks() -> None:
    with pytest.raises(ValueError, match=r"routing.hash.multi: true .* routing.top_k = 3 .* moe.num_experts = 8,"):
        multi_hash(lambda experts, seed: random_table(10, experts, 1, seed), 8, 3, seed=0)


def test_permutation_never_changes() -> None:
    names = np.arange(8)[:, None]
    assert permuted(names, 8, layer=0, seed=0)[:, 0].tolist() == [6, 4, 2, 5, 0, 1, 7, 3]
    assert permuted(names, 8, layer=1, seed=0)[:, 0].tolist() == [5, 0, 4, 2, 1, 7, 6, 3]


@pytest.mark.parametrize("blocks", [1, 3])
def test_layers_rename_the_experts_each_in_its_way(blocks: int) -> None:
    count = zipf(500)
    table = multi_hash(lambda experts, seed: random_table(500, experts, 1, seed), 12, 3, seed=0)
    loads, names = [], set()
    for layer in range(5):
        other = permuted(table, 12, layer, seed=0, num_blocks=blocks)
        name = dict(zip(table.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True))
        assert sorted(name) == sorted(name.values()) == list(range(12))
        assert np.vectorize(name.get)(table).tolist() == other.tolist()
        assert blocks == 1 or all(old // 4 == new // 4 for old, new in name.items())
        loads.append(sorted(np.bincount(other.reshape(-1), np.repeat(count, 3))))
        names.add(tuple(name[i] for i in range(12)))
    assert len(names) == 5
    assert all(load == loads[0] for load in loads)
    assert permuted(table, 12, 0, seed=1, num_blocks=blocks).tolist() != permuted(table, 12, 0, 0, blocks).tolist()


# Vectors from co-occurrence.


def dense_vectors(stream: list[int], vocab_size: int, dimensions: int) -> Array:
    """The same by plain loops and a full SVD, without the signs."""
    pairs = np.zeros((vocab_size, 2 * vocab_size))
    for left, right in pairwise(stream):
        pairs[right, left] += 1
        pairs[left, vocab_size + right] += 1
    joint = pairs / pairs.sum()
    row, column = joint.sum(1), joint.sum(0)
    for i, j in np.ndindex(joint.shape):
        joint[i, j] = max(np.log(joint[i, j] / (row[i] * column[j])), 0) if joint[i, j] else 0
    left, value, _ = np.linalg.svd(joint)
    vector = left[:, :dimensions] * value[:dimensions]
    length = np.linalg.norm(vector, axis=1)
    return np.array([v / n if n > 1e-9 else 0 * v for v, n in zip(vector, length, strict=True)])


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_vectors_against_a_full_svd(dtype: Any) -> None:
    stream = np.random.default_rng(0).zipf(1.5, size=3000)
    stream = stream[stream < 20]
    vector, expected = cooccurrence_vectors(stream.astype(dtype), 25, 6), dense_vectors(stream.tolist(), 25, 6)
    np.testing.assert_allclose(np.abs(vector), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(vector @ vector.T, expected @ expected.T, atol=1e-9)  # each column's sign is its own
    assert np.flatnonzero(~vector.any(axis=1)).tolist() == [0, *range(20, 25)]  # ids that are not in the stream
    np.testing.assert_array_equal(cooccurrence_vectors(stream, 25, 6), vector)


def test_more_dimensions_than_the_corpus_has() -> None:
    stream = np.array([1, 2, 3, 1, 2, 4, 3, 5, 1] * 20)
    vector = cooccurrence_vectors(stream, 257, 64)
    expected = dense_vectors(stream.tolist(), 257, 64)
    np.testing.assert_allclose(vector @ vector.T, expected @ expected.T, atol=1e-9)
    np.testing.assert_allclose(cooccurrence_vectors(stream, 257, 64), vector, atol=1e-9)
    assert np.count_nonzero(np.abs(vector).max(axis=0) > 0) <= 5


def test_ids_that_are_used_alike_are_clustered_together() -> None:
    """Text of word after word; a word is one of 4 first ids, one of 4 second ids, one of 4 third ids."""
    word = np.random.default_rng(0).integers([0, 4, 8], [4, 8, 12], size=(5000, 3))
    table = clustered_table(cooccurrence_vectors(word.reshape(-1), 13, 3), 3, 1, seed=0)[:, 0]
    assert [len(set(table[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(table[:12])) == 3


# Balance as a number.


def test_max_vio_by_hand() -> None:
    """Loads 8, 6, 2 and 0: mean 4. The first id alone would be 6 * 4 / 2 = 12 of 8 tokens."""
    count, table = np.array([6, 2, 0]), np.array([[0, 1], [2, 0], [3, 1]])
    assert expected_max_vio(count, table, 4) == pytest.approx(1.0)
    assert unavoidable_max_vio(count, 4, 2) == pytest.approx(0.5)
    assert unavoidable_max_vio(count, 4, 4) == 0


# Files.


def a_table(**changes: Any) -> dict[str, Any]:
    return {
        "table": np.array([[0, 2], [1, 0], [2, 1]]),
        "kind": np.array("balanced"),
        "seed": np.array(7),
        "num_experts": np.array(3),
        "counts": np.array([5, 0, 2]),
        **changes,
    }


def test_a_saved_table_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "table"  # exactly this name, without .npz
    saved = SavedTable(random_table(257, 8, 2, seed=3), "random", 3, 8, zipf(257))
    save_table(path, saved)
    loaded = load_table(str(path))
    assert (loaded.kind, loaded.seed, loaded.num_experts) == ("random", 3, 8)
    for name in ("table_VK", "count_V"):
        assert getattr(loaded, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))


def test_a_table_of_small_integers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    np.savez(path, **a_table(table=a_table()["table"].astype(np.uint8), counts=np.array([5, 0, 2], np.int32)))
    loaded = load_table(path)
    assert (loaded.table_VK.dtype, loaded.count_V.dtype) == (np.int64, np.int64)
    assert loaded.table_VK.tolist() == a_table()["table"].tolist()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"table": np.array([[0, 2], [1, 3], [2, 1]])}, r"id 1 has expert 3, but num_experts = 3: 0 to 2"),
        ({"table": np.array([[0, 2], [1, 0], [2, -1]])}, r"id 2 has expert -1, but num_experts = 3: 0 to 2"),
        ({"table": np.array([[0, 2], [1, 1], [2, 1]])}, r"id 1 has an expert twice: \[1, 1\]"),
        ({"table": np.array([0, 1, 2])}, r"its table is int64 \[3\]; it should be integers \[V, K\]"),
        ({"table": np.zeros((3, 1))}, r"its table is float64 \[3, 1\]; it should be integers \[V, K\]"),
        ({"table": np.zeros((3, 0), int)}, r"its table \[3, 0\] is empty"),
        ({"num_experts": np.array([3])}, r"its num_experts is int64 \[1\]; it should be an integer"),
        ({"seed": np.array(0.5)}, r"its seed is float64 \[\]; it should be an integer"),
        ({"kind": np.array(1)}, r"its kind is int64 \[\]; it should be text"),
        ({"counts": np.array([5, 0])}, r"its counts should be 3 numbers of at least 0"),
        ({"counts": np.array([5, 0, -1])}, r"its counts should be 3 numbers of at least 0"),
        ({"counts": np.array([{}, 0, 1])}, r"Object arrays cannot be loaded"),
    ],
)
def test_a_wrong_table_is_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    np.savez(path, **a_table(**changes))
    with pytest.raises(ValueError, match=rf"^routing.hash.file: '.*table.npz' holds no valid table: {what}"):
        load_table(path)


@pytest.mark.parametrize("name", ["missing.npz", "text.npz", "."])
def test_a_file_that_is_no_table(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(
        ValueError, match=r"^routing.hash.file: '.*' holds no valid table: there is no .npz file of this"
    ):
        load_table(tmp_path / name)


def test_a_file_without_all_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", table=a_table()["table"])
    with pytest.raises(
        ValueError, match=r"^routing.hash.file: '.*other.npz' holds no valid table: .*kind is not a file"
    ):
        load_table(tmp_path / "other.npz")


def error_of(path: Path) -> str:
    try:
        load_table(path)
    except ValueError as error:
        return str(error)
    return ""


def test_damaged_files(tmp_path: Path) -> None:
    """Whatever numpy and zipfile make of it, a ValueError tells which file; some bytes have no meaning."""
    path, generator = tmp_path / "table.npz", np.random.default_rng(0)
    np.savez_compressed(path, **a_table())
    content, messages = path.read_bytes(), []
    for place, change in zip(
        generator.integers(len(content), size=100), generator.integers(1, 256, size=100), strict=True
    ):
        path.write_bytes(content[:place] + bytes([content[place] ^ change]) + content[place + 1 :])
        messages.append(error_of(path))
    assert all(message.startswith(f"routing.hash.file: '{path}'") for message in messages if message)
    assert sum(map(bool, messages)) > 50
    path.write_bytes(content[: len(content) // 2])
    assert error_of(path).startswith("routing.hash.file: ")
