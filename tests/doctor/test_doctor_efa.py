"""The doctor's check of EFA on made-up facts: what public reports found to be needed, and one decision about GIN with
the buffers. `test_doctor.py` has it on a made-up machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import gin
from megatron_ep_v2.doctor.hardware import check_efa
from megatron_ep_v2.generations import GENERATIONS

EFA, NVIDIA = gin.AMAZON, gin.MELLANOX
WHEEL, FORK = "tokenspeed-deepep==2.1.0.post20260801", "deep-ep==2.1.0+ec623f3"
GDA = {"NCCL_GIN_TYPE": "5", "NCCL_SYM_GIN_KERNELS_ENABLE": "0"}
PACKAGES = {
    "2.1": ("deep_ep", "elastic", ["ElasticBuffer", "Buffer"]),
    "2.5": ("deep_ep_v25", "ep", ["EPBuffer"]),
}


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_DISABLE_GIN", raising=False)


def facts(
    *vendors: str,
    environment: dict[str, str] | None = None,
    generation: str = "2.1",
    plugin: bool = True,
    nccl: str = "2.31.2",
    driver: str = "3.3.0g",
    gdrdrv: str = "2.5.1",
    wheel: str | None = FORK,
    **given: Any,
) -> dict[str, Any]:
    """Of a host where everything is in order, with RDMA devices of these vendors; `given` as to `install()`."""
    name, carrier, classes = PACKAGES[generation]
    package = {"generation": generation, "classes": classes, "version": generation, "failure": None}
    return {
        "rdma": {
            "devices": [{"name": f"device{i}", "vendor": vendor, "ports": []} for i, vendor in enumerate(vendors)],
            "modules": {"efa": driver, "gdrdrv": gdrdrv},
        },
        "environment": environment or {},
        "settings": asdict(settings.resolve({}, **given)),
        "fabric": {"net_plugin": plugin},
        "probe": {"nccl": {"loaded": nccl}, "carriers": [carrier], "choice": carrier},
        "torch": {"version": "2.11.0"},
        "deep_ep": {},
        "deep_ep_v25": {},
        "distributions": {name: wheel} if wheel else {},
        name: package,
    }


IN_ORDER: dict[str, tuple[dict[str, Any], str]] = {
    "the proxy by default": ({}, "2 devices, aws-ofi-nccl found, num_qps chosen by deep_ep"),
    "the proxy by name": ({"environment": {"NCCL_GIN_TYPE": "2"}, "num_qps": 12, "wheel": WHEEL}, "num_qps 12"),
    "the proxy with an older NCCL and driver": ({"nccl": "2.30.7", "driver": "3.0.0"}, "aws-ofi-nccl found"),
    "EFA-GDA on the fork": ({"environment": GDA}, "NCCL_GIN_TYPE=5"),
    "EFA-GDA on a build that no metadata names": ({"environment": GDA, "wheel": None}, "NCCL_GIN_TYPE=5"),
    "EFA-GDA with a driver that cannot be read": ({"environment": GDA, "driver": ""}, "NCCL_GIN_TYPE=5"),
    "gin=off": ({"gin": "off", "plugin": False}, "2 devices, not used: gin=off by install()"),
}


@pytest.mark.parametrize("case", IN_ORDER)
def test_in_order(case: str) -> None:
    given, said = IN_ORDER[case]
    check = check_efa(facts(EFA, EFA, **given))
    assert check.status == "ok" and said in check.found


WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "EFA-GDA and NCCL's own kernels": (
        {"environment": {"NCCL_GIN_TYPE": "5"}},
        "fail",
        "NCCL_GIN_TYPE=5 with NCCL_SYM_GIN_KERNELS_ENABLE=1",
        "NCCL_SYM_GIN_KERNELS_ENABLE=0",
    ),
    "EFA-GDA with an older NCCL": ({"environment": GDA, "nccl": "2.30.7"}, "fail", "with NCCL 2.30.7", "NCCL 2.31.2"),
    "EFA-GDA with an older driver": (
        {"environment": GDA, "driver": "3.0.0"},
        "fail",
        "with EFA's driver 3.0.0",
        "EFA's driver 3.3.0",
    ),
    "EFA-GDA with a wheel": ({"environment": GDA, "wheel": WHEEL}, "fail", f"own kernels, in {WHEEL}", "Amazon's fork"),
    "GDAKI": ({"environment": {"NCCL_GIN_TYPE": "3"}}, "warn", "NCCL_GIN_TYPE=3", "2 (by a host thread) or 5"),
    "another protocol": ({"environment": {"OFI_NCCL_PROTOCOL": "SENDRECV"}}, "fail", "=SENDRECV", "the only protocol"),
    "no plugin": ({"plugin": False}, "warn", "aws-ofi-nccl not found", "the plugin"),
    "an older GDRCopy": ({"gdrdrv": "2.4"}, "warn", "gdrdrv 2.4", "GDRCopy 2.5"),
    "no GDRCopy": ({"gdrdrv": ""}, "warn", "gdrdrv not loaded", "GDRCopy 2.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case: str) -> None:
    given, status, said, needed = WRONG[case]
    check = check_efa(facts(EFA, EFA, **given))
    assert check.status == status and said in check.found
    assert check.needed and needed in check.needed and check.fix


def test_without_a_device_only_variables_that_ask_for_efa_are_a_reason() -> None:
    asking = {"FI_PROVIDER": "efa"}
    assert check_efa(facts()).status == check_efa(facts(NVIDIA, environment=GDA)).status == "skip"
    check = check_efa(facts(environment=asking))
    assert (check.status, check.found) == ("warn", "no device, but FI_PROVIDER=efa") and check.fix
    assert check_efa(facts(environment=asking, gin="off")).status == "skip"


@pytest.mark.parametrize("generation", ["2.1", "2.5"])
@pytest.mark.parametrize("variable", ["0", "1"])
@pytest.mark.parametrize("asked", ["auto", "on", "off"])
@pytest.mark.parametrize("vendors", [(EFA,), (EFA, NVIDIA)], ids=["EFA", "both"])
def test_the_doctor_decides_as_a_buffer_does(
    vendors: tuple[str, ...], asked: str, variable: str, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one host: what a buffer is built without is not used; what a generation cannot use is said, and that it is
    asked for by name is a fault."""
    monkeypatch.setenv("EP_DISABLE_GIN", variable)
    given = facts(*vendors, generation=generation, environment={"EP_DISABLE_GIN": variable}, gin=asked)
    off, _ = gin.choose(settings.resolve({}, gin=asked), vendors, ["this host"], GENERATIONS[generation])
    check = check_efa(given)
    if generation == "2.1":
        assert (check.status, "not used" in check.found) == ("ok", off)
    elif asked == "off" or (asked, variable) == ("auto", "1"):
        assert off and check.status == "ok" and "not used" in check.found
    elif NVIDIA in vendors:
        assert not off and check.status == "warn" and "it has 1 of NVIDIA" in check.found
    else:
        assert check.status == ("fail" if asked == "on" else "warn") and off is (asked == "auto")
