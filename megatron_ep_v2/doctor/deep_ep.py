"""The check of the installed packages of DeepEP: which one is taken and why, what is wrong with it. Its fix leads to a
wheel of the package registry, never back to the one that is installed and refused.
"""

from __future__ import annotations

from megatron_ep_v2 import versions
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.doctor.check import Check, gpus, has_only_v1, wants_v2
from megatron_ep_v2.doctor.packages import (
    Facts,
    distribution,
    generation_to_install,
    nccl_differs,
    package_in_use,
    packages,
    replace_command,
    wanted_carrier,
)
from megatron_ep_v2.generations import (
    GENERATIONS,
    PACKAGES,
    WITH_WHEELS,
    built_for,
    install_command,
    nccl_command,
    nvcc_command,
    same_series,
)

# Known errors of an import of DeepEP: a part of the text, the cause, the fix. In a fix {nccl} is the command that
# installs the NCCL of its generation, {nvcc} its compiler, {wheel} the one that installs the wheel for this torch
# instead of it.
_GET_NCCL = "{nccl}; take others off LD_LIBRARY_PATH"
_CAUSES = (
    ("ncclGetLsaDevicePointer", "the NCCL in the process is older than the one that it was built with", _GET_NCCL),
    ("Duplicate NCCL runtime", "two libnccl in one process", _GET_NCCL),
    ("Invalid NCCL versions", "the libnccl in the process is not that of the nvidia-nccl package", _GET_NCCL),
    ("Cannot find package: nccl", "there is no nvidia-nccl package, and no EP_NCCL_ROOT_DIR", _GET_NCCL),
    ("Cannot find NCCL", "there is no nvidia-nccl package, and no EP_NCCL_ROOT_DIR", _GET_NCCL),
    ("DeepEP 2.5 needs NCCL", "torch brings an older one", _GET_NCCL),
    ("NCCL headers are missing", "EP_NCCL_ROOT_DIR or NCCL_DIR has no include/nccl.h", "unset it; {nccl}"),
    ("No libnccl.so found", "EP_NCCL_ROOT_DIR has no lib/libnccl.so", "correct EP_NCCL_ROOT_DIR, or unset it"),
    (
        "needs nvcc",
        "it compiles its kernels at run time",
        f"{{nvcc}}, where CUDA_HOME is not set; or set it to CUDA {versions.NVCC_25} or newer, or take the other "
        "generation: {other}",
    ),
    ("This wheel requires CUDA", "it was built for another CUDA than torch", "{wheel}"),
    ("does not provide CUDA", "torch is its build for CPUs", "install torch's CUDA build"),
    ("does not expose a usable CUDA device", "no GPU can be used", "import it on a machine with GPUs only"),
    ("libcuda.so", "there is no NVIDIA driver", "import it on a machine with GPUs only"),
    ("libnvshmem", "deep_ep's legacy half needs NVSHMEM", "pip install nvidia-nvshmem-cu13 (cu12 for CUDA 12)"),
    ("deep_ep._C", "it was built for another Python, or its files are not complete", "{wheel}"),
    ("deep_ep_v25._C", "it was built for another Python, or its files are not complete", "{wheel}"),
    ("t.dim() == kNumDims", "it was built for another torch", "{wheel}"),
    ("undefined symbol", "it was built for another torch or NCCL", "{wheel}"),
    ("FileNotFoundError", "a file of NCCL or of the JIT is gone or was replaced", "restart the job; else {wheel}"),
    ("AssertionError", "no CUDA toolkit was found, or another of its own checks failed", "set CUDA_HOME"),
    ("the process", "whatever imports it dies with it", "{wheel}"),
)


def judge(facts: Facts) -> Check:
    """All packages of DeepEP: the fault of the one in use first, then what the others do to it."""
    used = package_in_use(facts)
    if used is None:
        fix = install_command(generation_to_install(facts), facts["torch"]["version"])
        return Check("fail" if wants_v2(facts) else "skip", "not installed", _needed(facts), fix)
    found = "; ".join(_describe(facts, package, package is used) for package in _used_first(facts, used))
    judged = (_judge_used(facts, used), _judge_others(facts, used))
    status, needed, fix = max(judged, key=lambda each: ("ok", "warn", "fail").index(each[0]))
    return Check(status, found, needed, fix)


def _needed(facts: Facts) -> str:
    """What the carrier that the settings ask for needs, or those that `buffer=auto` prefers."""
    asked = CARRIERS.get(facts["settings"]["buffer"])
    wanted = [asked] if asked and asked.needs_cuda else [carrier for carrier in CARRIERS.values() if carrier.is_v2]
    return " or ".join(carrier.requirement for carrier in wanted)


def _used_first(facts: Facts, used: Facts) -> list[Facts]:
    return [used, *(package for package in packages(facts) if package != used)]


def _describe(facts: Facts, package: Facts, used: bool) -> str:
    wheel = f" ({package['wheel']})" if package["wheel"] else ""
    if package["failure"]:
        how = package["failure"]["how"]
        return f"{package['name']}{wheel}: import: {how} ({_cause(how)[0]})"
    row = GENERATIONS.get(package["generation"])
    what = f"DeepEP {row.name}, by its API ({row.api})" if row else "no known buffer"
    several = used and gpus(facts) and facts["probe"].get("choice") and len(packages(facts)) > 1
    taken = f", taken: {_why(facts)}" if several else ""
    return f"{package['name']} {package['version']}{wheel}: {what}{taken}"


