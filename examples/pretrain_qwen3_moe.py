"""Pretrain a Qwen3-MoE through Megatron-Core's flex token dispatcher on megatron_ep_v2.

    torchrun --nproc-per-node 2 examples/pretrain_qwen3_moe.py

trains a small model on the Python standard library's own sources, on two CPU processes or on GPUs. `--help` lists the
options. Messages and progress go to stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from typing import Any

import torch

# Megatron-Core says at import, on every rank, which optional packages it does not find.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

from qwen3_moe import checkpoint, report
from qwen3_moe.data import Samples, text_samples
from qwen3_moe.indexed import indexed_samples
from qwen3_moe.loop import train_until_done
from qwen3_moe.options import Options, parse_options
from qwen3_moe.progress import Progress
from qwen3_moe.runtime import AgreedExit, Runtime

import megatron_ep_v2
from megatron_ep_v2.bench import link_counters
from megatron_ep_v2.errors import EPError, SettingsError
from megatron_ep_v2.layouts import CONTIGUOUS_ALIGNMENT
from megatron_ep_v2.megatron.qwen3_moe.model import rows_dtype, torch_dtype
from megatron_ep_v2.megatron.qwen3_moe.trainer import DivergedError, Trainer


def main() -> int:
    # Every rank gets the same command line: one of them is enough to explain it.
    silent = io.StringIO() if os.environ.get("RANK", "0") != "0" else None
    with contextlib.redirect_stdout(silent or sys.stdout), contextlib.redirect_stderr(silent or sys.stderr):
        options = parse_options()
    try:
        runtime = Runtime.start(options.device, options.seed)
    except SettingsError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _explain(error)
        return 1
    summary = None
    try:
        summary = pretrain(options, runtime)
    except AgreedExit:
        pass  # rank 0 has said why
    except DivergedError as error:
        if runtime.is_main:
            _explain(error)
    except EPError as error:
        _explain(error, f"rank {runtime.rank}: ")
        return 1  # on this rank alone: torchrun ends the others
    megatron_ep_v2.destroy_buffers()
    runtime.stop()
    if summary is None:
        return 1
    if runtime.is_main:
        print(json.dumps(summary), flush=True)
    return 0


def pretrain(options: Options, runtime: Runtime) -> dict[str, Any]:
    """Train as the options say; what comes back is the summary of the run."""
    runtime.together(lambda: options.check(runtime.world, runtime.device))
    _log_from_main(runtime)
    if options.dispatcher == "flex":
        names = ("buffer", "layout", "dispatch_dtype", "grad_dispatch_dtype", "sync_free")
        names += ("redundant_experts", "balance_min_rows")
        chosen = {name: getattr(options, name) for name in names}
        if options.redundant_experts:  # which install() refuses with Megatron's own experts
            chosen["experts"] = options.experts
        chosen["num_max_tokens_per_rank"] = options.micro_batch_size(runtime.world) * options.shape.seq_length
        carried_by_reference = runtime.device.type == "cpu" or options.buffer == "reference"
        if carried_by_reference and rows_dtype(options, runtime.device) != torch.bfloat16:
            chosen["reference_strict"] = False
            runtime.say("the reference buffer is not strict in this run: DeepEP would refuse rows in fp32 on GPUs")
        if options.experts == "deepgemm":  # then its experts take the rows as they come
            chosen["expert_alignment"] = CONTIGUOUS_ALIGNMENT
        runtime.together(lambda: megatron_ep_v2.install(**{k: v for k, v in chosen.items() if v is not None}))
    runtime.from_main(lambda: _make_folder(options))

    samples: Samples = indexed_samples(options, runtime) if options.data_path else text_samples(options, runtime)
    trainer = runtime.together(lambda: Trainer(options, runtime.device))
    _describe(options, runtime, trainer, samples)
    if options.resume and options.save:
        source = checkpoint.resume(options.save, trainer, samples, runtime)
        runtime.say(f"resumed from {source}")

    progress = None
    if runtime.is_main:
        progress = Progress(options.out / "metrics.jsonl", trainer.step_number, options.recipe.steps, options.log_every)
    crossed_before, _ = link_counters.read()
    stopped_by = train_until_done(options, runtime, trainer, samples, progress)
    crossed_after, unread = link_counters.read()

    status = megatron_ep_v2.status() if options.dispatcher == "flex" else None
    if progress is None:
        return {}
    progress.close()
    summary = report.summary(options, runtime, samples, progress.rows, stopped_by, status)
    # Of this rank's GPU and this host's network devices, by their own counters; empty where none can be read.
    summary["link_bytes"] = link_counters.difference(crossed_before, crossed_after)
    summary["link_counters"] = unread or "read"
    _report(options, runtime, samples, progress.rows, summary)
    return summary


def _report(
    options: Options, runtime: Runtime, samples: Samples, rows: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Write the plot and the summary, and say how it went."""
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    title = f"Qwen3-MoE {options.preset}, EP{runtime.world}, {options.dispatcher} dispatcher"
    if rows:
        report.plot(rows, samples.unigram_entropy, options.out, title)
    if summary["val_loss"] is not None:
        verdict = "below" if summary["below_unigram_entropy"] else "not below"
        runtime.say(
            f"validation loss {summary['val_loss']:.3f} nats per token, {verdict} the corpus' own unigram entropy "
            f"of {samples.unigram_entropy:.3f}"
        )
    runtime.say(f"metrics.jsonl, loss.png, loss.svg and summary.json are in {options.out}")


def _describe(options: Options, runtime: Runtime, trainer: Trainer, samples: Samples) -> None:
    shape = options.shape
    total, active = trainer.num_parameters()
    dtypes = [str(find(options, runtime.device)).removeprefix("torch.") for find in (torch_dtype, rows_dtype)]
    runtime.say(
        f"Qwen3-MoE {options.preset}: {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"top-{shape.topk} of {shape.num_experts} experts; {total / 1e6:.1f} M parameters, "
        f"{active / 1e6:.1f} M active per token\n"
        f"{runtime.world} processes on {runtime.device.type}, expert parallel {runtime.world}, "
        f"{dtypes[0]}{'' if dtypes[0] == dtypes[1] else f', rows to experts {dtypes[1]}'}, "
        f"{options.dispatcher} dispatcher\n"
        f"data: {samples.description}"
    )
    if options.preset != "tiny" and shape.vocab_size == 256:
        runtime.say("vocabulary: 256 bytes; Qwen3's own embeddings have 151936 rows: --vocab-size 151936")


def _make_folder(options: Options) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out: cannot make {options.out}", found=error.strerror, fix="another --out") from error


def _log_from_main(runtime: Runtime) -> None:
    """What megatron_ep_v2 chooses, and why, once."""
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("megatron_ep_v2").setLevel(logging.INFO if runtime.is_main else logging.WARNING)


def _explain(error: EPError, who: str = "") -> None:
    print(f"{who}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
