"""Checks of what is installed: Python, settings, torch, NCCL, deep_ep, TransformerEngine, Megatron-Core."""

from __future__ import annotations

from pathlib import Path

from megatron_ep_v2 import versions
from megatron_ep_v2.doctor.check import Check, Checks, generation, gpus, has_only_v1, version, wants_v2
from megatron_ep_v2.doctor.facts import Facts

_GET_NCCL = (
    f"pip install --no-deps 'nvidia-nccl-cu13>={versions.NCCL}' (cu12 for CUDA 12); take others off LD_LIBRARY_PATH"
)
_REBUILD = "build deep_ep again, in this environment"

# Known errors of `import deep_ep`: a part of the text, the cause, the fix.
_CAUSES = (
    ("ncclGetLsaDevicePointer", "the NCCL in the process is older than the one deep_ep was built with", _GET_NCCL),
    ("Duplicate NCCL runtime", "two libnccl in one process", _GET_NCCL),
    ("Invalid NCCL versions", "the libnccl in the process is not that of the nvidia-nccl package", _GET_NCCL),
    ("Cannot find package: nccl", "there is no nvidia-nccl package, and no EP_NCCL_ROOT_DIR", _GET_NCCL),
    ("No libnccl.so found", "EP_NCCL_ROOT_DIR has no lib/libnccl.so", "correct EP_NCCL_ROOT_DIR, or unset it"),
    ("libcuda.so", "there is no NVIDIA driver", "import deep_ep on a machine with GPUs only"),
    ("libnvshmem", "deep_ep's legacy half needs NVSHMEM", "pip install nvidia-nvshmem-cu13 (cu12 for CUDA 12)"),
    ("deep_ep._C", "deep_ep was built for another Python, or not built", _REBUILD),
    ("undefined symbol", "deep_ep was built for another torch or NCCL", _REBUILD),
    ("FileNotFoundError", "a file of NCCL or of the JIT is gone or was replaced", f"restart the job, or {_REBUILD}"),
    ("AssertionError", "no CUDA toolkit was found, or another of its own checks failed", "set CUDA_HOME"),
    ("the process", "Megatron-Core imports it too, and dies with it", _REBUILD),
)

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
    nccl = facts["deep_ep"].get("nccl")
    if not nccl or not nccl["loaded"]:
        return Check("skip", "no libnccl in the process that imported torch and deep_ep")
    loaded, headers = version(nccl["loaded"]), version(nccl["headers"])
    found = f"{nccl['loaded']} loaded, headers {nccl['headers']}, torch built with {facts['torch']['nccl']}"
    if loaded < version(versions.NCCL):
        return Check("fail", found, f"{versions.NCCL} or newer loaded", _GET_NCCL)
    good = loaded >= (2, 31) or headers in ((), loaded)
    needed = "headers of the same version, below 2.31: deep_ep and its kernels are compiled with them"
    return Check("ok" if good else "fail", found, needed, f"{_GET_NCCL}; then {_REBUILD}")


@checks.add("one NCCL", imports=True)
def check_one_nccl(facts: Facts) -> Check:
    return _one((facts["deep_ep"].get("nccl") or {}).get("libraries"), "libnccl", _GET_NCCL)


@checks.add("one CUDA runtime", imports=True)
def check_one_cuda_runtime(facts: Facts) -> Check:
    return _one(facts["deep_ep"].get("cuda_runtimes"), "libcudart", "install torch and deep_ep for one CUDA version")


def _one(libraries: list[str] | None, name: str, fix: str) -> Check:
    if not libraries:
        return Check("skip", f"no {name} in the process that imported torch and deep_ep")
    found = ", ".join("/".join(Path(library).parts[-3:]) for library in libraries)
    return Check("ok" if len(libraries) == 1 else "fail", found, f"one {name} in a process", fix)


@checks.add("deep_ep", imports=True)
def check_deep_ep(facts: Facts) -> Check:
    which, found = generation(facts), facts["deep_ep"]
    needed = f"deep_ep {versions.DEEP_EP_V2} or newer"
    fix = "build it in place of this one: an environment holds one deep_ep"
    if which == "none":
        return Check("fail" if wants_v2(facts) else "skip", "not installed", needed, "build it from its repository")
    if which == "broken":
        how = found["failure"]["how"]
        cause, fix = next((known[1:] for known in _CAUSES if known[0] in how), ("of unknown cause", _REBUILD))
        # Megatron-Core imports it as well, and goes on after an ImportError only.
        harmless = not wants_v2(facts) and how.startswith(("ImportError", "ModuleNotFoundError"))
        return Check("warn" if harmless else "fail", f"import: {how} ({cause})", needed, fix)
    what = {
        "V2 2.1": "V2, 2.1 or newer",
        "V2 2.0": "V2, older than 2.1 (its dispatch knows no do_zero_padding)",
        "hybrid-ep": "the branch hybrid-ep (HybridEPBuffer, no ElasticBuffer)",
        "V1": "V1 (no ElasticBuffer)",
    }[which]
    status = "ok"
    if gpus(facts) and which != "V2 2.1":
        status = "fail" if wants_v2(facts) else "warn" if has_only_v1(facts) else "ok"
    return Check(status, f"{found['version']}: by its API {what}", needed, fix)


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
