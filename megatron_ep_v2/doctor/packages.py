"""What of DeepEP is installed, and which of it the settings use: functions of the facts that several checks use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_ep_v2.buffers.carriers import CARRIERS, DEFAULT_V2, MEGATRONS_OWN
from megatron_ep_v2.generations import (
    ALWAYS,
    GENERATIONS,
    PACKAGES,
    WITH_WHEELS,
    Generation,
    install_command,
    nccl_command,
    normalised,
    of_distribution,
)

Facts = dict[str, Any]


def packages(facts: Facts) -> list[Facts]:
    """The installed packages of DeepEP as `probe.Package` has them, each with its distribution as "name==version", and
    "failure" as {"how": in one line} or None. Where an import failed, the generation is that of the wheel, if known."""
    found = []
    for name in PACKAGES:
        if not facts[name]:
            continue
        wheel = facts["distributions"].get(name)
        package = {"name": name, "generation": None, "classes": [], "version": None, **facts[name], "wheel": wheel}
        if package["failure"]:
            package["generation"] = ALWAYS.get(name) or of_distribution((wheel or "").partition("==")[0])
        found.append(package)
    return found


def carriers(facts: Facts) -> list[str]:
    """The carriers that the installed packages have."""
    return list(facts["probe"].get("carriers", []))


def wanted_carrier(facts: Facts) -> str:
    """The carrier that the settings ask for or `buffer=auto` takes; without any, the one to install."""
    asked, here = facts["settings"]["buffer"], carriers(facts)
    return str(asked if asked in CARRIERS else here[0] if here else DEFAULT_V2)


def package_in_use(facts: Facts) -> Facts | None:
    """The package whose carrier is used; without one, that of the generation to install, or the only one."""
    kind = facts["probe"].get("choice")
    carrier = CARRIERS[MEGATRONS_OWN if kind == "megatron" else kind if kind in CARRIERS else wanted_carrier(facts)]
    if carrier.deep_ep_class is None and carriers(facts):
        carrier = CARRIERS[carriers(facts)[0]]
    installed = packages(facts)
    having = [package for package in installed if carrier.deep_ep_class in package["classes"]]
    like = [package for package in installed if package["generation"] == generation_to_install(facts)]
    return next(iter([*having, *like, *installed]), None)


def generation(facts: Facts) -> Generation:
    """The generation of DeepEP V2 that the checks judge: of the package in use; without one of V2, the one to
    install."""
    used = package_in_use(facts)
    row = GENERATIONS[used["generation"]] if used and used["generation"] else None
    return row if row and row.nccl else GENERATIONS[generation_to_install(facts)]


def generation_to_install(facts: Facts) -> str:
    """The generation to install for the settings: one that is on the package registry."""
    asked = CARRIERS.get(facts["settings"]["buffer"])
    if asked and asked.generation in WITH_WHEELS:
        return str(asked.generation)
    return str(CARRIERS[DEFAULT_V2].generation)


def replace_command(facts: Facts, generation: str) -> str:
    """The commands that install a generation instead of what is there of DeepEP, for the torch that is installed if
    there is a wheel for it."""
    command = install_command(generation, facts["torch"].get("version", ""))
    others = [package for package in packages(facts) if f" {distribution(package)}==" not in command]
    if nccl_differs({str(package["generation"]) for package in others} | {generation}) and "nccl" not in command:
        command += f" && {nccl_command(generation)}"  # the other one's is there
    names = " ".join(dict.fromkeys(map(distribution, others)))
    return f"pip uninstall -y {names} && {command}" if names else command


def nccl_differs(generations: Iterable[str]) -> bool:
    """Whether these generations need NCCL versions that exclude each other."""
    return len({row.nccl for name in generations if (row := GENERATIONS.get(name)) and row.nccl}) > 1


def distribution(package: Facts) -> str:
    """The name by which pip knows a package; where no metadata has it, its own."""
    return str((package["wheel"] or normalised(package["name"])).partition("==")[0])
