"""The class of a check, and functions of the facts that several checks use."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from megatron_ep_v2.buffers import gin
from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN
from megatron_ep_v2.doctor.packages import Facts, carriers, generation
from megatron_ep_v2.settings import NAMES, Settings


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        status: "ok"; "warn": works, but not everything or not well; "fail": cannot work; "skip": not relevant here.
        found: What was found.
        needed: What is needed.
        fix: What the reader can do about it.
        name: Name of the check.
    """

    status: str
    found: str
    needed: str | None = None
    fix: str | None = None
    name: str = ""


_Judge: TypeAlias = Callable[[Facts], Check]


class Checks(list[_Judge]):
    """Functions of the facts, in the table's order."""

    def add(self, name: str, *, for_v2: bool = False, imports: bool = False) -> Callable[[_Judge], _Judge]:
        """Decorator that registers a function as the check `name`.

        Args:
            for_v2: Skip the check unless DeepEP V2 is wanted.
            imports: Skip the check if torch cannot be imported.
        """

        def register(judge: _Judge) -> _Judge:
            def named(facts: Facts) -> Check:
                if imports and "failure" in facts["torch"]:
                    return Check("skip", "torch cannot be imported", name=name)
                if for_v2 and not wants_v2(facts):
                    return Check("skip", "only DeepEP V2 on GPUs needs it", name=name)
                check = replace(judge(facts), name=name)
                return check if check.status in ("warn", "fail") else replace(check, needed=None, fix=None)

            self.append(named)
            return judge

        return register


def gpus(facts: Facts) -> list[dict[str, str]]:
    """The GPUs that a job would use, with name and sm. Empty if CUDA_VISIBLE_DEVICES hides them all."""
    if facts["environment"].get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    return facts["torch"].get("devices") or facts["driver"]["gpus"]


def is_blackwell(facts: Facts) -> bool:
    """Whether there is a GPU of SM 10.0 or newer."""
    return any(version(device["sm"]) >= (10,) for device in gpus(facts))


def wants_v2(facts: Facts) -> bool:
    """Whether DeepEP V2 is wanted: there are GPUs, and the settings ask for V2, or for auto without only V1
    installed."""
    buffer = facts["settings"]["buffer"]
    v2 = buffer in CARRIERS and CARRIERS[buffer].is_v2
    return bool(gpus(facts)) and (v2 or (buffer == "auto" and not has_only_v1(facts)))


def has_only_v1(facts: Facts) -> bool:
    """Whether there is the legacy Buffer, and no class of V2."""
    here = carriers(facts)
    return MEGATRONS_OWN in here and not any(CARRIERS[name].is_v2 for name in here)


def gin_off(facts: Facts) -> str | None:
    """Reason why a buffer for the ranks of this host would be built without NCCL GIN; None = with it."""
    off, reason = gin.choose(asked(facts), vendors(facts), ["this host"], generation(facts))
    return reason if off else None


def asked(facts: Facts) -> Settings:
    """The settings of the environment."""
    return Settings(**{name: facts["settings"][name] for name in NAMES}, sources=facts["settings"]["sources"])


def vendors(facts: Facts) -> list[str]:
    """PCI vendor of each RDMA device, as `gin.rdma_vendors` has them."""
    return [device["vendor"] for device in facts["rdma"]["devices"]]


def version(text: str | None) -> tuple[int, ...]:
    """Leading numbers: "2.30.4+cuda13" -> (2, 30, 4); none -> ()."""
    leading = re.match(r"[\d.]*", text or "")
    return tuple(map(int, re.findall(r"\d+", leading[0] if leading else "")))
