"""Checkpoints: one shard per rank, complete or not there at all.

    DIR/step_00000100/rank_00000.pt ...    masters, AdamW's moments, random state, step and data position
    DIR/latest                             the name of the newest complete one, written after every rank's shard

A run resumes exactly on the same number of processes, and with experts that are stored alike: Megatron's own one by
one, megatron_ep_v2's, whichever backend, all of a rank in one parameter, with its moments.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.megatron.qwen3_moe.model import torch_dtype
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer

from .data import Samples
from .options import Options
from .runtime import Runtime

LATEST = "latest"


class CheckpointError(EPError):
    """A checkpoint cannot be written or read."""


def save(folder: Path, trainer: Trainer, samples: Samples, runtime: Runtime) -> Path:
    """Write this rank's shard; the marker moves on when all ranks have written theirs."""
    target = folder / f"step_{trainer.step_number:08d}"
    shard = {
        "identity": identity(trainer.options, runtime),
        "recipe": dataclasses.asdict(trainer.options.recipe),
        "data": {"fingerprint": samples.fingerprint, "seed": trainer.options.seed},
        "samples_seen": trainer.step_number * trainer.options.recipe.global_batch_size,
        "trainer": trainer.state_dict(),
        "random": _random_state(trainer.device),
    }

    def write() -> None:
        try:
            target.mkdir(parents=True, exist_ok=True)
            _replace(_shard_path(target, runtime.rank), lambda temporary: torch.save(shard, temporary))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise CheckpointError(f"rank {runtime.rank} cannot write {target}", found=str(error)) from error

    runtime.together(write)
    if runtime.is_main:
        _replace(folder / LATEST, lambda temporary: temporary.write_text(target.name + "\n"))
    runtime.barrier()
    return target


def resume(folder: Path, trainer: Trainer, samples: Samples, runtime: Runtime) -> Path:
    """Load the newest complete checkpoint, or leave together with a message that says what does not fit."""
    return runtime.together(lambda: _load(folder, trainer, samples, runtime))


def identity(options: Options, runtime: Runtime) -> dict[str, Any]:
    """What has to be equal for a shard to fit."""
    return {
        "processes": runtime.world,
        **dataclasses.asdict(options.shape),
        "dtype": str(torch_dtype(options, runtime.device)),
        "device": runtime.device.type,
        **({} if options.experts == "megatron" else {"experts": "stacked"}),
    }


def _load(folder: Path, trainer: Trainer, samples: Samples, runtime: Runtime) -> Path:
    marker = folder / LATEST
    if not marker.is_file():
        raise CheckpointError(
            f"--resume: no checkpoint in {folder}",
            needed=f"the file {marker}, written with the first complete checkpoint",
            fix="leave out --resume to start from the first step, or check --save",
        )
    source = folder / marker.read_text().strip()
    path = _shard_path(source, runtime.rank)
    if not path.is_file():
        shards = len(list(source.glob("rank_*.pt")))
        raise CheckpointError(
            f"--resume: rank {runtime.rank} has no shard in {source}",
            found=f"{shards} shards for {runtime.world} processes",
            needed=f"a checkpoint written by {runtime.world} processes, in a folder that every host sees",
            fix=f"--nproc-per-node {shards}, as when it was written" if shards else "check --save",
        )
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"--resume: {path} cannot be read", found=str(error).splitlines()[0]) from error
    _check(shard, trainer, samples, runtime, source)
    trainer.load_state_dict(shard["trainer"])
    _set_random_state(shard["random"], trainer.device)
    return source


def _check(shard: dict[str, Any], trainer: Trainer, samples: Samples, runtime: Runtime, source: Path) -> None:
    options = trainer.options
    here, there = identity(options, runtime), shard["identity"]
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        raise SettingsError(
            f"--resume: this run does not fit the checkpoint {source}",
            found="; ".join(f"{name} {here.get(name, 'one by one')}" for name in differing),
            needed="; ".join(f"{name} {there.get(name, 'one by one')}" for name in differing),
            fix="the options that the checkpoint was written with, or leave out --resume",
        )
    if shard["samples_seen"] != shard["trainer"]["step"] * options.recipe.global_batch_size:
        raise SettingsError(
            f"--resume: the checkpoint {source} counts its data in other batches",
            found=f"--global-batch-size {options.recipe.global_batch_size}",
            needed=str(shard["recipe"]["global_batch_size"]),
        )
    changed = [n for n, v in dataclasses.asdict(options.recipe).items() if v != shard["recipe"].get(n)]
    if shard["data"] != {"fingerprint": samples.fingerprint, "seed": options.seed}:
        changed.append("data or seed")
    if changed:
        runtime.say(f"resuming with other settings than before ({', '.join(changed)}): not an exact continuation")


def _shard_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.pt"


def _replace(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
