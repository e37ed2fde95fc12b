"""Every stall many times, with the default limit: how often all reports named the right rank and call, and how many
seconds after the stall the slowest one was there. `python -m tests.helpers.stall_rounds --rounds 20`
takes half an hour.
"""

from __future__ import annotations

import argparse

from megatron_ep_v2.settings import Settings
from tests.helpers import stalls
from tests.helpers.harness import close_shared_pool, run_ranks
from tests.helpers.stalls import STALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=int, default=Settings().watchdog_secs, help="the limit")
    parser.add_argument("--stalls", nargs="*", choices=STALLS, default=list(STALLS))
    options = parser.parse_args()
    for name in options.stalls:
        outcomes = [stalls.run(name, options.seconds, options.seconds + 5.0) for _ in range(options.rounds)]
        faults = [outcome.faults(STALLS[name]) for outcome in outcomes]
        slowest = max(outcome.seconds[rank] for outcome in outcomes for rank in STALLS[name].reporters)
        named = sum(not each for each in faults)
        print(f"{name:<20} named {named} of {options.rounds}, slowest report after {slowest:.1f} s", flush=True)
        for each, outcome in zip(faults, outcomes):
            if each:
                print("\n".join([*each, *outcome.texts]), flush=True)
    answers = [run_ranks(stalls.RANKS, stalls.bring_another_capacity) for _ in range(options.rounds)]
    named = sum(not stalls.capacity_faults(each) for each in answers)
    slowest = max(seconds for each in answers for _, _, seconds in each)
    print(
        f"{'another capacity':<20} named {named} of {options.rounds}, slowest error after {slowest:.1f} s", flush=True
    )
    close_shared_pool()


if __name__ == "__main__":
    main()
