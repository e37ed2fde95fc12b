"""The capacity of a buffer: the most tokens that a rank may dispatch, from Megatron's configuration where it says so.

Does not import Megatron; reads only modules that are imported already.

These options change the size of a micro-batch (megatron-core 0.16.1 and 0.19.2): `--micro-batch-size`, and for
evaluations `--eval-micro-batch-size`. `--rampup-batch-size`, `--step-batch-size-schedule` and
`--decrease-batch-size-if-needed` change only their number in a step. Evaluations have the sequence length of training;
the decoder of a model with an encoder has `--decoder-seq-length`. With `--hybrid-context-parallel` a rank has up to
`--max-seqlen-per-dp-cp-rank` tokens, whatever the context parallel size is.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from megatron_ep_v2.buffers.checks import CAPACITY_VARIABLE
from megatron_ep_v2.errors import TokenCapacityError
from megatron_ep_v2.settings import Settings, is_first_rank

logger = logging.getLogger("megatron_ep_v2")

_OBSERVED = "the most tokens of any rank at its first dispatch"
_warned = False


@dataclass(frozen=True)
class Expected:
    """The expected size of a rank's dispatches.

    Attributes:
        tokens: Most tokens; 0 = unknown.
        source: Where that number comes from.
        varies: Batches have any length (`variable_seq_lengths`, or rollouts), so `tokens` may be exceeded.
    """

    tokens: int = 0
    source: str = ""
    varies: bool = False


# Process group -> configurations of the live models, by id(): they are not hashable.
_models: weakref.WeakKeyDictionary[ProcessGroup, weakref.WeakValueDictionary[int, Any]] = weakref.WeakKeyDictionary()


def note_model(group: ProcessGroup, config: Any) -> None:
    """Remember the configuration of a model.

    Args:
        group: Process group of its experts.
        config: Megatron's TransformerConfig, or what a framework has derived from it. Megatron-Bridge's providers have
            a `seq_length`; Megatron's own has none.
    """
    _models.setdefault(group, weakref.WeakValueDictionary())[id(config)] = config


def expected(group: ProcessGroup) -> Expected:
    """The most tokens of one rank: from Megatron-LM's arguments; outside its training loop from the model's own
    `seq_length` and the micro-batch size of Megatron's `num_microbatches_calculator`.

    The `seq_length` of a model with batches of any length is ignored: it is the longest that the positions allow
    (Megatron-Bridge takes it from Hugging Face's `max_position_embeddings`), which would make buffers far too large.

    Args:
        group: Process group of the experts.
    """
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    models = list(_models.get(group, {}).values())
    varies = any(getattr(config, "variable_seq_lengths", False) for config in [args, *models])
    varies = varies or bool(getattr(args, "perform_rl_step", False))
    tokens = 0 if args is None else _of_arguments(args)
    if tokens:
        return Expected(tokens, "Megatron's sequence length and micro-batch size", varies)
    tokens = 0 if varies else max((_of_model(config) for config in models), default=0)
    return Expected(tokens, "the model's seq_length and the micro-batch size", varies)


def _of_arguments(args: Any) -> int:
    sequence = max(getattr(args, "seq_length", None) or 0, getattr(args, "decoder_seq_length", None) or 0)
    batch = max(getattr(args, "micro_batch_size", None) or 0, getattr(args, "eval_micro_batch_size", None) or 0)
    return _tokens_of_rank(args, sequence, batch)


def _of_model(config: Any) -> int:
    module = sys.modules.get("megatron.core.num_microbatches_calculator")
    calculator = getattr(module, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    batch = getattr(calculator, "micro_batch_size", None) or 0
    return _tokens_of_rank(config, getattr(config, "seq_length", None) or 0, batch)


def _tokens_of_rank(config: Any, sequence: int, batch: int) -> int:
    """Tokens of one rank in `batch` sequences, split by context and sequence parallelism; 0 = unknown.

    Args:
        config: Megatron's arguments or TransformerConfig.
        sequence: Tokens; 0 = unknown.
        batch: Sequences; 0 = unknown.
    """
    if not sequence or not batch:
        return 0
    in_tensor_parallel = config.tensor_model_parallel_size if config.sequence_parallel else 1
    tokens = -(-sequence // (config.context_parallel_size * in_tensor_parallel)) * batch
    if getattr(config, "hybrid_context_parallel", False):
        tokens = max(tokens, -(-(getattr(config, "max_seqlen_per_dp_cp_rank", None) or 0) // in_tensor_parallel))
    return tokens


def check_stated(group: ProcessGroup, num_tokens: int, settings: Settings) -> None:
    """Raise TokenCapacityError if the setting is below this rank's tokens."""
    if 0 < settings.num_max_tokens_per_rank < num_tokens:
        raise TokenCapacityError(
            f"rank {group.rank()} has {num_tokens} tokens to dispatch, more than the setting num_max_tokens_per_rank",
            found=f"num_max_tokens_per_rank={settings.describe()['num_max_tokens_per_rank']}",
            fix=f"set {CAPACITY_VARIABLE}={num_tokens} or more (the same on every rank)",
        )


def choose_capacity(
    settings: Settings, tokens: Sequence[tuple[int, Expected]], observed: bool
) -> tuple[int, str, bool]:
    """Choose the capacity of a buffer. Equal arguments on every rank give an equal capacity.

    A capacity that a later batch may exceed is logged, with its cost and how to avoid it.

    Args:
        settings: The settings in force.
        tokens: For each rank of the group: its tokens, and what is expected.
        observed: Those tokens are the size of one batch.

    Returns:
        `(capacity, its source, whether the buffer may grow)`.
    """
    if settings.num_max_tokens_per_rank:
        return settings.num_max_tokens_per_rank, settings.source("num_max_tokens_per_rank"), False
    most = max(num_tokens for num_tokens, _ in tokens)
    likely = max((each for _, each in tokens), key=lambda each: each.tokens)
    capacity = max(1, most, likely.tokens)
    if likely.tokens >= most:
        source = likely.source
    else:
        source = _OBSERVED if observed else "the most tokens that a rank states for its calls"
    exceeded = observed and (source == _OBSERVED or any(each.varies for _, each in tokens))
    if exceeded:
        global _warned
        logger.log(
            logging.WARNING if is_first_rank() and not _warned else logging.INFO,
            "num_max_tokens_per_rank=%d is %s, and a later batch may have more tokens. %s. To avoid that, set %s to "
            "the most that a rank will dispatch (the same on every rank)",
            capacity,
            source,
            "Then the rank that has it raises, because sync-free dispatches do not wait for the other ranks"
            if settings.sync_free
            else "Then all ranks build a larger buffer, which takes seconds; and each forward dispatch begins with an "
            "all-reduce of two numbers, for which the host waits, to find out",
            CAPACITY_VARIABLE,
        )
        _warned = True  # once, also where groups are created repeatedly
    return capacity, source, exceeded and not settings.sync_free
