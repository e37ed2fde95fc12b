"""Checks of the machine: driver, GPUs, NVLink, the JIT's compiler and cache, RDMA; and known-bad combinations."""

from __future__ import annotations

import re

from megatron_ep_v2.buffers import gin
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.buffers.gin import AMAZON, MELLANOX
from megatron_ep_v2.doctor.check import (
    Check,
    Checks,
    asked,
    gin_off,
    gpus,
    is_blackwell,
    vendors,
    version,
    wants_v2,
)
from megatron_ep_v2.doctor.packages import (
    Facts,
    distribution,
    generation,
    generation_to_install,
    package_in_use,
    replace_command,
)
from megatron_ep_v2.generations import GENERATIONS, PACKAGES, WITH_WHEELS, nvcc_command, of_distribution

# On these, a rank whose rename comes second may not see the first one's kernel (DeepEP's issue 683).
_NETWORK = re.compile(r"nfs.*|lustre|gpfs|beegfs.*|cifs|smb3?|fuse\..+|9p|ceph|afs|wekafs|panfs")
_ZERO_PADDING_NVCC = "13.1"  # older ones do not compile 2.1's zero padding for SM 10.0
_ROOM_GIB = 1.0  # a kernel takes well under 1 MiB, a training run some tens of them

# Types of GIN on EFA, and what they need: doc/gin-getting-started.md of aws-ofi-nccl, and its issue 1369.
_PROXY, _EFA_GDA = "2", "5"
_GDA_NCCL, _GDA_DRIVER, _GDRCOPY = "2.31.2", "3.3.0", "2.5"
_TAKE_THE_PROXY = f"NCCL_GIN_TYPE={_PROXY}, or unset it (docs/efa.md)"

checks = Checks()


@checks.add("CUDA")
def check_cuda(facts: Facts) -> Check:
    driver, torch = facts["driver"], facts["torch"]
    if not gpus(facts):
        found = f"{len(driver['gpus'])} GPUs, hidden by CUDA_VISIBLE_DEVICES" if driver["gpus"] else "no GPU"
        carrier = CARRIERS.get(facts["settings"]["buffer"])
        if carrier and carrier.needs_cuda:
            fix = "run on a machine with GPUs, or unset MCORE_DEEPEP_V2_BUFFER"
            return Check("fail", found, f"a GPU for the {carrier.label}", fix)
        return Check("skip", found)
    found = f"driver {driver['version']} (CUDA {driver['cuda']}), torch for CUDA {torch.get('cuda')}"
    if "failure" in torch:
        return Check("skip", found)
    if torch["cuda"] is None:
        return Check(
            "fail", f"{len(driver['gpus'])} GPUs, torch without CUDA", "torch's CUDA build", "install that one"
        )
    reason = "" if torch["devices"] else f": {torch['warning'] or 'torch.cuda.is_available() is False'}"
    fix = "upgrade the driver, or install torch for the driver's CUDA"
    return Check("fail" if reason else "ok", found + reason, f"a driver for CUDA {torch['cuda']}", fix)


@checks.add("GPUs")
def check_gpus(facts: Facts) -> Check:
    devices = gpus(facts)
    if not devices:
        return Check("skip", "no GPU")
    kinds = sorted({f"{device['name']}, SM {device['sm']}" for device in devices})
    good = min(version(device["sm"]) for device in devices) >= (9,)
    fix = "use Hopper or newer, or MCORE_DEEPEP_V2_BUFFER=reference"
    found = f"{len(devices)} x {'; '.join(kinds)}"
    return Check("ok" if good else "fail" if wants_v2(facts) else "warn", found, "SM 9.0 or newer", fix)


