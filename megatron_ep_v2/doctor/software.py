"""Checks of what is installed: Python, settings, torch, NCCL, deep_ep, TransformerEngine, Megatron-Core."""

from __future__ import annotations

from pathlib import Path

from megatron_ep_v2 import versions
from megatron_ep_v2.buffers.carriers import CARRIERS, MEGATRONS_OWN
from megatron_ep_v2.doctor.check import Check, Checks, gpus, has_only_v1, version, wants_v2
from megatron_ep_v2.doctor.packages import (
    Facts,
    distribution,
    generation,
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
    same_series,
)

# Known errors of an import of DeepEP: a part of the text, the cause, the fix. In a fix {nccl} is the command that
# installs the NCCL of its generation, {wheel} the one that installs the wheel for this torch instead of it.
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
        f"install CUDA {versions.NVCC_25} or newer and set CUDA_HOME to it, or take the other generation: {{other}}",
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
# From this version on, the state of its queue pairs is laid out in another way, and the legacy Buffer waits for ever
# between hosts: DeepEP's issues 553 and 707. Its pull request 564 follows that, and is in few builds (issue 764).
_NVSHMEM_OF_ANOTHER_LAYOUT = (3, 5, 19)

checks = Checks()


@checks.add("Python")
def check_python(facts: Facts) -> Check:
    good = version(facts["python"]) >= version(versions.PYTHON)
    return Check("ok" if good else "fail", facts["python"], f"{versions.PYTHON} or newer", "use a newer interpreter")


@checks.add("settings")
def check_settings(facts: Facts) -> Check:
    settings = facts["settings"]
    if error := settings["error"]:
        return Check("fail", error["what"], error["needed"], error["fix"])
    return Check("ok", ", ".join(f"{name}={settings[name]}" for name in settings["sources"]) or "all defaults")


@checks.add("torch")
def check_torch(facts: Facts) -> Check:
    if failure := facts["torch"].get("failure"):
        return Check("fail", f"import: {failure['how']}", f"torch {versions.TORCH} or newer", "install it (again)")
    found = facts["torch"]["version"]
    if version(found) < version(versions.TORCH):
        return Check("fail", found, f"{versions.TORCH} or newer", "upgrade torch")
    status = "warn" if wants_v2(facts) and version(found) < version(versions.TORCH_DEEP_EP_V2) else "ok"
    return Check(status, found, f"{versions.TORCH_DEEP_EP_V2} or newer, says DeepEP V2", "upgrade torch")


@checks.add("NCCL", for_v2=True, imports=True)
def check_nccl(facts: Facts) -> Check:
    nccl, row = facts["probe"].get("nccl"), generation(facts)
    if not nccl or not nccl["loaded"]:
        return Check("skip", "no libnccl in the process that imported torch and DeepEP")
    loaded, headers = version(nccl["loaded"]), version(nccl["headers"])
    found = f"{nccl['loaded']} loaded, headers {nccl['headers']}, torch built with {facts['torch']['nccl']}"
    fix = f"{_get_nccl(facts)}; take others off LD_LIBRARY_PATH"
    if loaded < version(row.nccl):
        return Check("fail", found, f"{row.nccl} or newer loaded, for DeepEP {row.name}", fix)
    good = not row.nccl_as_built or loaded >= (2, 31) or headers in ((), loaded)
    needed = "headers of the same version, below 2.31: deep_ep and its kernels are compiled with them"
    return Check("ok" if good else "fail", found, needed, fix)


def _get_nccl(facts: Facts) -> str:
    """The command for the NCCL of the wheel that is installed; of another build, the one for wheel and NCCL."""
    used, row = package_in_use(facts), generation(facts)
    if used and any(name == distribution(used) for _, name, *_ in versions.WHEELS):
        return nccl_command(row.name)
    to_install = generation_to_install(facts)
    command = replace_command(facts, to_install)
    return command if "nccl" in command else f"{command} && {nccl_command(to_install)}"


@checks.add("one NCCL", imports=True)
def check_one_nccl(facts: Facts) -> Check:
    fix = f"{_get_nccl(facts)}; take others off LD_LIBRARY_PATH"
    return _one((facts["probe"].get("nccl") or {}).get("libraries"), "libnccl", fix)


@checks.add("one CUDA runtime", imports=True)
def check_one_cuda_runtime(facts: Facts) -> Check:
    return _one(facts["probe"].get("cuda_runtimes"), "libcudart", "install torch and DeepEP for one CUDA version")


def _one(libraries: list[str] | None, name: str, fix: str) -> Check:
    if not libraries:
        return Check("skip", f"no {name} in the process that imported torch and DeepEP")
    found = ", ".join("/".join(Path(library).parts[-3:]) for library in libraries)
    return Check("ok" if len(libraries) == 1 else "fail", found, f"one {name} in a process", fix)


