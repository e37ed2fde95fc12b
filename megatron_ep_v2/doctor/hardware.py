"""Checks of the machine: driver, GPUs, NVLink, the JIT's compiler and cache, RDMA; and known-bad combinations."""

from __future__ import annotations

from megatron_ep_v2 import versions
from megatron_ep_v2.doctor.check import Check, Checks, generation, gin_off, gpus, is_blackwell, version, wants_v2
from megatron_ep_v2.doctor.facts import Facts

_AMAZON, _MELLANOX = "0x1d0f", "0x15b3"  # PCI vendors
_ROOM_GIB = 1.0  # a kernel takes well under 1 MiB, a training run some tens of them

checks = Checks()


@checks.add("CUDA")
def check_cuda(facts: Facts) -> Check:
    driver, torch = facts["driver"], facts["torch"]
    if not gpus(facts):
        hidden = f"{len(driver['gpus'])} GPUs, hidden by CUDA_VISIBLE_DEVICES"
        return Check("skip", hidden if driver["gpus"] else "no GPU")
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
    toolkit, driver = facts["toolkit"], version(facts["driver"]["cuda"])
    found = f"{toolkit['version']} at {toolkit['nvcc']}" + ("" if toolkit["cuobjdump"] else ", no cuobjdump next to it")
    least, most = (12, 8) if is_blackwell(facts) else (12, 3), driver[0] if driver else 99
    needed = f"CUDA {'.'.join(map(str, least))} or newer, with cuobjdump: DeepEP V2 compiles at run time"
    if driver:
        needed += f"; at most CUDA {most} for this driver"
    good = toolkit["cuobjdump"] and least <= version(toolkit["version"]) < (most + 1,)
    return Check("ok" if good else "fail", found, needed, "install a CUDA toolkit, and set CUDA_HOME to it")


@checks.add("JIT cache", for_v2=True)
def check_cache(facts: Facts) -> Check:
    cache = facts["toolkit"]["cache"]
    found = f"{cache['path']}: {cache['error'] or str(cache['free_gib']) + ' GiB free'}"
    status = "fail" if cache["error"] else "ok" if cache["free_gib"] >= _ROOM_GIB else "warn"
    fix = "set EP_JIT_CACHE_DIR to a folder with room that every rank can write to"
    return Check(status, found, f"a folder to write to, {_ROOM_GIB:g} GiB free", fix)


@checks.add("RDMA", for_v2=True)
def check_rdma(facts: Facts) -> Check:
    devices, nic = facts["rdma"]["devices"], facts["environment"].get("EP_NIC_NAME", "mlx5_0")
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
        needed = f"ibstat and {nic} (EP_NIC_NAME): else, between hosts, ZeroDivisionError in get_theoretical_num_sms"
        fix = "install infiniband-diags and set EP_NIC_NAME, or set MCORE_DEEPEP_V2_NUM_SMS (e.g. 24)"
        return Check("warn", f"{found}; {', '.join(lacking)}", needed, fix)
    return Check("ok", found)


@checks.add("NCCL GIN", for_v2=True)
def check_gin(facts: Facts) -> Check:
    devices, library = facts["rdma"]["devices"], facts["fabric"].get("mlx5")
    if off := gin_off(facts):
        return Check("ok", f"off ({off}): NVLink of one host alone")
    if not devices:
        needed = "an RDMA device: else DeepEP V2 asserts that NCCL GIN is unavailable"
        return Check("fail", "on by MCORE_DEEPEP_V2_GIN, no RDMA device", needed, "MCORE_DEEPEP_V2_GIN=auto")
    if any(device["vendor"] == _MELLANOX for device in devices) and version(library) < (1, 25):
        found = f"on; libmlx5 has {'symbols up to MLX5_' + library if library else 'not been found'}"
        fix = "install a newer OFED or rdma-core; or, on one host, MCORE_DEEPEP_V2_GIN=off"
        return Check("warn", found, "MLX5_1.25, or NCCL GIN may be unavailable", fix)
    return Check("ok", "on")


@checks.add("EFA", for_v2=True)
def check_efa(facts: Facts) -> Check:
    count = sum(device["vendor"] == _AMAZON for device in facts["rdma"]["devices"])
    if not count:
        return Check("skip", "no device")
    plugin, queues = facts["fabric"].get("net_plugin"), facts["settings"]["num_qps"] or "chosen by deep_ep"
    found = f"{count} devices, aws-ofi-nccl {'found' if plugin else 'not found'}, num_qps {queues}"
    fix = "install aws-ofi-nccl, name it in NCCL_NET_PLUGIN; where queues run out, set MCORE_DEEPEP_V2_NUM_QPS"
    return Check("ok" if plugin else "warn", found, "the plugin through which NCCL finds EFA", fix)


@checks.add("hybrid combine", for_v2=True)
def check_hybrid_combine(facts: Facts) -> Check:
    if generation(facts) != "V2 2.0" or gin_off(facts) or not facts["settings"]["allow_hybrid_mode"]:
        return Check("ok", "not the faulty one of deep_ep 2.0 between hosts")
    found = "deep_ep 2.0 in hybrid mode: its combine between hosts is faulty"
    return Check("fail", found, f"deep_ep {versions.DEEP_EP_V2} or newer", "or MCORE_DEEPEP_V2_ALLOW_HYBRID_MODE=off")


@checks.add("zero padding", for_v2=True)
def check_zero_padding(facts: Facts) -> Check:
    nvcc = facts["toolkit"]["version"]
    if not is_blackwell(facts) or version(nvcc) >= (13, 1):
        return Check("ok", "compiles")
    found = f"CUDA {nvcc} on SM 10.0: a dispatch that pads its experts (fp8, fp4) does not compile"
    fix = "set CUDA_HOME to a newer toolkit, or MCORE_DEEPEP_V2_LAYOUT=compact"
    return Check("warn", found, "CUDA 13.1 or newer", fix)