@checks.add("NVLink")
def check_nvlink(facts: Facts) -> Check:
    links = facts["links"]
    if len(gpus(facts)) < 2 or len(links) < 2:
        return Check("skip", "fewer than two GPUs" if len(gpus(facts)) < 2 else "nvidia-smi topo -m does not show it")
    pairs = {f"GPU{j}-GPU{i}": links[i][j] for i in range(len(links)) for j in range(i)}
    without = [f"{pair} {link}" for pair, link in pairs.items() if not link.startswith("NV")]
    if not without:
        return Check("ok", f"{'/'.join(sorted(set(pairs.values())))} between all {len(pairs)} pairs of GPUs")
    found = f"{len(without)} of {len(pairs)} pairs without: {', '.join(without[:4])}"
    fix = "keep expert parallelism to GPUs that NVLink connects (CUDA_VISIBLE_DEVICES)"
    return Check("fail" if wants_v2(facts) else "warn", found, "NVLink between the GPUs of a host", fix)


@checks.add("nvcc", for_v2=True)
def check_nvcc(facts: Facts) -> Check:
    toolkit, driver, row = facts["toolkit"], version(facts["driver"]["cuda"]), generation(facts)
    readable = toolkit["readable"]
    found = f"{toolkit['version']} at {toolkit['nvcc']}"
    if row.cuobjdump_below and not readable:
        found += f", cuobjdump {toolkit['cuobjdump']}" if toolkit["cuobjdump"] else ", no cuobjdump next to it"
    elif toolkit["by_us"]:
        found += ", which this package names in CUDA_HOME"
        used = package_in_use(facts)
        if used is not None and used["name"] == PACKAGES[0]:  # which Megatron imports
            found += ": call install(), or import megatron_ep_v2.auto, before Megatron is imported"
    least, most = row.nvcc_blackwell if is_blackwell(facts) else row.nvcc, driver[0] if driver else 99
    cuobjdump = f", with a cuobjdump below {row.cuobjdump_below}" if row.cuobjdump_below else ""
    needed = f"CUDA {least} or newer{cuobjdump}: DeepEP {row.name} compiles at "
    needed += "run time" + (f"; at most CUDA {most} for this driver" if driver else "")
    good = readable and version(least) <= version(toolkit["version"]) < (most + 1,)
    named = [name for name in ("CUDA_HOME", "CUDA_PATH") if facts["environment"].get(name) and not toolkit["by_us"]]
    wheels = "".join(f"unset {name}, and " for name in named[:1]) + nvcc_command(row.name)
    return Check("ok" if good else "fail", found, needed, f"{wheels}; or set CUDA_HOME to a toolkit that has it")


@checks.add("JIT cache", for_v2=True)
def check_cache(facts: Facts) -> Check:
    cache, row = facts["toolkit"]["cache"], generation(facts)
    found = f"{cache['path']}: {cache['error'] or str(cache['free_gib']) + ' GiB free'}"
    fix = "set EP_JIT_CACHE_DIR to a folder with room that every rank can write to"
    if cache["error"] or cache["free_gib"] < _ROOM_GIB:
        return Check("fail" if cache["error"] else "warn", found, f"a folder to write to, {_ROOM_GIB:g} GiB free", fix)
    if _NETWORK.fullmatch(cache["file_system"] or "") and not row.cache_may_be_shared:
        needed = f"a local folder: where two hosts compile the same kernel, one of them may fail with DeepEP {row.name}"
        fix = "set EP_JIT_CACHE_DIR to a local folder, the same on every host"
        return Check("warn", f"{found}, on {cache['file_system']}", needed, fix)
    return Check("ok", found)


