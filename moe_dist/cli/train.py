"""`moe-dist train`: as a worker under a launcher, or as the launcher of the ranks of this machine."""

import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe_dist.config import Config, ConfigError, layout_of, load_config
from moe_dist.config.layout import fewest_ranks
from moe_dist.parallel.environment import Environment, read_environment
from moe_dist.parallel.groups import process_group
from moe_dist.parallel.memory import keep_freed_memory
from moe_dist.training.data import TextData
from moe_dist.training.folder import RunFolder, default_output, open_folder
from moe_dist.training.loop import Training, TrainingError
from moe_dist.training.summary import finish


def train(path: Path, overrides: list[str], num_ranks: int | None, output: Path | None, resume: bool) -> int:
    """Run the command; returns the exit code. Raises ConfigError for a mistake found before anything has started."""
    environment = read_environment()
    if environment.launcher != "single":
        return _work(load_config(path, overrides, environment.num_ranks), path, output, resume, environment)
    assert output is not None
    config = load_config(path, overrides, num_ranks)
    fewest = fewest_ranks(config)
    num_ranks = num_ranks or fewest * max(1, torch.cuda.device_count() // fewest)
    config = load_config(path, overrides, num_ranks)
    if num_ranks == 1:
        return _work(config, path, output, resume, environment)
    if not resume:  # a resumed run begins by saying from where
        print(f"starting {num_ranks} ranks; results go to {output}", flush=True)
    arguments = ["-m", "moe_dist", "train", str(path), *overrides, "--output", str(output)]
    return _launch(num_ranks, [*arguments, "--resume"] if resume else arguments)


def _launch(num_ranks: int, arguments: list[str]) -> int:
    """Start the ranks by torch's elastic agent; if one fails, all end and its message is told."""
    launch = LaunchConfig(
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
        elastic_launch(launch, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _tell_failure(error)
    except SignalException as stopped:  # the ranks got the signal too, and have saved
        return 128 + stopped.sigval
    return 0


def _tell_failure(error: ChildFailedError) -> int:
    rank, failure = _first_failure(error.failures)
    silent = failure.message if failure.exitcode < 0 else f"ended with exit code {failure.exitcode} and no message"
    print(f"moe-dist: error: rank {rank}: {_told(failure).get('text', silent)}", file=sys.stderr)
    return 1


def _first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
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


def _work(config: Config, path: Path, output: Path | None, resume: bool, environment: Environment) -> int:
    """Train as one rank; a failure is told once, by the agent that started the rank if there is one."""
    try:
        return _train_rank(config, path, output, resume, environment)
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


def _train_rank(config: Config, path: Path, output: Path | None, resume: bool, environment: Environment) -> int:
    keep_freed_memory()
    layout = layout_of(config, environment.num_ranks)
    with process_group(environment) as device:
        folder = _agree_on_folder(output or default_output(path), config, resume)
        if environment.rank == 0 and resume:
            print(f"resuming {_origin(folder)}", flush=True)
        data = TextData(config)
        _check_same_text(data.digest)
        training = Training(config, layout, device, data, folder)
        progress = training.run()
        if progress.stopped:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may yet pass on what has been obeyed
        if environment.rank == 0:
            finish(training)
    has_agent = "TORCHELASTIC_RUN_ID" in os.environ  # it tells of the signal itself, and would take this for a failure
    return 128 + progress.stopped if progress.stopped and not has_agent else 0


def _check_same_text(digest: str) -> None:
    """Nodes may differ in their files, or in the Python whose library is the text; their ranks would read other tokens."""
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if other := [rank for rank, found in enumerate(digests) if found != digests[0]]:
        raise ConfigError(
            f"data: rank {other[0]} reads another text than rank 0; give all nodes the same files and Python"
        )


def _origin(folder: RunFolder) -> str:
    if folder.checkpoint is None:
        return f"from the start: {folder.path} holds no complete checkpoint"
    return f"from {folder.checkpoint}, after step {int(folder.checkpoint.name.removeprefix('step_'))}"


def _agree_on_folder(output: Path, config: Config, resume: bool) -> RunFolder:
    """Rank 0 looks at the folder, before any rank writes to it; all take its answer."""
    answer: list[RunFolder | str | None] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [open_folder(output, config, resume)]
        except ConfigError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if not isinstance(answer[0], RunFolder):
        raise ConfigError(str(answer[0]))
    return answer[0]
