"""What a run shows while it trains: a progress bar, or lines where nobody watches, and metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ep_v2.balance.what_if import to_line

BAR = "{n_fmt}/{total_fmt} |{bar:16}| {elapsed}<{remaining}{postfix}"


class Progress:
    """Rank 0's view of the run.

    Each row of metrics.jsonl is one step: step, tokens, loss, grad_norm, lr, seconds, tokens_per_second, expert_balance
    (busiest expert over the mean, averaged over layers; 1 is even), overload_mean and overload_max (rows of the busiest
    rank over the mean, over layers and micro-batches; 1 is even), and val_loss where it was measured.
    """

    def __init__(self, metrics: Path, first_step: int, steps: int, log_every: int):
        self.steps, self.log_every = steps, log_every
        self.rows = _rows_until(metrics, first_step)
        self.val_loss: float | None = next((r["val_loss"] for r in reversed(self.rows) if "val_loss" in r), None)
        self._file = metrics.open("w", encoding="utf-8")
        for row in self.rows:
            self._write(row)
        self._loads = metrics.with_name("expert_load.jsonl")
        kept = _rows_until(self._loads, first_step)
        self._loads.unlink(missing_ok=True)
        if kept:
            self._loads.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, bar_format=BAR, dynamic_ncols=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write(row)
        self.val_loss = row.get("val_loss", self.val_loss)
        figures = (
            f"loss {row['loss']:.3f}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s"
            f"  busiest expert {row['expert_balance']:.2f}x  rank {row['overload_mean']:.2f}x"
        )
        if self.val_loss is not None:
            figures += f"  val {self.val_loss:.3f}"
        if self._bar:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update()
        elif row["step"] % self.log_every == 0 or "val_loss" in row:
            print(f"step {row['step']:>5}/{self.steps}  {figures}", file=sys.stderr, flush=True)

    def record_load(self, step: int, expert_load: torch.Tensor) -> None:
        """Add a line to expert_load.jsonl; see `megatron_ep_v2.balance.what_if`.

        Args:
            expert_load: [micro-batches, layers, ranks, experts of a rank].
        """
        with self._loads.open("a", encoding="utf-8") as file:
            file.write(to_line(step, expert_load))

    def close(self) -> None:
        if self._bar:
            self._bar.close()
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _rows_until(metrics: Path, step: int) -> list[dict[str, Any]]:
    """The rows of an earlier part of this run, without those after the checkpoint that it resumes from."""
    if step == 0 or not metrics.is_file():
        return []
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in rows if row["step"] <= step]
