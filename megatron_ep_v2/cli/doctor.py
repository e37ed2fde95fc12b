"""`doctor [--json] [--ranks N]`: find out what is wrong here before a job does."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN
from megatron_ep_v2.cli import prog
from megatron_ep_v2.doctor import hardware, software
from megatron_ep_v2.doctor.check import Check, gin_off, gpus
from megatron_ep_v2.doctor.facts import gather
from megatron_ep_v2.doctor.packages import Facts
from megatron_ep_v2.doctor.trial import run_trial


def doctor(arguments: list[str]) -> int:
    """Run all checks and print a table; with --json, one document for issue reports.

    Run it as the job runs: in its folder, with its environment variables, on its machine.

    Returns:
        The exit status: 1 if a check failed, else 0.
    """
    parser = argparse.ArgumentParser(prog=f"{prog()} doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--ranks", type=int, metavar="N", help="also dispatch and combine on N processes of this host")
    options = parser.parse_args(arguments)

    facts = gather()
    checks = [check(facts) for check in (*software.checks, *hardware.checks)]
    if options.ranks:
        check, facts["trial"] = _try(options.ranks, facts, checks)
        checks.append(check)
    conclusion = _usable(facts, checks)
    if options.json:
        document = {
            "usable": conclusion,
            "checks": [{"name": check.name, **asdict(check)} for check in checks],
            "facts": facts,
        }
        print(json.dumps(document, indent=2))
    else:
        print(_table(checks), f"usable now: {conclusion}", sep="\n")
        for rank, found in facts.get("trial", {}).items():
            if "stderr" in found:
                print(f"----- rank {rank} of {options.ranks}\n{found['stderr']}", file=sys.stderr)
    return int(any(check.status == "fail" for check in checks))


def _try(ranks: int, facts: Facts, checks: list[Check]) -> tuple[Check, Facts]:
    failed, count = _failed(checks), len(gpus(facts))
    if failed:
        return Check("skip", f"not before this is fixed: {failed}", name="trial"), {}
    if ranks < 1 or 0 < count < ranks:
        fix = f"--ranks {count or 2}, or CUDA_VISIBLE_DEVICES= for processes on the CPU"
        return Check("fail", f"{ranks} ranks, {count} GPUs", "a GPU for each rank, or no GPU", fix, "trial"), {}
    return run_trial(ranks)


def _failed(checks: list[Check]) -> str:
    return ", ".join(check.name for check in checks if check.status == "fail")


def _usable(facts: Facts, checks: list[Check]) -> str:
    """The carrier after `install()` with the present settings, in words."""
    if failed := _failed(checks):
        return f"nothing, before this is fixed: {failed}"
    settings, kind, count = facts["settings"], facts["probe"].get("choice"), len(gpus(facts))
    if kind is None:
        return "nothing: install() says why"
    if kind == "megatron":
        return f"Megatron's own path on the {CARRIERS[MEGATRONS_OWN].label}, {count} GPUs of this host"
    carrier = CARRIERS[kind]
    compact = "expanded" not in carrier.layouts or settings["layout"] == "compact"
    if not carrier.needs_cuda:
        where = f"nccl ({count} GPUs of this host)" if count else "gloo (CPU)"
    else:
        compact = compact or not settings["allow_multiple_reduction"]
        where = f"{count} GPUs of this host"
        if carrier.is_v2 and not gin_off(facts) and not any(c.status == "warn" for c in checks if c.name == "RDMA"):
            where += " and between hosts"
    return f"{carrier.label} on {where}, {'compact' if compact else 'expanded'} layout"


def _table(checks: list[Check]) -> str:
    """Format aligned lines: status, name, found; below each problem, what is needed and how to fix it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        parts = (("needed", check.needed), ("fix", check.fix))
        lines += [f"{'':<{width + 8}}{name}: {text}" for name, text in parts if text]
    return "\n".join(lines)
