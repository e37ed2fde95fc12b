"""The steps of a run: train, measure, evaluate, save, and stop when asked to."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

from megatron_ep_v2 import sync_free
from megatron_ep_v2.errors import LayoutOverflowError
from megatron_ep_v2.megatron.qwen3_moe.optimizer import learning_rate
from megatron_ep_v2.megatron.qwen3_moe.trainer import Trainer

from . import checkpoint
from .data import Samples, train_batches, valid_batches
from .options import Options
from .progress import Progress
from .runtime import Runtime

T = TypeVar("T")

_STEPS_BEFORE_FIT = 5  # of sync-free mode's room for rows


class StopRequest:
    """While active, Ctrl-C and SIGTERM are remembered and do nothing else."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def train_until_done(
    options: Options, runtime: Runtime, trainer: Trainer, samples: Samples, progress: Progress | None
) -> str | None:
    """Train to the last step, or to the end of the step in which any rank received a signal.

    `progress` is None on all ranks but 0. Returns what stopped the run early.
    """
    recipe = options.recipe
    with StopRequest() as request:
        stopped, saved, captures = False, None, 0
        fits_at = trainer.step_number + _STEPS_BEFORE_FIT
        while trainer.step_number < recipe.steps and not stopped:
            started = time.perf_counter()
            batches = train_batches(samples, options, trainer.step_number, runtime.rank, runtime.world)
            step_once = functools.partial(trainer.step, batches, stop=request.received is not None)
            stats = _with_room(step_once, runtime, trainer)
            seconds = time.perf_counter() - started
            if trainer.graph and len(trainer.graph.captures) > captures:
                captures = len(trainer.graph.captures)
                taken = trainer.graph.captures[-1]
                runtime.say(
                    f"step {trainer.step_number}: captured in a CUDA graph, in {taken.seconds:.1f} s; it keeps "
                    f"{taken.pool_bytes / 2**20:.0f} MiB"
                )
            step, stopped = trainer.step_number, stats.stop
            step_tokens = recipe.global_batch_size * options.shape.seq_length
            if step == fits_at and (percents := sync_free.fit()):  # none but in sync-free mode
                runtime.say(
                    f"after step {step}: room for {percents[0]} % of an even share, by the rows that have arrived"
                )
            row: dict[str, Any] = {
                "step": step,
                "tokens": step * step_tokens,
                "loss": stats.loss,
                "grad_norm": stats.grad_norm,
                "lr": learning_rate(recipe, step),
                "seconds": seconds,
                "tokens_per_second": step_tokens / seconds,
                "expert_balance": stats.expert_balance,
                "overload_mean": stats.overload.mean().item(),
                "overload_max": stats.overload.max().item(),
            }
            if _due(step, options.eval_every, recipe.steps) and not stopped:
                row["val_loss"] = _with_room(
                    lambda: trainer.evaluate(valid_batches(samples, options, runtime.rank, runtime.world)),
                    runtime,
                    trainer,
                )
            if progress:
                progress.add(row)
                if options.record_load and step % options.record_load == 0:
                    progress.record_load(step, stats.expert_load)
            if options.save and (stopped or _due(step, options.save_interval, recipe.steps)):
                saved = checkpoint.save(options.save, trainer, samples, runtime)
        if not stopped:
            return None
        reason = request.received or "a signal to another rank"
        runtime.say(
            f"stopped by {reason} after step {trainer.step_number}: " + (f"saved {saved}" if saved else "no --save")
        )
        return reason


def _with_room(action: Callable[[], T], runtime: Runtime, trainer: Trainer) -> T:
    """What `action` returns. In sync-free mode it may find too little room for rows, on all ranks alike and before any
    weight has changed; then again, with more."""
    while True:
        try:
            return action()
        except LayoutOverflowError as error:
            grown = sync_free.grow()
            if not grown:
                raise
            runtime.say(
                f"after step {trainer.step_number}: {error.found}; again with room for {grown[0]} % of an even share"
            )


def _due(step: int, interval: int, last: int) -> bool:
    return step == last or (interval > 0 and step % interval == 0)
