"""Text as bytes, packed into sequences: what each rank reads at each step, and for evaluation.

Documents become one stream of tokens: bytes 0 to 255, and token 256 after each document. Sequence j is
stream[j*S : j*S + S + 1], its inputs all but the last token and its targets all but the first. A boundary is a token
like any other: it is predicted at the end of a document, and the first byte of the next document is predicted from it.

Batches are pure functions of the config, the step and the rank; nothing is remembered between calls, so the data
position of a run is its step number and nothing else.

Shapes: B sequences of a micro-batch, S sequence length, N tokens of a stream.
"""

from functools import lru_cache
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_dist.config import Config, Layout
from moe_dist.config.schema import BYTE_VOCABULARY
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.training.documents import check_sizes, num_sequences, read_documents

BOUNDARY = BYTE_VOCABULARY - 1
"""The token after each document."""


class Data(Protocol):
    """What the training loop asks of its data; each method gives the same whenever and wherever it is called."""

    vocab_size: int
    """Tokens are 0 to vocab_size - 1."""

    def training_stream(self) -> npt.NDArray[np.integer[Any]]:
        """All tokens to train on, in one row, before they are cut into sequences."""

    def micro_batches(self, step: int, data_rank: int, layout: Layout) -> list[Batch]:
        """The rank's share of the global batch of a step, one Batch for each accumulation step.

        The share is contiguous: of G sequences and D data ranks, rank r has those from r*G/D to (r+1)*G/D.
        """

    def evaluation_batches(self, data_rank: int, layout: Layout, num_tokens: int) -> list[Batch]:
        """The rank's share of the first `num_tokens` held-out tokens, rounded down to whole sequences.

        All ranks have equally many batches, all of micro_batch_size sequences; those that are missing at the end are
        padding. The layout decides who has a sequence, never which sequences there are.
        """

    def evaluation_bytes(self, num_tokens: int) -> int:
        """Bytes among the targets of these batches, over all ranks: bits per byte = summed nats / ln 2 / bytes."""


class TextData:
    """The Data of `data.source` stdlib and files. Every process reads all files once, on construction.

    Raises:
        ConfigError: a file cannot be read, or there is too little text to train on or (if it is on) to evaluate.
    """

    def __init__(self, config: Config) -> None:
        self.vocab_size = BYTE_VOCABULARY
        self._config = config
        train, held_out = read_documents(config.data)
        self._train_N, self._held_out_N = pack(train), pack(held_out)
        self._num_train = num_sequences(config, len(self._train_N))
        self._num_held_out = num_sequences(config, len(self._held_out_N))
        self.digest = sha256(self._train_N.tobytes() + self._held_out_N.tobytes()).hexdigest()
        """Of all tokens: equal on ranks that read the same text."""
        check_sizes(config, len(self._train_N), len(self._held_out_N))

    def training_stream(self) -> npt.NDArray[np.uint16]:
        """See Data."""
        return self._train_N

    def micro_batches(self, step: int, data_rank: int, layout: Layout) -> list[Batch]:
        """See Data."""
        training = self._config.training
        share = training.global_batch_size // layout.data
        sequences = np.arange(data_rank * share, (data_rank + 1) * share)
        return [
            self._training_batch(step * training.global_batch_size, sequence_B)
            for sequence_B in np.split(sequences, layout.accumulation_steps)
        ]

    def evaluation_batches(self, data_rank: int, layout: Layout, num_tokens: int) -> list[Batch]:
        """See Data."""
        count, size = self._evaluation_sequences(num_tokens), layout.micro_batch_size
        # The ranks' batches lie side by side in the set, so that each starts at a multiple of micro_batch_size and
        # routing groups hold the same sequences in every layout.
        stride = size * layout.data
        rounds = -(-count // stride)
        starts = range(data_rank * size, rounds * stride, stride)
        return [self._evaluation_batch(np.arange(start, start + size), count) for start in starts]

    def evaluation_bytes(self, num_tokens: int) -> int:
        """See Data."""
        end = self._evaluation_sequences(num_tokens) * self._config.training.sequence_length
        return int(np.count_nonzero(self._held_out_N[1 : end + 1] != BOUNDARY))

    def _evaluation_sequences(self, num_tokens: int) -> int:
        return min(num_tokens // self._config.training.sequence_length, self._num_held_out)

    def _training_batch(self, first_position: int, sequence_B: npt.NDArray[np.int64]) -> Batch:
        place_B = shuffled(self._config.training.seed, first_position + sequence_B, self._num_train)
        input_BS, target_BS = self._tokens(self._train_N, place_B)
        return Batch(input_BS, target_BS, None, self._documents(input_BS), torch.from_numpy(sequence_B))

    def _evaluation_batch(self, sequence_B: npt.NDArray[np.int64], count: int) -> Batch:
        input_BS, target_BS = self._tokens(self._held_out_N, np.minimum(sequence_B, count - 1))
        missing_B = torch.from_numpy(sequence_B >= count)
        input_BS[missing_B], target_BS[missing_B] = BOUNDARY, IGNORED
        padding_BS = missing_B[:, None].repeat(1, input_BS.shape[1])
        return Batch(input_BS, target_BS, padding_BS, self._documents(input_BS), torch.from_numpy(sequence_B))

    def _tokens(self, stream_N: npt.NDArray[np.uint16], place_B: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, S], of these sequences of a stream."""
        length = self._config.training.sequence_length
        input_BS = place_B[:, None] * length + np.arange(length)
        tokens = (stream_N[input_BS], stream_N[input_BS + 1])
        return torch.from_numpy(tokens[0].astype(np.int64)), torch.from_numpy(tokens[1].astype(np.int64))

    def _documents(self, input_BS: Tensor) -> Tensor | None:
        """A boundary counts to the document it opens, so that no byte is predicted from an earlier document."""
        return (input_BS == BOUNDARY).cumsum(dim=1) if self._config.data.separate_documents else None


def pack(documents: list[bytes]) -> npt.NDArray[np.uint16]:
    """One stream [N] of the documents, token 256 after each."""
    stream_N = np.full(sum(map(len, documents)) + len(documents), BOUNDARY, dtype=np.uint16)
    start = 0
    for document in documents:
        stream_N[start : start + len(document)] = np.frombuffer(document, dtype=np.uint8)
        start += len(document) + 1
    return stream_N


def shuffled(seed: int, position_B: npt.NDArray[np.int64], num_sequences: int) -> npt.NDArray[np.int64]:
    """The sequences, int64 [B], at these positions of an endless order in which each epoch is a new permutation."""
    epoch_B, offset_B = np.divmod(position_B, num_sequences)
    places = [_permutation(seed, int(epoch), num_sequences)[i] for epoch, i in zip(epoch_B, offset_B, strict=True)]
    return np.array(places, dtype=np.int64)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    # numpy promises that these raw numbers never change between its versions, but not so for Generator.permutation.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(size), kind="stable")
