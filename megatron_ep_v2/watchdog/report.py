"""The text of a report: from the answers of all watchers to the names of the late ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from megatron_ep_v2.watchdog.call_log import KINDS

STACK_FRAMES = 12
WARM_UP = 4  # first calls: deep_ep compiles kernels in them


class Answer(TypedDict):
    """What a watcher answers about its rank, sent as JSON.

    Attributes:
        rank: In the world.
        host: The rank's host.
        entered: Number of its last call.
        pending: Number of its first call that has not finished; 0 = none.
        calls: [number, kind, step, moe_call, tokens] of the last ones.
        idle: Seconds since the call log changed.
        end: How the rank ended; "" = it lives.
        stopped: Whether a signal or a debugger has stopped it.
    """

    rank: int
    host: str
    entered: int
    pending: int
    calls: list[list[int]]
    idle: float
    end: str
    stopped: bool


def find_late(answers: Mapping[int, Answer], ranks: Sequence[int], number: int) -> dict[int, str]:
    """The ranks that call `number` of the asking rank waits for: rank -> why."""
    late = {rank: "does not answer: its host is down or has no watcher" for rank in ranks if rank not in answers}
    odd = _find_odd(answers)
    return late | (odd or {rank: "has not arrived" for rank, answer in answers.items() if answer["entered"] < number})


def _find_odd(answers: Mapping[int, Answer]) -> dict[int, str]:
    """The ranks in the minority at the first call that differs between ranks: rank -> why."""
    calls = {rank: {call[0]: tuple(call[1:4]) for call in answer["calls"]} for rank, answer in answers.items()}
    for number in sorted(set().union(*calls.values())):
        here = {rank: by_number[number] for rank, by_number in calls.items() if number in by_number}
        usual = Counter(here.values()).most_common(1)[0][0]
        odd = {rank: call for rank, call in here.items() if call != usual}
        if odd:
            others = _describe([number, *usual])
            return {
                rank: f"diverged: its call {number} is {_describe([number, *call])}, elsewhere {others}"
                for rank, call in odd.items()
            }
    return {}


def write_report(
    rank: int,
    what: str,
    number: int,
    answers: Mapping[int, Answer],
    late: Mapping[int, str],
    stacks: Mapping[int, str],
) -> list[str]:
    """Lines of a report: the call that waits, the late ranks and what they do, the other ranks, the late ranks'
    stacks."""
    own = answers[rank]
    call = next(call for call in own["calls"] if call[0] == number)
    late = late or {other: "is gone" for other, answer in answers.items() if answer["end"]}
    lines = [f"rank {rank}: {KINDS[call[1]]} {what} ({_where(call)}, {call[4]} tokens)"]
    for other, why in sorted(late.items()):
        host = answers[other]["host"] if other in answers else own["host"]
        name = f"rank {other}" if host == own["host"] else f"rank {other} on {host}"
        lines.append(f"  {name} {why}" + (f"; {_state(answers[other], True)}" if other in answers else ""))
    if not late:
        hint = "; or deep_ep is compiling, as it does in the first calls" if number <= WARM_UP else ""
        lines.append(f"  all ranks have entered it: some GPU is busy with earlier work, or the network is late{hint}")
    states: dict[str, list[int]] = {}
    for other in sorted(set(answers) - set(late)):
        states.setdefault(_state(answers[other], False), []).append(other)
    for state, them in states.items():
        lines.append(f"  {'ranks' if len(them) > 1 else 'rank'} {', '.join(map(str, them))}: {state}")
    for other, stack in stacks.items():
        lines += [
            f"  rank {other}'s stack, newest call first:",
            *(f"    {line.strip()}" for line in stack.splitlines()),
        ]
    return lines


def choose_threads(text: str, *threads: int) -> str:
    """Select the newest frames of these threads from faulthandler's text, and of threads that Python's threading did
    not start: autograd runs a backward on the GPU in its own threads."""
    chosen = []
    for block in text.split("\n\n"):
        found = re.search(r"hread 0x([0-9a-f]+)", block)
        if found and (int(found[1], 16) in threads or not re.search(r'threading\.py", line \d+ in _bootstrap', block)):
            frames = [line for line in block.splitlines() if line.startswith("  ")]
            chosen += [*frames[:STACK_FRAMES], *(["..."] if len(frames) > STACK_FRAMES else []), "--"]
    return "\n".join(chosen[:-1]) or "none was written"


def _state(answer: Answer, in_full: bool) -> str:
    """The call that a rank is in, or its last one. in_full: With duration and tokens."""
    number = answer["pending"] or answer["entered"]
    call = next((call for call in answer["calls"] if call[0] == number), None)
    if call is None:
        state = "before its first call"
    else:
        tokens = f", {call[4]} tokens" if in_full else ""
        state = f"{'in' if answer['pending'] else 'after'} {KINDS[call[1]]} ({_where(call)}{tokens})"
    since = f"for {answer['idle']:.0f} s " if in_full and not answer["end"] else ""
    end = f", then {answer['end']}" if answer["end"] else ", stopped by a signal" if answer["stopped"] else ""
    return f"{since}{state}{end}"


def _where(call: Sequence[int]) -> str:
    return f"step {call[2]}, MoE call {call[3]}"


def _describe(call: Sequence[int]) -> str:
    return f"{KINDS[call[1]]} ({_where(call)})"
