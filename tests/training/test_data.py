"""Documents, packing and batches. Shapes: B sequences of a micro-batch, S sequence length, N tokens of a stream."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.config import Config, ConfigError, Layout, layout_of
from moe_dist.training.data import BOUNDARY, IGNORED, Batch, Data, TextData, pack, shuffled
from moe_dist.training.documents import check_documents, name_hash, read_documents

LENGTH, GLOBAL_BATCH = 16, 12


def make_config(paths: list[Path], training: dict | None = None, **data) -> Config:
    """A config for these files, with sequences of LENGTH tokens and a quarter of the files held out."""
    data = {"source": "files", "paths": [str(path) for path in paths], "holdout_fraction": 0.25} | data
    sizes = {"sequence_length": LENGTH, "global_batch_size": GLOBAL_BATCH, "evaluation": {"interval": 1}}
    return Config.model_validate({"data": data, "training": sizes | (training or {})})


def layout(num_ranks: int, micro_batch_size: int) -> Layout:
    training = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro_batch_size}
    return layout_of(Config.model_validate({"training": training}), num_ranks)


def write_files(folder: Path, count: int, size: int = 60) -> None:
    """Files of other sizes and other bytes, some of them in a folder inside."""
    generator = np.random.default_rng(count)
    for i in range(count):
        path = folder / ("inside" if i % 3 == 0 else ".") / f"file_{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.bytes(size + i))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "text", 40)
    return tmp_path / "text"


@pytest.fixture
def text(folder: Path) -> TextData:
    return TextData(make_config([folder]))


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and sequence numbers of batches, one after the other."""
    return tuple(
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_BS", "target_BS", "sequence_B")
    )


def all_ranks(text: Data, layout: Layout, step: int) -> list[Batch]:
    return [batch for rank in range(layout.data) for batch in text.micro_batches(step, rank, layout)]


def decode(stream_N: np.ndarray) -> list[bytes]:
    ends = np.flatnonzero(stream_N == BOUNDARY)
    assert ends[-1] == len(stream_N) - 1
    return [part[part != BOUNDARY].astype(np.uint8).tobytes() for part in np.split(stream_N, ends[:-1] + 1)]


# Documents