@checks.add("deep_ep", imports=True)
def check_deep_ep(facts: Facts) -> Check:
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
        nccl=nccl_command(own), wheel=_wheel(facts, package, own, other), other=replace_command(facts, other)
    )


def _wheel(facts: Facts, package: Facts, own: str, other: str) -> str:
    command = replace_command(facts, own)
    if package["wheel"] is None or package["wheel"] not in command:
        return command
    torches = built_for(*package["wheel"].split("=="))
    if not any(same_series(each, facts["torch"]["version"]) for each in torches):
        return f"pip install torch=={torches[0]}; or, with this torch, {replace_command(facts, other)}"
    again = f"{nccl_command(own)}; if it still fails, report it with --json's output, and take the other generation: "
    return again + replace_command(facts, other)


@checks.add("NVSHMEM", imports=True)
def check_nvshmem(facts: Facts) -> Check:
    kind = facts["probe"].get("choice")
    found = [f"{name} {each}" for name, each in facts["packages"].items() if "nvshmem-cu" in name.replace("_", "-")]
    if kind not in ("megatron", MEGATRONS_OWN) or not found:
        return Check(
            "skip", "only the legacy Buffer uses it" if kind not in ("megatron", MEGATRONS_OWN) else "no wheel"
        )
    new = [each for each in found if version(each.split()[1]) >= _NVSHMEM_OF_ANOTHER_LAYOUT]
    if not new or not facts["rdma"]["devices"]:
        return Check("ok", ", ".join(found) + ("" if facts["rdma"]["devices"] else ", not used inside one host"))
    needed = f"older than {'.'.join(map(str, _NVSHMEM_OF_ANOTHER_LAYOUT))}, or a deep_ep that knows it (DeepEP's pull "
    needed += "request 564): else a dispatch between hosts times out"
    fix = f"DeepEP V2 does without it: {replace_command(facts, generation_to_install(facts))}"
    return Check("warn", ", ".join(new), needed, fix)


@checks.add("TransformerEngine", imports=True)
def check_transformer_engine(facts: Facts) -> Check:
    found = facts["transformer_engine"]
    if failure := found.get("failure"):
        fix = "install it again for this torch and CUDA, or uninstall it"
        return Check("fail", f"import: {failure['how']}", "one that imports, or none", fix)
    return Check("ok", found["version"]) if found["version"] else Check("skip", "not installed (optional)")


@checks.add("megatron-core", imports=True)
def check_megatron(facts: Facts) -> Check:
    found = facts["megatron"]
    if failure := found.get("failure"):
        needed = f"megatron-core {versions.MEGATRON_CORE}"
        return Check("fail", f"import: {failure['how']}", needed, "repair what it names")
    if error := found["error"]:
        what = f"{error['what']} ({error['found']})" if error["found"] else error["what"]
        return Check("fail", what, error["needed"], error["fix"])
    patched = found["patched_by"]
    text = (
        f"{found['version']}, symbols found, {'already patched by ' + ', '.join(patched) if patched else 'not patched'}"
    )
    if found["own_v2_backend"]:
        text += "; its own backend deepepv2 is there, which is not this package (that is deepep)"
    strangers = [owner for owner in patched if not owner.startswith("megatron_ep_v2")]
    needed, fix = "Megatron's own names, or ours", "let only one package replace the flex dispatcher"
    return Check("warn" if strangers else "ok", text, needed, fix)


@checks.add("experts", imports=True)
def check_experts(facts: Facts) -> Check:
    asked, devices = facts["settings"]["experts"], gpus(facts)
    unable = [device for device in devices if not (9,) <= version(device["sm"]) < (11,)]
    lacking = ""  # why torch's grouped GEMM, which deepgemm's experts need too, cannot run here
    if version(facts["torch"]["version"]) < version(versions.TORCH_GROUPED_GEMM):
        lacking = f"torch {facts['torch']['version']} has no grouped GEMM ({versions.TORCH_GROUPED_GEMM} has)"
    elif unable:
        lacking = f"torch has no grouped GEMM for {unable[0]['name']} (SM {unable[0]['sm']})"
    elif asked == "deepgemm" and not devices:
        lacking = "no GPU"
    elif asked == "deepgemm" and not facts["deep_gemm"]:
        lacking = "the package deep_gemm is not installed"
    if asked in ("grouped", "deepgemm") and lacking:
        more = " and deep_gemm" if asked == "deepgemm" else ""
        needed = f"a GPU of SM 9 or 10, torch {versions.TORCH_GROUPED_GEMM}{more}"
        return Check("fail", f"{asked}: {lacking}", needed, "unset MCORE_DEEPEP_V2_EXPERTS, or set it to sequential")
    if asked != "megatron":
        return Check("ok", asked)
    if lacking or not devices:
        return Check("ok", f"megatron; grouped: {lacking or 'GPUs of SM 9 or 10 gain from them'}")
    return Check(
        "ok", "megatron; grouped can run here (`bench --step` says what MCORE_DEEPEP_V2_EXPERTS=grouped gives)"
    )
