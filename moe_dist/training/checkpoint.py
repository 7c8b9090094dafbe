"""Checkpoints: DIR/checkpoints/step_00000050, written under another name and renamed when complete.

They are torch.distributed.checkpoint's, with one key per weight and expert (moe_dist.engines.state), so that a run can go
on with any number of ranks, any expert map, any slices of experts and either sharding. `run.json` beside the tensors tells
what wrote them, the map of experts included.
"""

import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from moe_dist.config import Config, ConfigError, dump_config
from moe_dist.config.layout import owner_of_expert
from moe_dist.engines.engine import Engine
from moe_dist.training.folder import complete_checkpoints

FORMAT = 1


def save_checkpoint(folder: Path, engine: Engine, config: Config, step: int) -> Path:
    """Write the state after `step` steps; collective. The last `training.checkpoint.keep` checkpoints stay."""
    final = folder / f"step_{step:08d}"
    partial = folder / f"{final.name}.partial"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        placement = {"owner_of_expert": owner_of_expert(config), "expert_tensor": config.parallel.expert_tensor}
        (partial / "run.json").write_text(json.dumps({"format": FORMAT, "step": step, **placement}, indent=1))
        (partial / "config.yaml").write_text(dump_config(config))
    dist.barrier()
    dcp.save(engine.state(), checkpoint_id=partial)
    if is_writer:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in complete_checkpoints(folder)[: -config.training.checkpoint.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, engine: Engine) -> int:
    """Read a checkpoint into the engine, whatever layout wrote it; collective. Returns its step.

    Raises ConfigError if it was written by a run of another model.
    """
    about = json.loads((checkpoint / "run.json").read_text())
    if about["format"] != FORMAT:
        raise ConfigError(f"--resume: {checkpoint} has format {about['format']}; this version reads {FORMAT}")
    state = engine.state()
    _check_fits(checkpoint, state)
    dcp.load(state, checkpoint_id=checkpoint)
    engine.take_state(state)
    return about["step"]


def _check_fits(checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, tensor in state.items():
        if name not in saved:
            raise ConfigError(f"--resume: {checkpoint} has no {name}; it is of another model or optimiser")
        shape = tuple(getattr(saved[name], "size", ()))
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"--resume: {name} in {checkpoint} has shape {shape}, this config gives {tuple(tensor.shape)}"
            )
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(state))  # a rank may have some of the layers only
    known = {_of_any_expert(name) for of_rank in names for name in of_rank}
    for name in sorted(saved, key=lambda name: not name.startswith("model.")):  # weights first
        if _of_any_expert(name) not in known:
            raise ConfigError(f"--resume: {checkpoint} has {name} as well; it is of another model or optimiser")


def _of_any_expert(name: str) -> str:
    """The name without the number of the expert: a rank's state has only its own experts."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)
