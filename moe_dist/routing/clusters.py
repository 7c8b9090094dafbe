"""Hash tables by similarity of the ids, and the vectors that tell it (hash layers, arXiv 2106.04426).

k-means and the SVD round as the machine does: a table made here is to be made once and sent around, or saved.

Shape letters: V vocabulary, E experts, K experts per token, N tokens of a corpus, D dimensions of an id's vector,
C clusters of ids, G groups of ids.
"""

import warnings

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array, hstack
from scipy.sparse.linalg import svds
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from moe_dist.routing.tables import Floats, Integers, by_falling_count, in_turn, uniform

K_MEANS_ITERATIONS = 20


def clustered_table(vector_VD: Floats, num_experts: int, top_k: int, seed: int) -> Integers:
    """k-means of the ids' vectors into E clusters, cluster i to expert i; an id has its K nearest; int64 [V, K].

    The clustered hash of arXiv 2106.04426, where K = 1. It is not balanced, and an expert whose cluster
    k-means empties has no ids. Ids with the zero vector, of which nothing is known, are spread evenly.

    Raises:
        ValueError: there are fewer different vectors than experts.
    """
    known_V = vector_VD.any(axis=1)
    centroid_ED = k_means(vector_VD[known_V], num_experts, seed)
    table_VK = np.empty((len(vector_VD), top_k), dtype=np.int64)
    _, table_VK[known_V] = KDTree(centroid_ED).query(vector_VD[known_V], k=range(1, top_k + 1))
    table_VK[~known_V] = in_turn(int((~known_V).sum()), num_experts, top_k)
    return table_VK


def dispersed_table(vector_VD: Floats, count_V: Integers, num_experts: int, top_k: int, seed: int) -> Integers:
    """The clusters of clustered_table, the members of each spread evenly over all experts; int64 [V, K].

    The dispersed hash of arXiv 2106.04426: similar ids have different experts. Any two experts have equally
    many members of a cluster, or one more; where this leaves a choice, the experts of least load are taken.

    Args:
        count_V: how often the corpus has each id.

    Raises:
        ValueError: there are fewer different vectors than experts.
    """
    cluster_V = clustered_table(vector_VD, num_experts, 1, seed)[:, 0]
    cluster_V[~vector_VD.any(axis=1)] = num_experts  # one more cluster, of the ids with the zero vector
    group_V = 2 * cluster_V + (count_V == 0)
    left_G = np.bincount(group_V, minlength=2 * num_experts + 2)
    # Members that each expert is still to have of each group. The places of all groups, one group after the other, go to
    # the experts in turn: of the first n places, expert e has ceil((n - e) / E).
    end_G = np.append(0, np.cumsum(left_G * top_k))
    room_GE = np.diff(-((np.arange(num_experts) - end_G[:, None]) // num_experts), axis=0)
    load_E = np.zeros(num_experts, dtype=np.int64)
    table_VK = np.empty((len(count_V), top_k), dtype=np.int64)
    for token_id in np.concatenate(by_falling_count(count_V, seed)):
        group = group_V[token_id]
        room_E = room_GE[group]
        # First those that need all members still to come, then by load; the full ones never.
        expert_K = np.lexsort((load_E, room_E < left_G[group], room_E == 0))[:top_k]
        table_VK[token_id] = expert_K
        room_E[expert_K] -= 1
        left_G[group] -= 1
        load_E[expert_K] += count_V[token_id]
    return table_VK


def cooccurrence_vectors(stream_N: npt.NDArray[np.integer], vocab_size: int, dimensions: int) -> Floats:
    """Vectors of ids from a corpus alone: ids that have the same neighbours point the same way; float64 [V, D].

    Positive pointwise mutual information (PPMI) of an id with its left and its right neighbour; of this matrix the first
    D left singular vectors, times their singular values (Levy, Goldberg and Dagan, TACL 2015, section 2). Each row is then
    scaled to length 1, as its length mostly tells how rare the id is. Ids that the corpus lacks have the zero vector.

    Args:
        stream_N: the corpus: ids from 0 to V - 1.
        dimensions: D, less than V.
    """
    ones_N = np.ones(len(stream_N) - 1)
    follows_VV = csr_array((ones_N, (stream_N[:-1], stream_N[1:])), shape=(vocab_size, vocab_size))
    pairs = hstack([follows_VV.T, follows_VV], format="csr")
    row_sum, column_sum = pairs.sum(axis=1), pairs.sum(axis=0)
    by_chance = row_sum.repeat(np.diff(pairs.indptr)) * column_sum[pairs.indices] / row_sum.sum()
    pairs.data = np.maximum(np.log(pairs.data / by_chance), 0)
    start_V = uniform(vocab_size, "co-occurrence") - 0.5
    left_VD, value_D, _ = svds(pairs, k=dimensions, v0=start_V, return_singular_vectors="u")
    value_D[value_D < 1e-6 * value_D.max()] = 0  # what rounding leaves where D is more than the rank
    # Singular vectors come in rising order, and with any sign.
    largest_D = left_VD[np.abs(left_VD).argmax(axis=0), np.arange(dimensions)]
    vector_VD = (left_VD * np.sign(largest_D) * value_D)[:, ::-1]
    vector_VD[row_sum == 0] = 0
    return vector_VD / np.maximum(np.linalg.norm(vector_VD, axis=1, keepdims=True), 1e-12)


def k_means(vector_VD: Floats, num_clusters: int, seed: int) -> Floats:
    """Centroids [C, D] of Lloyd's algorithm from a start by k-means++ (Arthur and Vassilvitskii, SODA 2007).

    Raises:
        ValueError: there are fewer different vectors than clusters.
    """
    # scipy's own k-means++ takes time by the square of C.
    start_C: list[int] = []
    weight_V = np.ones(len(vector_VD))
    for random in uniform(num_clusters, "k-means", seed):
        if not weight_V.any():
            raise ValueError(
                f"moe.num_experts: {num_clusters} clusters, one an expert, cannot be made of the {len(start_C)} different "
                "vectors that the ids have; use fewer experts, or a table without clusters"
            )
        sum_V = np.cumsum(weight_V)
        start_C.append(int(np.searchsorted(sum_V, random * sum_V[-1])))
        distance_V = cdist(vector_VD, vector_VD[start_C[-1:]], "sqeuclidean")[:, 0]
        weight_V = np.minimum(weight_V, distance_V) if len(start_C) > 1 else distance_V
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cluster that is emptied: it keeps its centroid
        centroid_CD, _ = kmeans2(vector_VD, vector_VD[start_C], iter=K_MEANS_ITERATIONS, minit="matrix")
    return centroid_CD
