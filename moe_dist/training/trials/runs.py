"""Training the runs of a comparison one after the other, each by `moe-dist train` in a process group of its own.

A run's folder tells how it stands, so that the same command goes on where it was killed: summary.json says that it is finished,
failure.txt why it failed, and a checkpoint is gone on from. log.txt has what it printed last.
"""

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moe_dist.training.signals import StopRequest
from moe_dist.training.trials.plan import Run

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def summary(run: Run) -> dict[str, Any] | None:
    """summary.json of a finished run; None if it is not finished, or was killed while it wrote that."""
    try:
        found = json.loads((run.folder / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return found if found["finished"] else None


def failure(run: Run) -> str | None:
    """What the run said when it last failed; None if it has not been tried, was stopped, or is finished."""
    path = run.folder / "failure.txt"
    return path.read_text() if path.exists() and summary(run) is None else None


def last_step(run: Run) -> int:
    """The last step in metrics.jsonl, found in its last megabyte; 0 if there is none."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        return max(map(int, re.findall(rb'"step": (\d+)', file.read())), default=0)


def arguments(run: Run, num_ranks: int | None) -> list[str]:
    """Of `moe-dist`, to train the run or to go on with it."""
    ranks = [] if num_ranks is None else ["--ranks", str(num_ranks)]
    return ["train", str(run.folder / "config.yaml"), *ranks, "--output", str(run.folder), "--resume"]


@contextmanager
def locked(output: Path, tell_waiting: Callable[[], None]) -> Iterator[int]:
    """Keep a folder for this process and the children that it gives the lock to; waits for others, and says so.

    A command that was killed leaves the lock to the run that it had started, until that has saved and ended.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # storage without locks: as safe as the user is careful
        yield file.fileno()


def train(run: Run, num_ranks: int | None, lock: int, stop: StopRequest, show: Callable[[int], None]) -> None:
    """Train a run to its end, to its failure, or until `stop` is requested. `show` gets the last step now and then."""
    (run.folder / "failure.txt").unlink(missing_ok=True)
    command = [sys.executable, "-m", "moe_dist", *arguments(run, num_ranks)]
    with (run.folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, through this process
            pass_fds=[lock],
            preexec_fn=partial(_stop_with_parent, os.getpid()) if _libc else None,
        )
    asked = False
    while True:
        if stop.number and not asked:
            process.terminate()  # it saves and ends
            asked = True
        try:
            code = process.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            show(last_step(run))
    stopped = code in (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
    if code and not stopped:
        (run.folder / "failure.txt").write_text(_message(run, code))


def _stop_with_parent(parent: int) -> None:
    """In the child: ask Linux for SIGTERM, on which a run saves and ends, when the parent is killed."""
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # killed already
        os.kill(os.getpid(), signal.SIGTERM)


def _message(run: Run, code: int) -> str:
    """What a failed run said after `moe-dist: error:`, or how it ended."""
    _, found, said = (run.folder / "log.txt").read_text(errors="replace").rpartition("moe-dist: error:")
    if found:
        return said.strip()
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no message"
