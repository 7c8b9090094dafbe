"""`moe-dist train`: as a worker under a launcher, or as the launcher of the ranks of this machine."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.cli.ranks import as_rank, check_same_text, launch
from moe_dist.config import Config, ConfigError, layout_of, load_config
from moe_dist.config.layout import fewest_ranks
from moe_dist.engines.registry import check_engine
from moe_dist.parallel.environment import Environment, read_environment
from moe_dist.parallel.groups import device_of, process_group
from moe_dist.parallel.memory import keep_freed_memory
from moe_dist.training.data import TextData
from moe_dist.training.folder import RunFolder, default_output, open_folder
from moe_dist.training.loop import Training
from moe_dist.training.summary import finish


def train(path: Path, overrides: list[str], num_ranks: int | None, output: Path | None, resume: bool) -> int:
    """Run the command; returns the exit code. Raises ConfigError for a mistake found before anything has started."""
    environment = read_environment()
    if environment.launcher != "single":
        config = load_config(path, overrides, environment.num_ranks)
        check_engine(config, device_of(environment))
        return as_rank(environment, lambda: _train_rank(config, path, output, resume, environment))
    assert output is not None
    config = load_config(path, overrides, num_ranks)
    fewest = fewest_ranks(config)
    num_ranks = num_ranks or fewest * max(1, torch.cuda.device_count() // fewest)
    config = load_config(path, overrides, num_ranks)
    check_engine(config, device_of(replace(environment, local_num_ranks=num_ranks)))
    if num_ranks == 1:
        return as_rank(environment, lambda: _train_rank(config, path, output, resume, environment))
    if not resume:  # a resumed run begins by saying from where
        print(f"starting {num_ranks} ranks; results go to {output}", flush=True)
    arguments = ["-m", "moe_dist", "train", str(path), *overrides, "--output", str(output)]
    return launch(num_ranks, [*arguments, "--resume"] if resume else arguments)


def _train_rank(config: Config, path: Path, output: Path | None, resume: bool, environment: Environment) -> int:
    keep_freed_memory()
    layout = layout_of(config, environment.num_ranks)
    with process_group(environment) as device:
        folder = _agree_on_folder(output or default_output(path), config, resume)
        if environment.rank == 0 and resume:
            print(f"resuming {_origin(folder)}", flush=True)
        data = TextData(config)
        check_same_text(data.digest)
        training = Training(config, layout, device, data, folder)
        progress = training.run()
        if progress.stopped:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may yet pass on what has been obeyed
        if environment.rank == 0:
            finish(training)
    has_agent = "TORCHELASTIC_RUN_ID" in os.environ  # it tells of the signal itself, and would take this for a failure
    return 128 + progress.stopped if progress.stopped and not has_agent else 0


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
