"""The class of a check, and functions of the facts that several checks use."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN
from megatron_ep_v2.doctor.facts import Facts


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


def generation(facts: Facts) -> str:
    """The generation of deep_ep, detected by its API: "none", "broken", "V1", "hybrid-ep", "V2 2.0" or "V2 2.1"."""
    found = facts["deep_ep"]
    if failure := found.get("failure"):
        return "none" if "No module named 'deep_ep'" in failure["how"] else "broken"
    if "elastic" in found["carriers"]:
        return "V2 2.1" if found["zero_padding"] else "V2 2.0"
    return "hybrid-ep" if found["have_hybrid"] else "V1"


def wants_v2(facts: Facts) -> bool:
    """Whether DeepEP V2 is wanted: there are GPUs, and the settings ask for V2, or for auto without only V1
    installed."""
    asked = facts["settings"]["buffer"]
    v2 = asked in CARRIERS and CARRIERS[asked].is_v2
    return bool(gpus(facts)) and (v2 or (asked == "auto" and not has_only_v1(facts)))


def has_only_v1(facts: Facts) -> bool:
    """Whether deep_ep has the legacy Buffer and no ElasticBuffer."""
    return generation(facts) in ("V1", "hybrid-ep") and MEGATRONS_OWN in facts["deep_ep"]["carriers"]


def gin_off(facts: Facts) -> str | None:
    """Reason why a buffer on this host would be built without NCCL GIN (decided as in buffers.elastic); None = with
    it."""
    asked, source = facts["settings"]["gin"], facts["settings"]["sources"].get("gin")
    if asked != "auto":
        return f"gin=off by {source}" if asked == "off" else None
    if facts["environment"].get("EP_DISABLE_GIN", "0") not in ("", "0"):
        return "EP_DISABLE_GIN is set"
    return None if facts["rdma"]["devices"] else "no RDMA device"


def version(text: str | None) -> tuple[int, ...]:
    """Leading numbers: "2.30.4+cuda13" -> (2, 30, 4); none -> ()."""
    leading = re.match(r"[\d.]*", text or "")
    return tuple(map(int, re.findall(r"\d+", leading[0] if leading else "")))
