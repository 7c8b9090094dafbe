"""Finding, reading and holding out documents: the Python standard library's source files, or the user's text files.

A file is known by its name: its path relative to the folder that `data.paths` names (for a file named itself, its last
part), with slashes. Order and hold-out depend on these names and on nothing else: not on the file system, the seed, the
place of the folder, or the other files.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator

from moe_dist.config import Config, ConfigError
from moe_dist.config.schema import DataConfig

# Installed packages are not the library. Its tests are larger than the rest together and say the same many times over;
# about 12 MB remain without them (Python 3.11).
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# Written when Python is built, so they differ between two machines with the same Python.
BUILD_RECORDS = ("_sysconfigdata", "config-")


def read_documents(data: DataConfig) -> tuple[list[bytes], list[bytes]]:
    """The training documents and the held-out ones, each in order of the hash of the name; empty files are left out.

    The standard library's text is that of the running Python, so it differs between Python versions.

    Raises:
        ConfigError: a file or folder cannot be read, or a folder holds no file of the wanted suffixes.
    """
    train: list[bytes] = []
    held_out: list[bytes] = []
    try:
        names = _stdlib_files() if data.source == "stdlib" else _user_files(data)
        hashes = {path: name_hash(name) for path, name in names.items()}
        for path in sorted(hashes, key=lambda path: hashes[path]):
            if document := _read(path):
                (held_out if hashes[path] < data.holdout_fraction else train).append(document)
    except OSError as error:
        key = "data.source: stdlib" if data.source == "stdlib" else "data.paths"
        raise ConfigError(f"{key}: cannot read {error.filename!r} ({error.strerror}); it must be readable") from None
    return train, held_out


def check_documents(config: Config) -> None:
    """Whether there is text enough, before any process starts. Raises ConfigError as read_documents and check_sizes do."""
    check_sizes(config, *(sum(map(len, documents)) + len(documents) for documents in read_documents(config.data)))


def num_sequences(config: Config, num_tokens: int) -> int:
    """Whole sequences in a stream of tokens; the last target needs one token more than the inputs."""
    return max(num_tokens - 1, 0) // config.training.sequence_length


def check_sizes(config: Config, num_train: int, num_held_out: int) -> None:
    """Raise ConfigError if there is not one sequence to train on, or to evaluate where that is asked for."""
    data, training = config.data, config.training
    needed = f"one sequence needs training.sequence_length + 1 = {training.sequence_length + 1}"
    more = "add files to data.paths" if data.source == "files" else "use data.source: files"
    value = f"data.paths: {data.paths}" if data.source == "files" else f"data.source: {data.source}"
    if not num_sequences(config, num_train):
        less = "lower data.holdout_fraction" if num_held_out else "shorten training.sequence_length"
        raise ConfigError(f"{value} gives {num_train} tokens to train on, and {needed}; {more}, or {less}")
    if not training.evaluation.interval:
        return
    if not num_sequences(config, num_held_out):
        raise ConfigError(
            f"data.holdout_fraction: {data.holdout_fraction} of the files gives {num_held_out} tokens for "
            f"evaluation, and {needed}; raise it, {more}, or set training.evaluation.interval: null"
        )


def name_hash(name: str) -> float:
    """A number from 0 to 1 that stands for a name: sha256 / 2^256."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") / 2**256


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _stdlib_files() -> dict[str, str]:
    """Path -> name of the standard library's source files."""
    root = sysconfig.get_path("stdlib")
    files = {path: name for path, name in _walk(root, (".py",), NOT_LIBRARY) if not name.startswith(BUILD_RECORDS)}
    if not files:
        raise ConfigError(f"data.source: stdlib finds no source file in {root!r}; use data.source: files")
    return files


def _user_files(data: DataConfig) -> dict[str, str]:
    """Path -> name of the files in `data.paths`; a file that is reached twice counts once, by its first name.

    Otherwise one text, under two names, could be both trained on and held out.
    """
    found: dict[str, tuple[str, str]] = {}
    for given in data.paths:
        is_folder = os.path.isdir(given)
        files = list(_walk(given, tuple(data.suffixes), set())) if is_folder else [(given, os.path.basename(given))]
        if not files:
            suffixes = ", ".join(data.suffixes)
            raise ConfigError(f"data.paths: no file in {given!r} ends in data.suffixes = [{suffixes}]; change either")
        for path, name in files:
            found.setdefault(os.path.realpath(path), (path, name))
    return dict(found.values())


def _walk(root: str, suffixes: tuple[str, ...], left_out: set[str]) -> Iterator[tuple[str, str]]:
    """(path, name) of the files below a folder, sorted by folder and file; linked folders inside it are not entered."""
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = sorted(set(subfolders) - left_out)
        for file in sorted(files):
            if file.endswith(suffixes):
                path = os.path.join(folder, file)
                yield path, os.path.relpath(path, root).replace(os.sep, "/")


def _raise(error: OSError) -> None:
    raise error