def _why(facts: Facts) -> str:
    if facts["probe"].get("choice") == "megatron":
        return "Megatron's own path, because none of V2 can be imported"
    asked, source = facts["settings"]["buffer"], facts["settings"]["sources"].get("buffer")
    return f"buffer={asked} by {source}" if source and asked != "auto" else CARRIERS[wanted_carrier(facts)].advantage


def _cause(how: str) -> tuple[str, str]:
    """Cause and fix of a failed import."""
    return next((known[1:] for known in _CAUSES if known[0] in how), ("of unknown cause", "{wheel}"))


def _judge_used(facts: Facts, used: Facts) -> tuple[str, str, str]:
    """`(status, needed, fix)` of the package in use."""
    asked = CARRIERS[wanted_carrier(facts)]
    if used["failure"]:
        status, fix = "fail" if wants_v2(facts) else _harm(used), _repair(facts, used)
        nccl, excluding = "nccl" in _cause(used["failure"]["how"])[1], _excluding(facts, used)
        return status, _needed(facts), _keep(facts, used, excluding[0]) if nccl and excluding else fix
    wheel, torch = (used["wheel"] or "==").split("=="), facts["torch"]["version"]
    row, torches = GENERATIONS.get(used["generation"]), built_for(wheel[0], wheel[1])
    if gpus(facts) and asked.deep_ep_class and asked.deep_ep_class not in used["classes"]:
        instead = "unset MCORE_DEEPEP_V2_BUFFER; or " if facts["probe"].get("carriers") else ""
        return "fail", asked.requirement, f"{instead}{replace_command(facts, generation_to_install(facts))}"
    if gpus(facts) and (row is None or row.name not in WITH_WHEELS):
        status = "fail" if wants_v2(facts) else "warn" if has_only_v1(facts) else "ok"
        to_install = generation_to_install(facts)
        return status, f"DeepEP {to_install}, to train on DeepEP V2", replace_command(facts, to_install)
    if gpus(facts) and torches and not any(same_series(each, torch) for each in torches):
        # A call of 2.5 then fails (t.dim() == kNumDims); of 2.1 another wheel is known to work, no more.
        needed = f"torch {' or '.join(torches)}, which this wheel was built for; torch is {torch}"
        return "warn" if row and row.nccl_as_built else "fail", needed, _repair(facts, used)
    return "ok", "", ""


def _judge_others(facts: Facts, used: Facts) -> tuple[str, str, str]:
    """`(status, needed, fix)` of the packages next to the one in use: broken, or in need of another NCCL."""
    others = [package for package in packages(facts) if package != used]
    broken, excluding = [package for package in others if package["failure"]], _excluding(facts, used)
    status = max([_harm(each) for each in broken] or ["warn"], key=("warn", "fail").index)
    if excluding:
        names = (str(used["generation"]), str(excluding[0]["generation"]))
        wanted = ", ".join(f"{name}: {nccl_command(name).rpartition(' ')[2]}" for name in names)
        needed = f"one generation: the NCCL versions of their wheels exclude each other ({wanted})"
        return status, needed, _keep(facts, used, excluding[0])
    if broken:
        fix = f"pip uninstall -y {distribution(broken[0])}, which is not used; or {_repair(facts, broken[0])}"
        return status, "packages of DeepEP that can be imported", fix
    return "ok", "", ""


def _excluding(facts: Facts, used: Facts) -> list[Facts]:
    """The packages that need another NCCL than the one in use."""
    others = [package for package in packages(facts) if package != used]
    return [each for each in others if nccl_differs([str(used["generation"]), str(each["generation"])])]


def _keep(facts: Facts, used: Facts, other: Facts) -> str:
    """The fix of two packages that exclude each other."""

    def commands(keep: Facts, leave: Facts) -> str:
        return f"pip uninstall -y {distribution(leave)} && {nccl_command(str(keep['generation']))}"

    return f"{commands(used, other)}; or, to take the other one: {commands(other, used)}"


def _harm(package: Facts) -> str:
    """The status of a package that fails and is not needed. Megatron-Core imports deep_ep as well, and goes on after an
    ImportError only; what is no error that the probe expects ends `install()`."""
    how = package["failure"]["how"]
    caught = how.startswith(("ImportError", "ModuleNotFoundError"))
    return "warn" if caught or (package["name"] != PACKAGES[0] and "stderr" not in package["failure"]) else "fail"


def _repair(facts: Facts, package: Facts) -> str:
    """The fix of a package that is broken, or that was built for another torch. Never the wheel that is installed."""
    how = package["failure"]["how"] if package["failure"] else ""
    fix = _cause(how)[1] if how else "{wheel}"
    own = package["generation"] if package["generation"] in WITH_WHEELS else generation_to_install(facts)
    other = next(name for name in WITH_WHEELS if name != own)
    return fix.format(
        nccl=nccl_command(own),
        nvcc=nvcc_command(own),
        wheel=_wheel(facts, package, own, other),
        other=replace_command(facts, other),
    )


def _wheel(facts: Facts, package: Facts, own: str, other: str) -> str:
    command = replace_command(facts, own)
    if package["wheel"] not in command.split():
        return command
    torches = built_for(*package["wheel"].split("=="))
    if not any(same_series(each, facts["torch"]["version"]) for each in torches):
        return f"pip install torch=={torches[0]}; or, with this torch, {replace_command(facts, other)}"
    again = f"{nccl_command(own)}; if it still fails, report it with --json's output, and take the other generation: "
    return again + replace_command(facts, other)