def test_documents_are_the_files_in_hash_order_whatever_the_folder_is_called(folder: Path, tmp_path: Path) -> None:
    names = sorted((p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")), key=name_hash)
    contents = [(folder / name).read_bytes() for name in names]
    train, held_out = read_documents(make_config([folder]).data)
    assert held_out + train == contents  # the held-out files are those of the lowest hashes
    assert 0 < len(held_out) < len(train)
    folder.rename(tmp_path / "moved")
    assert read_documents(make_config([tmp_path / "moved"]).data) == (train, held_out)


def test_name_hash_is_sha256_of_the_name() -> None:
    assert name_hash("abc") == int("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 16) / 2**256


def test_holdout_does_not_change_when_files_are_added(folder: Path) -> None:
    train, held_out = read_documents(make_config([folder]).data)
    (folder / "new").mkdir()
    for i in range(30):
        (folder / "new" / f"{i}.txt").write_text(f"new {i}")
    more_train, more_held_out = read_documents(make_config([folder]).data)
    assert [document for document in more_held_out if not document.startswith(b"new")] == held_out
    assert [document for document in more_train if not document.startswith(b"new")] == train
    assert len(more_held_out) > len(held_out)


def test_suffixes_choose_in_folders_and_named_files_are_always_taken(tmp_path: Path) -> None:
    for name in ("text/a.txt", "text/b.log", "text/empty.txt", "named.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    paths = [tmp_path / "text", tmp_path / "named.bin"]
    train, held_out = read_documents(make_config(paths, holdout_fraction=0).data)
    assert sorted(train) == [b"named.bin", b"text/a.txt"]
    assert held_out == []


def test_a_file_reached_twice_counts_once(folder: Path) -> None:
    (folder / "link.txt").symlink_to(folder / "file_1.txt")
    config = make_config([folder, folder / "inside", folder / "inside" / "file_0.txt"], holdout_fraction=0)
    documents, _ = read_documents(config.data)
    assert len(documents) == len(set(documents)) == 40


def test_unreadable_file_is_named(folder: Path) -> None:
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.paths: cannot read '.*gone\.txt' \(No such file"):
        TextData(make_config([folder]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_named(folder: Path) -> None:
    (folder / "inside").chmod(0)
    with pytest.raises(ConfigError, match=r"data\.paths: cannot read '.*inside' \(Permission denied"):
        TextData(make_config([folder]))


def test_folder_without_such_files_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.paths: no file in '.*text' ends in data\.suffixes = \[\.md\]"):
        TextData(make_config([folder], suffixes=[".md"]))


def test_the_standard_library_is_enough_text() -> None:
    train, held_out = read_documents(Config().data)
    size, held_out_size = sum(map(len, train)), sum(map(len, held_out))
    assert size > 8e6
    assert 0.01 < held_out_size / (size + held_out_size) < 0.15
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = {*train, *held_out}
    assert (stdlib / "asyncio" / "tasks.py").read_bytes() in documents
    assert Path(np.__file__).read_bytes() not in documents
    assert not any(path.read_bytes() in documents for path in stdlib.glob("_sysconfigdata*.py"))


# Packing


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=9))
def test_stream_decodes_to_the_documents(documents: list[bytes]) -> None:
    stream_N = pack(documents)
    assert stream_N.dtype == np.uint16
    assert decode(stream_N) == documents


def test_sequences_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abcde")
    (tmp_path / "b.txt").write_bytes(b"fgh")
    training = {"sequence_length": 4, "global_batch_size": 2, "evaluation": {}}
    config = make_config([tmp_path], training, holdout_fraction=0, separate_documents=True)
    # The stream is a b c d e | f g h |, so sequence 0 is a b c d (e) and sequence 1 is e | f g (h).
    (batch,) = TextData(config).micro_batches(0, 0, layout_of(config))
    order_B = batch.input_BS[:, 0].argsort()
    assert batch.input_BS[order_B].tolist() == [list(b"abcd"), [ord("e"), BOUNDARY, *b"fg"]]
    assert batch.target_BS[order_B].tolist() == [list(b"bcde"), [BOUNDARY, *b"fgh"]]
    assert batch.document_BS[order_B].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert batch.padding_BS is None
    assert batch.sequence_B.tolist() == [0, 1]
    assert {batch.input_BS.dtype, batch.target_BS.dtype, batch.document_BS.dtype, batch.sequence_B.dtype} == {
        torch.int64
    }


# Order of training


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40))
def test_each_epoch_covers_every_sequence_once(num_sequences: int, global_batch_size: int, seed: int) -> None:
    steps = -(-3 * num_sequences // global_batch_size)
    positions = np.arange(steps * global_batch_size).reshape(steps, global_batch_size)
    places = np.concatenate([shuffled(seed, position_B, num_sequences) for position_B in positions])
    for epoch in range(3):
        in_epoch = places[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(in_epoch) == list(range(num_sequences))


def test_order_differs_between_epochs_and_seeds_and_never_changes() -> None:
    orders = [shuffled(seed, np.arange(100) + epoch * 100, 100).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # A resumed run must find the order it left, under any version of numpy.
    assert orders[0][:8] == [11, 92, 3, 20, 13, 2, 59, 53]


def test_an_epoch_of_batches_covers_the_training_text(text: TextData, folder: Path) -> None:
    train, _ = read_documents(make_config([folder]).data)
    stream_N = pack(train)
    count = (len(stream_N) - 1) // LENGTH
    one_rank = layout(1, 4)
    steps = range(-(-count // GLOBAL_BATCH))
    input_BS, target_BS, _ = joined([batch for step in steps for batch in all_ranks(text, one_rank, step)])
    expected = sorted(stream_N[j * LENGTH : j * LENGTH + LENGTH + 1].tolist() for j in range(count))
    assert sorted(torch.cat([input_BS, target_BS[:, -1:]], dim=1)[:count].tolist()) == expected
    assert torch.equal(input_BS[:, 1:], target_BS[:, :-1])


@pytest.mark.parametrize(("num_ranks", "micro_batch_size"), [(1, 1), (1, 4), (2, 6), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_the_global_batch_does_not_depend_on_the_layout(text: TextData, num_ranks: int, micro_batch_size: int) -> None:
    split = layout(num_ranks, micro_batch_size)
    for step in (0, 7):
        (whole,) = text.micro_batches(step, 0, layout(1, GLOBAL_BATCH))
        batches = all_ranks(text, split, step)
        assert len(batches) == num_ranks * split.accumulation_steps
        assert all(batch.input_BS.shape == (micro_batch_size, LENGTH) for batch in batches)
        for part, of_whole in zip(joined(batches), joined([whole]), strict=True):
            assert torch.equal(part, of_whole)
        assert whole.sequence_B.tolist() == list(range(GLOBAL_BATCH))


def test_batches_do_not_depend_on_earlier_calls(folder: Path, text: TextData) -> None:
    two_ranks = layout(2, 3)
    forward = [text.micro_batches(step, rank, two_ranks) for step in range(30) for rank in (0, 1)]
    other = TextData(make_config([folder]))
    other.evaluation_batches(0, two_ranks, 100)
    backward = [other.micro_batches(step, rank, two_ranks) for step in reversed(range(30)) for rank in (1, 0)]
    for batches, again in zip(forward, reversed(backward), strict=True):
        assert torch.equal(joined(batches)[0], joined(again)[0])


# Evaluation


@pytest.mark.parametrize("num_tokens", [LENGTH, 5 * LENGTH, 13 * LENGTH + 3, 10**6])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_evaluation_set_is_the_same_on_any_number_of_ranks(
    text: TextData, folder: Path, num_ranks: int, num_tokens: int
) -> None:
    split = layout(num_ranks, 3)
    by_rank = [text.evaluation_batches(rank, split, num_tokens) for rank in range(num_ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    assert all(batch.input_BS.shape == (3, LENGTH) for batches in by_rank for batch in batches)

    batches = [batch for batches in by_rank for batch in batches]
    real_B = ~torch.cat([batch.padding_BS for batch in batches]).any(dim=1)
    input_BS, target_BS, sequence_B = joined(batches)
    assert torch.equal(~real_B[:, None].expand_as(target_BS), torch.cat([batch.padding_BS for batch in batches]))
    assert (target_BS[~real_B] == IGNORED).all()
    assert len(real_B) - real_B.sum() < 3 * num_ranks  # no more padding than one round has

    stream_N = pack(read_documents(make_config([folder]).data)[1]).astype(np.int64)
    count = min(num_tokens, len(stream_N) - 1) // LENGTH
    order_B = sequence_B[real_B].argsort()
    assert sequence_B[real_B][order_B].tolist() == list(range(count))
    assert input_BS[real_B][order_B].flatten().tolist() == stream_N[: count * LENGTH].tolist()
    assert target_BS[real_B][order_B].flatten().tolist() == stream_N[1 : count * LENGTH + 1].tolist()
    assert text.evaluation_bytes(num_tokens) == ((target_BS != IGNORED) & (target_BS != BOUNDARY)).sum()


def test_evaluation_keeps_documents_apart(folder: Path) -> None:
    text = TextData(make_config([folder], separate_documents=True))
    for batch in text.evaluation_batches(0, layout(1, 4), 10**6):
        starts_BS = batch.document_BS.diff(dim=1)
        assert torch.equal(starts_BS == 1, batch.input_BS[:, 1:] == BOUNDARY)
        assert ((starts_BS == 0) | (starts_BS == 1)).all()


# Too little data


def test_too_little_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"x" * (LENGTH - 1))
    with pytest.raises(ConfigError, match=r"data\.paths: .* gives 16 tokens to train on, and .* = 17; add files"):
        TextData(make_config([tmp_path], {"evaluation": {}}, holdout_fraction=0))
    (tmp_path / "one.txt").write_bytes(b"x" * LENGTH)
    TextData(make_config([tmp_path], {"evaluation": {}}, holdout_fraction=0))


def test_too_little_held_out_matters_only_with_evaluation(folder: Path) -> None:
    TextData(make_config([folder], {"evaluation": {}}, holdout_fraction=1e-9))
    with pytest.raises(ConfigError, match=r"data\.holdout_fraction: 1e-09 of the files gives 0 tokens .* raise it"):
        TextData(make_config([folder], holdout_fraction=1e-9))


def test_the_command_sees_too_little_text_before_anything_starts(folder: Path) -> None:
    check_documents(make_config([folder]))
    with pytest.raises(ConfigError, match=r"data\.paths.* tokens to train on, and one sequence needs"):
        check_documents(make_config([folder], {"sequence_length": 10**6}))
