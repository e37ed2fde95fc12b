"""How much of dispatch and combine is exposed in Megatron's 1F1B plan, which runs one micro-batch's forward next to
another's backward. (Shared experts next to communication: `bench --step --overlap`.)

    off       a GPT of MoE layers, several micro-batches one after the other
    on        by the plan; every call waits
    delayed   the same with `delay_wgrad_compute`
    started   the same with dispatches that are started, as this package does by itself on DeepEP 2.5

Exposed: some kernel of deep_ep runs and no other kernel does, in a profiler's trace of one step; a kernel that waits
for a late rank counts as running. Times are CUDA events, medians over repeats of the slowest rank; shares are the worst
rank's. Results of all ways agree before anything is timed.

Overlap can save time where the GPU bounds the step, so with many tokens, and with experts that give the host less to
launch (`--experts grouped`: torch's grouped GEMM; TransformerEngine's launch one GEMM an expert). The number of
hardware queues is the environment's: CUDA_DEVICE_MAX_CONNECTIONS=1 before the command, or 32. deep_ep takes a stream of
the highest priority by itself; `--high-priority` gives Megatron's communication stream, on which dispatch and combine
nodes queue everything else, the same. As in the lab notebook (benchmarks/results/README.md):

    torchrun --nproc-per-node 4 benchmarks/gpu_overlap.py --tokens 16384 --experts grouped
    ... --tokens 16384 --experts grouped --shape deepseek-v3 --experts-per-rank 32 --layers 2 --sms 0 16 24 32
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import megatron_ep_v2
from megatron_ep_v2.bench.exposed import activity, most_exposed
from megatron_ep_v2.bench.rows import ratio
from megatron_ep_v2.bench.runner import Row, Run, main
from megatron_ep_v2.bench.shapes import PRESETS, Shape
from megatron_ep_v2.bench.timing import summarise
from megatron_ep_v2.buffers.pool import buffers

HEADS, VOCABULARY, SEQUENCE = 16, 32768, 4096

STARTED = "started"
Step = Callable[[], dict[str, torch.Tensor]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", choices=("compact", "expanded", "sync-free"), default="expanded")
    parser.add_argument("--experts", choices=("te", "grouped"), default="te", help="TEGroupedMLP, or torch's GEMM")
    parser.add_argument("--tokens", type=_tokens, default=4096, help="tokens of a micro-batch, a multiple of 4096")
    parser.add_argument("--shape", choices=PRESETS, default="qwen3-30b-a3b", help="of the MoE layers")
    parser.add_argument("--experts-per-rank", type=int, metavar="N", help="instead of the shape's own number")
    parser.add_argument(
        "--sms", nargs="+", type=int, default=[0], metavar="N", help="of dispatch and combine; 0 = auto"
    )
    parser.add_argument("--high-priority", action="store_true", help="of Megatron's communication stream")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=3)
    parser.add_argument("--traces", type=Path, help="folder for rank 0's traces of the profiled steps")


def _tokens(text: str) -> int:
    if int(text) % SEQUENCE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {SEQUENCE}, the length of a sequence")
    return int(text)


def measure(run: Run) -> Iterator[list[Row]]:
    from megatron_ep_v2.megatron.standalone import model_parallel

    layout = run.options.layout
    mode: dict[str, bool | str] = {"sync_free": True} if layout == "sync-free" else {"layout": layout}
    with model_parallel(run.ranks, seed=1):
        for sms in run.options.sms:
            megatron_ep_v2.install(buffer=run.buffer, num_max_tokens_per_rank=run.options.tokens, num_sms=sms, **mode)
            yield _measure(sms, run)
            megatron_ep_v2.destroy_buffers()
            megatron_ep_v2.uninstall()
    if len(run.options.sms) > 1 and run.rank == 0:
        best = min(run.rows, key=lambda row: row["microseconds"])
        print(f"shortest with {best['sms'] or 'automatic'} SMs, overlap {best['overlap']}", flush=True)


def line(row: Row) -> str:
    return (
        f"{row['sms']:>3} SMs  overlap {row['overlap']:<7} {row['microseconds']:>8.0f} us"
        f" {row['ratio']:.3f}"
        f"  deep_ep {row['communication_us']:>7.0f} us, exposed {row['exposed_us']:>7.0f} us:"
        f" {row['exposed_share']:.1%} of the step, {row['covered']:.1%} covered"
    )


def _shape(options: argparse.Namespace) -> Shape:
    """With as many experts as were asked for."""
    shape, local = PRESETS[options.shape], options.experts_per_rank
    return replace(shape, experts=local * dist.get_world_size()) if local else shape


def _config(shape: Shape, layers: int, **more: object) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=layers,
        hidden_size=shape.hidden,
        num_attention_heads=HEADS,
        num_query_groups=4,
        kv_channels=128,
        ffn_hidden_size=shape.expert_ffn,
        moe_ffn_hidden_size=shape.expert_ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        gradient_accumulation_fusion=False,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        expert_model_parallel_size=dist.get_world_size(),
        **more,
    )


def _one_forward_one_backward(options: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """The same model and micro-batches, one after the other and by Megatron's plan."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.pipeline_parallel.utils import set_streams

    from megatron_ep_v2.megatron.experts import use_experts

    priority = torch.cuda.Stream.priority_range()[1] if options.high_priority else 0
    set_streams(comm_stream=torch.cuda.Stream(device, priority=priority))  # 0.16 has no high_priority

    def build(**more: object) -> Any:
        config = _config(_shape(options), options.layers, **more)
        block = get_gpt_decoder_block_spec(config=config, use_transformer_engine=True)
        if options.experts == "grouped":
            for layer in block.layer_specs:
                use_experts(layer, "grouped")
        return GPTModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
        ).to(device)

    model, delaying = build(), build(overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True)
    delaying.load_state_dict(model.state_dict())
    _add_up_delayed(delaying)
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = options.tokens // SEQUENCE, SEQUENCE
    positions = torch.arange(SEQUENCE, device=device).expand(shape)

    def tokens() -> torch.Tensor:
        return torch.randint(VOCABULARY, shape, generator=generator).to(device)

    batches: list[dict[str, torch.Tensor | None]] = [
        {"input_ids": tokens(), "position_ids": positions, "attention_mask": None, "labels": tokens()}
        for _ in range(options.micro_batches)
    ]

    def gradients(model: Any, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        found = [getattr(parameter, "main_grad", parameter.grad) for parameter in model.parameters()]
        grads = [grad for grad in found if grad is not None]
        norm = torch.stack([grad.double().norm() for grad in grads]).norm()
        return {"loss": torch.stack([loss.detach().double().mean() for loss in losses]), "gradient norm": norm}

    def one_after_the_other() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            losses.append(model(**batch))
            losses[-1].backward(torch.ones_like(losses[-1]))
        return gradients(model, losses)

    def planned(model: Any, starts: bool = False) -> dict[str, torch.Tensor]:
        _start_calls(model, starts)
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            if hasattr(parameter, "main_grad"):
                parameter.main_grad.zero_()
        run, losses, previous = TransformerModelChunkSchedulePlan.run, [], None
        for batch in batches:
            plan = model.build_schedule_plan(**batch)
            loss = run(plan, previous, b_grad=torch.ones_like(losses[-1]) if losses else None)
            losses.append(loss.detach())
            previous = plan
        run(None, previous, b_grad=torch.ones_like(losses[-1]))
        return gradients(model, losses)

    return {
        "off": one_after_the_other,
        "on": lambda: planned(model),
        "delayed": lambda: planned(delaying),
        STARTED: lambda: planned(delaying, True),
    }


def _add_up_delayed(model: torch.nn.Module) -> None:
    """Do what Megatron's DDP does: TransformerEngine's delayed gradients replace those of the micro-batch before."""

    def add(parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, "skip_backward_post_hook", False):
                parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
                hooks: Any = module
                hooks.register_wgrad_accumulation_and_reduce_hooks(functools.partial(add, parameter))


def _start_calls(model: torch.nn.Module, starts: bool) -> None:
    """Whether the model's layers start calls, where their buffer can."""
    for module in model.modules():
        manager = getattr(getattr(module, "token_dispatcher", None), "_comm_manager", None)
        if manager is not None:
            manager.starts = starts


def _measure(sms: int, run: Run) -> list[Row]:
    options = run.options
    steps = _one_forward_one_backward(options, run.device)
    steps["off"]()  # builds the buffer
    if options.layout != "expanded" or not all(buffer.defers for buffer in buffers()):
        del steps[STARTED]
    run.require_equal(steps, "off", 2e-2)
    times = run.time_alone(steps)
    rows = []
    for overlap, step in steps.items():
        trace = options.traces / f"{sms}_sms_{overlap}.json.gz" if options.traces and run.rank == 0 else None
        found = most_exposed(activity(step, trace), run.device)
        rows.append(
            {
                "case": "1f1b",
                "shape": options.shape,
                "experts_per_rank": _shape(options).experts // run.ranks,
                "sms": sms,
                "overlap": overlap,
                "layout": options.layout,
                "experts": options.experts,
                "max_connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
                "ranks": run.ranks,
                "tokens_per_rank": options.tokens,
                "layers": options.layers,
                "microseconds": round(summarise(times[overlap]).median, 1),
                "ratio": ratio(times[overlap], times["off"]),
                "repeats": options.repeats,
                "high_priority": options.high_priority,
                "traced_step_us": round(found.span, 1),
                "communication_us": round(found.communication, 1),
                "exposed_us": round(found.exposed, 1),
                "exposed_share": round(found.share, 4),
                "covered": round(max(0.0, 1 - found.exposed / found.communication), 4),
            }
        )
    return rows


if __name__ == "__main__":
    main(__doc__, measure, add_options, line=line, repeats=10)
