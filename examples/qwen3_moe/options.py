"""The command line."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape, Recipe, TrainerOptions
from megatron_ep_v2.wire.formats import DISPATCH_DTYPES

from .presets import PRESETS

Part = TypeVar("Part", ModelShape, Recipe)


@dataclass(frozen=True, kw_only=True)
class Options(TrainerOptions):
    """Everything that a run depends on. `parse_options([])` gives the defaults."""

    preset: str = "tiny"
    shape: ModelShape = PRESETS["tiny"].shape
    recipe: Recipe = PRESETS["tiny"].recipe
    layout: str | None = None
    buffer: str | None = None
    dispatch_dtype: str | None = None
    grad_dispatch_dtype: str | None = None
    sync_free: bool | None = None
    redundant_experts: int | None = None
    balance_min_rows: int | None = None
    device: str = "auto"
    data: tuple[Path, ...] = ()
    data_path: str | None = None
    split: str = "95,5,0"
    max_data_mb: int = 64
    eval_samples: int = 64
    eval_every: int = 50
    log_every: int = 10
    record_load: int = 0
    out: Path = field(default_factory=lambda: Path("runs/qwen3-moe-tiny"))
    save: Path | None = None
    save_interval: int = 0
    resume: bool = False

    def check(self, world: int, device: torch.device) -> None:
        """Refuse what cannot be trained on `world` ranks."""
        shape, batch = self.shape, self.recipe.global_batch_size
        for name, size in dataclasses.asdict(shape).items():
            if size < 1:
                raise SettingsError(f"{_flag(name)} {size} is out of range", needed="1 or more")
        if shape.num_attention_heads % shape.num_query_groups:
            raise SettingsError(
                "the query heads cannot share the key/value heads evenly",
                found=f"--num-attention-heads {shape.num_attention_heads} --num-query-groups {shape.num_query_groups}",
                needed="a multiple",
            )
        if shape.num_experts % world:
            raise SettingsError(
                "the experts cannot be shared out evenly",
                found=f"--num-experts {shape.num_experts} on {world} processes",
                needed="a multiple of the number of processes, which is the expert-parallel size",
                fix=f"--num-experts {-(-shape.num_experts // world) * world}, or another --nproc-per-node",
            )
        if not 1 <= shape.topk <= shape.num_experts:
            raise SettingsError(
                f"--topk {shape.topk} is out of range", needed=f"1 to {shape.num_experts}, the number of experts"
            )
        if batch % (self.micro_batch_size(world) * world):
            raise SettingsError(
                "the global batch cannot be shared out evenly",
                found=f"--global-batch-size {batch}, --micro-batch-size {self.micro_batch_size(world)}, "
                f"{world} processes",
                needed="a multiple of micro-batch size times processes",
                fix=f"--global-batch-size {self.micro_batch_size(world) * world}",
            )
        if self.dispatcher == "flex" and world == 1:
            raise SettingsError(
                "Megatron's flex dispatcher needs expert parallelism",
                found="one process",
                fix="torchrun --nproc-per-node 2 (or more), or --dispatcher alltoall",
            )
        if self.data_path and self.data:
            raise SettingsError("--data and --data-path exclude each other", fix="give one of them")
        if self.permute_fusion and device.type == "cpu":
            raise SettingsError("--permute-fusion needs GPUs", found="training on the CPU", fix="leave it out")
        if self.experts == "deepgemm" and device.type == "cpu":
            raise SettingsError(
                "DeepGEMM multiplies on GPUs only", found="training on the CPU", fix="--experts grouped or sequential"
            )
        if self.sync_free and self.experts not in ("grouped", "deepgemm"):
            raise SettingsError(
                "--sync-free needs experts that do not wait on the host either",
                found=f"--experts {self.experts}",
                needed="--experts grouped, or deepgemm on GPUs",
                fix="add --experts grouped",
            )
        if self.redundant_experts and (self.dispatcher != "flex" or self.experts not in ("grouped", "sequential")):
            raise SettingsError(
                "--redundant-experts needs this package's dispatcher, and experts that read replica slots",
                found=f"--dispatcher {self.dispatcher} --experts {self.experts}",
                needed="--dispatcher flex, --experts grouped or sequential",
                fix="add --experts grouped",
            )
        if self.cuda_graph and (device.type == "cpu" or not self.sync_free or self.recompute):
            raise SettingsError(
                "--cuda-graph replays steps on GPUs that nothing on the host depends on",
                found=f"{device.type}, {'--sync-free' if self.sync_free else 'without --sync-free'}"
                + (", --recompute" if self.recompute else ""),
                needed="GPUs, --sync-free, and no --recompute, which sets random states on the host",
                fix="--cuda-graph --sync-free --experts grouped --no-recompute, on GPUs",
            )
        if self.record_load < 0:
            raise SettingsError(
                "the expert load cannot be recorded that often",
                found=f"--record-load {self.record_load}",
                needed="a number of steps, or 0 for none",
                fix="--record-load 10 records every tenth step",
            )
        if self.resume and not self.save:
            raise SettingsError("--resume needs to know where", fix="add --save DIR, the folder of the checkpoints")


def parse_options(argv: Sequence[str] | None = None) -> Options:
    parser = _parser()
    args = vars(parser.parse_args(argv))
    preset = PRESETS[args["preset"]]
    if args["data_path"] and args["vocab_size"] is None:
        parser.error("--data-path needs --vocab-size, the vocabulary size of the tokenizer that wrote the files")
    if not args["data_path"] and (args["vocab_size"] or 256) < 256:
        parser.error("text is read as bytes: --vocab-size must be at least 256")
    if args["out"] is None:
        args["out"] = Path(f"runs/qwen3-moe-{args['preset']}")
    if args["recompute"] is None:
        args["recompute"] = preset.recompute

    shape, recipe = _override(preset.shape, args), _override(preset.recipe, args)
    return Options(shape=shape, recipe=recipe, **{**args, "data": tuple(args["data"])})


def _override(preset_part: Part, args: dict[str, Any]) -> Part:
    """The shape or recipe with the values given in `args`, which it takes out of them."""
    given = {f.name: args.pop(f.name) for f in dataclasses.fields(preset_part)}
    return dataclasses.replace(preset_part, **{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrain a Qwen3-MoE on megatron.core. Expert-parallel size = number of processes; "
        "each process is a data-parallel rank too.",
        usage="torchrun --nproc-per-node N %(prog)s [options]",
    )
    model = parser.add_argument_group("model (the preset's values unless given)")
    model.add_argument("--preset", choices=PRESETS, default="tiny")
    for f in dataclasses.fields(ModelShape):
        model.add_argument(_flag(f.name), type=int, metavar="N", help=f.metadata["help"])
    model.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 on GPUs; on the CPU fp32, with rows to and from experts in bf16 as DeepEP carries them",
    )
    model.add_argument("--recompute", action=argparse.BooleanOptionalAction, help="recompute activations on GPUs")

    recipe = parser.add_argument_group("training (the preset's values unless given)")
    for f in dataclasses.fields(Recipe):
        kind, metavar = (int, "N") if f.type == "int" else (float, "X")
        recipe.add_argument(_flag(f.name), type=kind, metavar=metavar, help=f.metadata["help"])
    recipe.add_argument("--seed", type=int, default=1234, metavar="N")

    moe = parser.add_argument_group("expert parallelism")
    moe.add_argument(
        "--dispatcher",
        choices=("flex", "alltoall"),
        default="flex",
        help="flex: Megatron's flex dispatcher on megatron_ep_v2; alltoall: Megatron's own, for comparison",
    )
    moe.add_argument("--layout", choices=("auto", "compact", "expanded"), help="of megatron_ep_v2")
    moe.add_argument("--buffer", choices=("auto", *CARRIERS), help="of megatron_ep_v2")
    moe.add_argument("--dispatch-dtype", choices=DISPATCH_DTYPES, help="of megatron_ep_v2: what rows travel as")
    moe.add_argument(
        "--grad-dispatch-dtype", choices=DISPATCH_DTYPES, help="of megatron_ep_v2: what gradients travel as"
    )
    moe.add_argument(
        "--sync-free",
        action="store_true",
        default=None,
        help="no wait on the host in a MoE layer; needs --experts grouped or deepgemm",
    )
    moe.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay forward and backward of all micro-batches as one CUDA graph (GPUs); needs --sync-free",
    )
    moe.add_argument("--permute-fusion", action="store_true", help="moe_permute_fusion (GPUs, TransformerEngine)")
    moe.add_argument(
        "--experts",
        choices=("megatron", "deepgemm", "grouped", "sequential"),
        default="megatron",
        help="megatron: its own; else megatron_ep_v2's, on DeepGEMM, on torch's grouped GEMM, or one by one",
    )
    moe.add_argument(
        "--redundant-experts",
        type=int,
        metavar="R",
        help="replica slots of each rank, for copies of busy experts; needs --experts grouped or sequential",
    )
    moe.add_argument(
        "--balance-min-rows", type=int, metavar="N", help="the fewest rows for which a copy is planned (default: 1024)"
    )
    moe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=(),
        metavar="PATH",
        help="UTF-8 files or folders, read as bytes (default: the Python standard library's own sources)",
    )
    data.add_argument("--data-path", metavar="PREFIX", help="Megatron's PREFIX.bin and PREFIX.idx; needs --vocab-size")
    data.add_argument("--split", default="95,5,0", help="train,validation,test shares of --data-path")
    data.add_argument("--max-data-mb", type=int, default=64, metavar="N", help="read at most so much text")
    data.add_argument("--eval-samples", type=int, default=64, metavar="N", help="held-out sequences of an evaluation")

    output = parser.add_argument_group("output")
    output.add_argument("--eval-every", type=int, default=50, metavar="N", help="steps; 0 = only at the end")
    output.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines (no terminal)")
    output.add_argument(
        "--record-load",
        type=int,
        default=0,
        metavar="N",
        help="write the expert load of every Nth step to expert_load.jsonl, for what-if; 0 = never",
    )
    output.add_argument("--out", type=Path, metavar="DIR", help="metrics and plots (default: runs/qwen3-moe-PRESET)")
    output.add_argument("--save", type=Path, metavar="DIR", help="checkpoints; also written on Ctrl-C and SIGTERM")
    output.add_argument("--save-interval", type=int, default=0, metavar="N", help="steps; 0 = only at the end")
    output.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --save")
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