@checks.add("RDMA", for_v2=True)
def check_rdma(facts: Facts) -> Check:
    devices, variable = facts["rdma"]["devices"], generation(facts).nic_variable
    nic = facts["environment"].get(variable or "", "mlx5_0")
    if not devices:
        return Check("skip", "no device: expert parallelism inside one host only")
    active = [device["name"] for device in devices if any(port["state"] == "ACTIVE" for port in device["ports"])]
    found = f"{len(active)} of {len(devices)} devices active ({', '.join(active[:8]) or 'none'})"
    if not active:
        fix = "bring the ports up; or, on one host, MCORE_DEEPEP_V2_GIN=off"
        return Check("warn" if gin_off(facts) else "fail", found, "an active port, for NCCL GIN", fix)
    lacking = [] if facts["rdma"]["ibstat"] else ["no ibstat on PATH"]
    lacking += [] if nic in [device["name"] for device in devices] else [f"no device {nic}"]
    if lacking and not facts["settings"]["num_sms"]:
        needed = f"ibstat and {nic}{f' ({variable})' if variable else ''}: else, between hosts, ZeroDivisionError in "
        needed += "get_theoretical_num_sms"
        fix = "install infiniband-diags" + (f" and set {variable}" if variable else "")
        fix += ", or set MCORE_DEEPEP_V2_NUM_SMS (e.g. 24)"
        return Check("warn", f"{found}; {', '.join(lacking)}", needed, fix)
    return Check("ok", found)


@checks.add("NCCL GIN", for_v2=True)
def check_gin(facts: Facts) -> Check:
    devices, library = facts["rdma"]["devices"], facts["fabric"].get("mlx5")
    if off := gin_off(facts):
        return Check("ok", f"off: {off}")
    if not devices:
        needed = "an RDMA device: else DeepEP V2 asserts that NCCL GIN is unavailable"
        return Check("fail", "on by MCORE_DEEPEP_V2_GIN, no RDMA device", needed, "MCORE_DEEPEP_V2_GIN=auto")
    if any(device["vendor"] == MELLANOX for device in devices) and version(library) < (1, 25):
        found = f"on; libmlx5 has {'symbols up to MLX5_' + library if library else 'not been found'}"
        fix = "install a newer OFED or rdma-core; or, on one host, MCORE_DEEPEP_V2_GIN=off"
        return Check("warn", found, "MLX5_1.25, or NCCL GIN may be unavailable", fix)
    return Check("ok", "on")


@checks.add("EFA", for_v2=True)
def check_efa(facts: Facts) -> Check:
    """What public reports found to be needed (docs/efa.md); none of it was run by this project."""
    count, row, environment = vendors(facts).count(AMAZON), generation(facts), facts["environment"]
    found, off, can_send = f"{count} devices", gin.off_by_user(asked(facts)), gin.usable(vendors(facts), row)
    if not count:
        if off or environment.get("FI_PROVIDER") != "efa":
            return Check("skip", "no device")
        fix = "give the container its EFA devices; or, on one host, MCORE_DEEPEP_V2_GIN=off"
        return Check("warn", "no device, but FI_PROVIDER=efa", "the devices through which tokens leave the host", fix)
    if off:
        return Check("ok", f"{found}, not used: {off}")
    if AMAZON not in can_send:
        alone = gin_off(facts)
        found += f", which DeepEP {row.name} cannot use"
        found += ": one host only, on NVLink" if alone else f": it has {len(can_send)} of NVIDIA" if can_send else ""
        needed = "NVIDIA (Mellanox) devices between hosts: this generation uses NCCL's GDAKI"
        other = next(name for name in WITH_WHEELS if not GENERATIONS[name].gin_needs_gdaki)
        fix = f"between hosts stay on DeepEP {other}: {replace_command(facts, other)}; else MCORE_DEEPEP_V2_GIN=off"
        return Check("warn" if alone or can_send else "fail", found, needed, fix)
    plugin, kind = facts["fabric"].get("net_plugin"), environment.get("NCCL_GIN_TYPE", _PROXY)
    found += f", aws-ofi-nccl {'found' if plugin else 'not found'}, num_qps "
    found += str(facts["settings"]["num_qps"] or "chosen by deep_ep")
    if kind == _EFA_GDA and (lacking := _lacks_for_gda(facts)):
        needed = f"for that NCCL {_GDA_NCCL}, EFA's driver {_GDA_DRIVER}, NCCL_SYM_GIN_KERNELS_ENABLE=0, and Amazon's "
        needed += "fork of DeepEP"
        return Check("fail", f"{found}, NCCL_GIN_TYPE={kind} with {', '.join(lacking)}", needed, _TAKE_THE_PROXY)
    if kind not in (_PROXY, _EFA_GDA):
        needed = f"{_PROXY} (by a host thread) or {_EFA_GDA} (by the GPU): other types of GIN are for other devices"
        return Check("warn", f"{found}, NCCL_GIN_TYPE={kind}", needed, _TAKE_THE_PROXY)
    if (protocol := environment.get("OFI_NCCL_PROTOCOL", "RDMA")).upper() != "RDMA":
        needed = "RDMA: the only protocol with which the plugin offers GIN"
        return Check("fail", f"{found}, OFI_NCCL_PROTOCOL={protocol}", needed, "OFI_NCCL_PROTOCOL=RDMA, or unset it")
    if not plugin:
        fix = "install aws-ofi-nccl, name it in NCCL_NET_PLUGIN; where queues run out, set MCORE_DEEPEP_V2_NUM_QPS"
        return Check("warn", found, "the plugin through which NCCL finds EFA", fix)
    if version(gdrcopy := facts["rdma"]["modules"]["gdrdrv"]) < version(_GDRCOPY):
        found += f", gdrdrv {gdrcopy or 'not loaded'}"
        needed = f"GDRCopy {_GDRCOPY}, without which the plugin offers no GIN"
        return Check("warn", found, needed, "install it, and load its module gdrdrv")
    return Check("ok", found + (", NCCL_GIN_TYPE=5" if kind == _EFA_GDA else ""))


