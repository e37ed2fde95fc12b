"""Checks of what is installed: Python, settings, torch, NCCL, deep_ep, TransformerEngine, Megatron-Core."""

from __future__ import annotations

from pathlib import Path

from megatron_ep_v2 import versions
from megatron_ep_v2.buffers.carriers import MEGATRONS_OWN
from megatron_ep_v2.doctor import deep_ep
from megatron_ep_v2.doctor.check import Check, Checks, gpus, version, wants_v2
from megatron_ep_v2.doctor.packages import (
    Facts,
    distribution,
    generation,
    generation_to_install,
    package_in_use,
    replace_command,
)
from megatron_ep_v2.generations import nccl_command

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
    return deep_ep.judge(facts)


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
    if not found["version"]:
        return Check("skip", "not installed (optional)")
    libraries = found["cudnn"]
    if len(libraries) < 2:
        return Check("ok", found["version"])
    # It looks in CUDNN_HOME and on the system before it takes torch's wheel (its common/__init__.py).
    wheel = next((Path(library).parents[1] for library in libraries if "site-packages" in library), None)
    return Check(
        "warn",
        f"{found['version']}; two cuDNN: " + ", ".join("/".join(Path(library).parts[-3:]) for library in libraries),
        "torch's cuDNN alone: with another next to it, the fused attention fails, and one that takes several times as "
        "long runs without a message",
        f"export CUDNN_HOME={wheel}" if wheel else "export CUDNN_HOME=the folder of torch's cuDNN, above its lib",
    )


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
