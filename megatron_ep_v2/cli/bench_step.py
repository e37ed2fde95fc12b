"""The command of `bench --step` and `bench --tune`: measure, print, advise."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist

import megatron_ep_v2
from megatron_ep_v2 import settings as settings_module
from megatron_ep_v2.bench import report
from megatron_ep_v2.bench.entry import entries_of
from megatron_ep_v2.bench.layer import Groups
from megatron_ep_v2.bench.progress import Progress
from megatron_ep_v2.bench.rows import Row
from megatron_ep_v2.bench.session import session
from megatron_ep_v2.bench.shapes import Shape
from megatron_ep_v2.bench.step.advice import advice, step_table
from megatron_ep_v2.bench.step.forced import force_overload
from megatron_ep_v2.bench.step.measure import measure_steps
from megatron_ep_v2.bench.step.model import layers_that_fit, model_options, with_layers
from megatron_ep_v2.bench.step.replicas import what_replicas_give
from megatron_ep_v2.bench.variants import Variant
from megatron_ep_v2.megatron.qwen3_moe.expert_kinds import owner
from megatron_ep_v2.megatron.qwen3_moe.options import ModelShape
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer
from megatron_ep_v2.megatron.standalone import model_parallel
from megatron_ep_v2.settings import Launch

_SHARE_OF_MEMORY = 0.4  # of a rank's, for what follows; activations get the rest
_BYTES_PER_PARAMETER, _BYTES_OF_OPTIMIZER = 2 + 4, 4 + 8  # bf16 and fp32 gradient; fp32 master and Adam's two moments
_DEFAULT_LAYERS_ON_CPU = 2


def run(
    options: argparse.Namespace,
    shapes: Sequence[Shape],
    variants: Sequence[Variant],
    place: Launch,
    command: str,
) -> int:
    """Measure and print; the exit status, 1 if a variant gave a wrong result."""
    with session(place) as device, model_parallel(place.ranks, options.seed):
        return _measure(options, shapes, variants, device, command)


def _measure(
    options: argparse.Namespace,
    shapes: Sequence[Shape],
    variants: Sequence[Variant],
    device: torch.device,
    command: str,
) -> int:
    main, ranks = dist.get_rank() == 0, dist.get_world_size()
    groups, progress = Groups(), Progress(len(shapes) * len(options.overload or [None]), silent=not main)
    header = report.environment(command) if main else {}
    rows: list[Row] = []
    for shape, overload in itertools.product(shapes, options.overload or [None]):
        progress.next_table(f"{shape.name} step" + (f" overload {overload}" if overload else ""))
        progress.say("building the model")
        torch.compiler.reset()
        model = model_options(
            shape,
            layers=options.layers or 1,
            tokens=options.tokens[0],
            vocab_size=options.vocab_size,
            micro_batches=options.micro_batches,
            dtype=options.dtype,
            recompute=options.recompute,
            ranks=ranks,
            seed=options.seed,
            experts=owner(options.expert_backends),
            overlap=options.overlap,
        )
        if not options.layers:
            model = with_layers(model, _default_layers(shape, model.shape, options, ranks, device))
        trainer = Trainer(model, device, options.optimizer)
        if overload:
            force_overload(trainer, overload, options.hot_experts)
        measured = measure_steps(
            entries_of(variants, options.sms, options.expert_backends),
            shape,
            trainer,
            options.repeats,
            groups,
            progress,
            options.traces / shape.name / (f"overload_{overload}" if overload else "")
            if options.traces and main
            else None,
        )
        del trainer
        about = {"overload": overload, "hot_experts": options.hot_experts}
        measured = [row | about | ({"routing": "forced"} if overload else {}) for row in measured]
        gc.collect()  # hooks of the model hold it in a circle, and the next one needs its memory
        rows += measured
        megatron_ep_v2.destroy_buffers()
        settings_module.activate(None)
        if main:
            print(step_table(measured), end="\n\n", flush=True)
            if options.tune:
                print(advice(measured), end="\n\n", flush=True)
            if options.out:
                report.write_rows(options.out, header, rows)
    summary = report.summary(rows)
    if main:
        if text := what_replicas_give(rows):
            print(text, end="\n\n")
        print(report.noise_warning(summary), end="")
        print(json.dumps({"environment": header, "rows": rows, "summary": summary}))
    return 1 if summary["wrong"] else 0


def _default_layers(
    shape: Shape, model: ModelShape, options: argparse.Namespace, ranks: int, device: torch.device
) -> int:
    """The model's own depth, or as much of it as fits."""
    if device.type == "cpu":
        return min(shape.layers, _DEFAULT_LAYERS_ON_CPU)
    memory = torch.cuda.get_device_properties(device).total_memory
    size = _BYTES_PER_PARAMETER + (_BYTES_OF_OPTIMIZER if options.optimizer else 0)
    fit = layers_that_fit(model, shape.shared_ffn, ranks, int(_SHARE_OF_MEMORY * memory / size))
    return min(shape.layers, fit)