def _lacks_for_gda(facts: Facts) -> list[str]:
    """What is there instead of what EFA-GDA needs."""
    nccl, driver = facts["probe"].get("nccl", {}).get("loaded"), facts["rdma"]["modules"]["efa"]
    used, kernels = package_in_use(facts), facts["environment"].get("NCCL_SYM_GIN_KERNELS_ENABLE", "1")
    lacking = [f"NCCL {nccl}"] if nccl and version(nccl) < version(_GDA_NCCL) else []
    lacking += [f"EFA's driver {driver}"] if driver and version(driver) < version(_GDA_DRIVER) else []
    lacking += [f"NCCL_SYM_GIN_KERNELS_ENABLE={kernels}"] if kernels != "0" else []
    if used and used["wheel"] and of_distribution(distribution(used)):
        lacking.append(f"DeepEP's own kernels, in {used['wheel']}")
    return lacking


@checks.add("hybrid combine", for_v2=True)
def check_hybrid_combine(facts: Facts) -> Check:
    row = generation(facts)
    if not row.fault or gin_off(facts) or not facts["settings"]["allow_hybrid_mode"]:
        return Check("ok", "not the faulty one of deep_ep 2.0 between hosts")
    found = f"DeepEP {row.name} in hybrid mode: its combine between hosts is faulty"
    newer = generation_to_install(facts)
    fix = f"{replace_command(facts, newer)}; or MCORE_DEEPEP_V2_ALLOW_HYBRID_MODE=off"
    return Check("fail", found, f"DeepEP {newer}", fix)


@checks.add("zero padding", for_v2=True)
def check_zero_padding(facts: Facts) -> Check:
    nvcc, least = facts["toolkit"]["version"], version(_ZERO_PADDING_NVCC)
    if not is_blackwell(facts) or max(version(nvcc), version(generation(facts).nvcc_blackwell)) >= least:
        return Check("ok", "compiles")
    found = f"CUDA {nvcc} on SM 10.0: a dispatch that pads its experts (fp8, fp4) does not compile"
    fix = "set CUDA_HOME to a newer toolkit, or MCORE_DEEPEP_V2_LAYOUT=compact"
    return Check("warn", found, f"CUDA {_ZERO_PADDING_NVCC} or newer", fix)
