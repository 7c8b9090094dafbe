"""Starting the ranks of this machine, and telling of a rank that fails."""

import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe_dist.config import ConfigError
from moe_dist.parallel.environment import Environment
from moe_dist.training.loop import TrainingError


def launch(num_ranks: int, arguments: list[str]) -> int:
    """Start the ranks by torch's elastic agent; if one fails, all end and its message is told."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id="moe_dist",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        shutdown_timeout=600,  # seconds to finish a step and save it after Ctrl-C
    )
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # told below, in one message
    try:
        elastic_launch(settings, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _tell_failure(error)
    except SignalException as stopped:  # the ranks got the signal too, and have saved
        return 128 + stopped.sigval
    return 0


def _tell_failure(error: ChildFailedError) -> int:
    rank, failure = first_failure(error.failures)
    silent = failure.message if failure.exitcode < 0 else f"ended with exit code {failure.exitcode} and no message"
    print(f"moe-dist: error: rank {rank}: {_told(failure).get('text', silent)}", file=sys.stderr)
    return 1


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and its failure; the others follow from it.

    A rank that was killed left no message, and ranks that wait for its answer then fail with one: the killed rank comes
    first. But the agent kills too, after the first failure: by SIGTERM, and half a minute later by SIGKILL.
    """
    first_message = min((_told(failure).get("time", math.inf) for failure in failures.values()), default=math.inf)

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, float]:
        _, failure = item
        killed = failure.exitcode < 0
        by_agent = failure.exitcode == -signal.SIGTERM or (killed and failure.timestamp > first_message + 5)
        return by_agent, not killed, _told(failure).get("time", failure.timestamp)

    return min(failures.items(), key=order)


def _told(failure: ProcessFailure) -> dict[str, Any]:
    """What a rank wrote down when it failed: text and time. Empty if it was killed."""
    details = failure.error_file_data["message"]
    return details["extraInfo"] if isinstance(details, dict) else {}


def as_rank(environment: Environment, work: Callable[[], int]) -> int:
    """Do the work of one rank; a failure is told once, by the agent that started the rank if there is one."""
    try:
        return work()
    except Exception as error:
        expected = isinstance(error, (ConfigError, TrainingError))
        text = str(error) if expected else traceback.format_exc()
        if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            extra = {"text": text, "time": time.time(), "timestamp": str(int(time.time()))}  # the last is for torch
            details = {"message": str(error), "extraInfo": extra}
            Path(error_file).write_text(json.dumps({"message": details}))
        else:
            print(f"moe-dist: error: rank {environment.rank}: {text}", file=sys.stderr, flush=True)
        # At once: leaving the process group in good order would wait for ranks that wait for this one.
        os._exit(1)


def check_same_text(digest: str) -> None:
    """Nodes may differ in their files, or in the Python whose library is the text; their ranks would read other tokens."""
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if other := [rank for rank, found in enumerate(digests) if found != digests[0]]:
        raise ConfigError(
            f"data: rank {other[0]} reads another text than rank 0; give all nodes the same files and Python"
        )
