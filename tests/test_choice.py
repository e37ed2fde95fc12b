"""Which buffer `install()` takes for what is installed here, and what it says about it. deep_ep and CUDA are faked."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

import megatron_ep_v2
from megatron_ep_v2 import fused_a2a as ours
from megatron_ep_v2.errors import SettingsError, UnavailableError
from tests.helpers.megatron_names import MANAGER, clean, names, rebound, set_broken_deep_ep, set_cuda, set_deep_ep

__all__ = ["clean"]  # a fixture

LEGACY, ELASTIC, HYBRID = "Buffer", "ElasticBuffer", "HybridEPBuffer"

pytestmark = pytest.mark.usefixtures("clean")


@dataclass(frozen=True)
class Machine:
    """What is installed, and which buffer that must give; None = an error."""

    cuda: bool
    deep_ep: tuple[str, ...]
    buffer: str | None

    def __str__(self) -> str:
        return f"{'cuda' if self.cuda else 'cpu'}-{'+'.join(self.deep_ep) or 'nothing'}"

    @property
    def have_deep_ep(self) -> bool:
        return LEGACY in self.deep_ep or ELASTIC in self.deep_ep

    def set_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_cuda(monkeypatch, self.cuda)
        set_deep_ep(monkeypatch, *self.deep_ep)


MACHINES = [
    Machine(True, (ELASTIC,), "elastic"),
    Machine(True, (LEGACY, ELASTIC), "elastic"),
    Machine(True, (LEGACY, ELASTIC, HYBRID), "elastic"),
    Machine(True, (LEGACY,), "megatron"),
    Machine(True, (LEGACY, HYBRID), "megatron"),
    Machine(True, (HYBRID,), None),
    Machine(True, (), None),
    Machine(False, (ELASTIC,), "reference"),
    Machine(False, (LEGACY,), "reference"),
    Machine(False, (LEGACY, ELASTIC), "reference"),
    Machine(False, (HYBRID,), "reference"),
    Machine(False, (), "reference"),
]
USABLE = [machine for machine in MACHINES if machine.buffer]
BOUND = [machine for machine in USABLE if machine.buffer != "megatron"]


@pytest.mark.parametrize("machine", USABLE, ids=str)
def test_the_buffer_of_a_machine(machine: Machine, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    status = megatron_ep_v2.install()
    assert status["buffer"] == machine.buffer
    assert status["layout"] == ("compact" if machine.buffer == "megatron" else "expanded")
    assert status["buffer_reason"] and status["layout_reason"]


@pytest.mark.parametrize("machine", [machine for machine in MACHINES if not machine.buffer], ids=str)
def test_a_gpu_machine_without_a_buffer_does_not_fall_back(machine: Machine, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    with pytest.raises(UnavailableError) as caught:
        megatron_ep_v2.install()
    error = caught.value
    assert error.fix and "install deep_ep" in error.fix and "MCORE_DEEPEP_V2_BUFFER=reference" in error.fix
    assert error.found == megatron_ep_v2.status()["deep_ep"]
    assert ("HybridEPBuffer" if machine.deep_ep else "ModuleNotFoundError") in error.found

    assert megatron_ep_v2.install(buffer="reference")["buffer_reason"] == "asked for by install()"
    megatron_ep_v2.uninstall()
    clean.setenv("MCORE_DEEPEP_V2_BUFFER", "reference")
    assert megatron_ep_v2.install()["buffer_reason"] == "asked for by MCORE_DEEPEP_V2_BUFFER"


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_our_flags_tell_what_is_there(machine: Machine, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    assert ours.HAVE_DEEP_EP is (LEGACY in machine.deep_ep)
    assert ours.HAVE_DEEP_EP_V2 is (ELASTIC in machine.deep_ep)
    status = megatron_ep_v2.status()
    assert (status["have_deep_ep"], status["have_deep_ep_v2"]) == (ours.HAVE_DEEP_EP, ours.HAVE_DEEP_EP_V2)


@pytest.mark.parametrize("machine", BOUND, ids=str)
def test_megatrons_flag_tells_the_truth_after_install(machine: Machine, clean: pytest.MonkeyPatch) -> None:
    """Left to itself it is False with deep_ep 2, whose utils no longer have what Megatron imports."""
    machine.set_up(clean)
    clean.setattr(fused_a2a, "HAVE_DEEP_EP", not machine.have_deep_ep)
    megatron_ep_v2.install()
    assert fused_a2a.HAVE_DEEP_EP is machine.have_deep_ep
    megatron_ep_v2.uninstall()
    assert fused_a2a.HAVE_DEEP_EP is (not machine.have_deep_ep), "Megatron's own again"


def test_legacy_only_leaves_megatron_as_it_is(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def megatrons_own(*_: Any) -> None: ...

    for module in (fused_a2a, token_dispatcher):  # as Megatron defines them where it finds the legacy deep_ep
        for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms"):
            clean.setattr(module, name, FunctionType(megatrons_own.__code__, {}, name))
    clean.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, version="1.2.1")
    before = names()
    code = {key: value.__code__.co_code for key, value in before.items() if type(value) is FunctionType}
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        status = megatron_ep_v2.install()

    assert not rebound(before)
    assert {key: value.__code__.co_code for key, value in names().items() if type(value) is FunctionType} == code
    assert token_dispatcher._DeepepManager is MANAGER
    assert status["installed"] is True and status["buffer"] == "megatron"
    assert "deep_ep 1.2.1 with Buffer" in status["buffer_reason"]
    probed, line = caplog.messages
    assert probed.startswith("HAVE_DEEP_EP=True HAVE_DEEP_EP_V2=")
    assert "nothing was changed" in line and "Megatron's own path stays as it is" in line

    megatron_ep_v2.uninstall()
    assert not rebound(before)


def test_v2_is_preferred_and_the_log_says_so(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, ELASTIC)
    with caplog.at_level(logging.INFO, "megatron_ep_v2"):
        megatron_ep_v2.install()
    probed, line = caplog.messages
    assert probed.startswith("HAVE_DEEP_EP=True HAVE_DEEP_EP_V2=")
    assert "the elastic buffer (deep_ep 2.1.0 with ElasticBuffer, Buffer; V2 is preferred)" in line


def test_what_is_not_deepep_v2_is_said_aloud(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Above the level that an unconfigured logger shows; a choice by name needs no warning."""
    set_cuda(clean, False)
    with caplog.at_level(logging.WARNING, "megatron_ep_v2"):
        megatron_ep_v2.install()
        megatron_ep_v2.install(buffer="reference")
    [line] = caplog.messages
    assert "the reference buffer (no CUDA device here" in line


def test_the_generation_is_told_by_the_api_and_not_by_the_version(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, version="2.9.0")
    assert megatron_ep_v2.install()["buffer"] == "megatron"
    megatron_ep_v2.uninstall()
    set_deep_ep(clean, ELASTIC, version="1.0.0+local")
    assert megatron_ep_v2.install()["buffer"] == "elastic"


# --------------------------------------------------------------------------------------------------- asked for by name


@pytest.mark.parametrize("buffer", ["elastic", "legacy"])
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_a_buffer_asked_for_by_name(machine: Machine, buffer: str, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    here = (ELASTIC if buffer == "elastic" else LEGACY) in machine.deep_ep
    if here and machine.cuda:
        status = megatron_ep_v2.install(buffer=buffer)
        assert status["buffer"] == buffer and status["buffer_reason"].startswith("asked for by install()")
        return
    with pytest.raises(UnavailableError, match=f"the {buffer} buffer, asked for by install") as caught:
        megatron_ep_v2.install(buffer=buffer)
    assert caught.value.found == ("no CUDA device" if here else megatron_ep_v2.status()["deep_ep"])
    assert caught.value.needed and caught.value.fix


def test_the_legacy_buffer_has_the_compact_layout_only(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, ELASTIC)
    assert megatron_ep_v2.install(buffer="legacy")["layout"] == "compact"
    assert token_dispatcher._DeepepManager.__name__ == "CompactManager"
    assert token_dispatcher.fused_dispatch is ours.fused_dispatch
    with pytest.raises(SettingsError, match="no expanded layout"):
        megatron_ep_v2.install(buffer="legacy", layout="expanded")


def test_the_expanded_layout_needs_multiple_reduction(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, ELASTIC)
    status = megatron_ep_v2.install(allow_multiple_reduction=False)
    assert status["layout"] == "compact" and "allow_multiple_reduction is off (install())" in status["layout_reason"]
    before = names()
    with pytest.raises(SettingsError, match="allow_multiple_reduction=false"):
        megatron_ep_v2.install(allow_multiple_reduction=False, layout="expanded")
    assert not rebound(before)


# ------------------------------------------------------------------------------------------- a deep_ep that cannot load

BROKEN = {
    "ImportError": "raise ImportError('undefined symbol: ncclGetLsaDevicePointer')",
    "ModuleNotFoundError": "import deep_ep_cpp",
    "AssertionError": "assert False, 'NCCL 2.28.9 is loaded, 2.30.4 is needed'",
    "FileNotFoundError": "open('/nowhere/nvcc')",
    "OSError": "raise OSError('libnvshmem_host.so.3: cannot open shared object file')",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_the_cause_is_kept(kind: str, clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_cuda(clean, True)
    set_broken_deep_ep(clean, tmp_path, BROKEN[kind])
    cause = BROKEN[kind].split("'")[1] if "'" in BROKEN[kind] else "No module named 'deep_ep_cpp'"
    with pytest.raises(UnavailableError) as caught:
        megatron_ep_v2.install()
    for text in (str(caught.value), megatron_ep_v2.status()["deep_ep"]):
        assert f"deep_ep cannot be imported: {kind}" in text and cause in text
    assert (ours.HAVE_DEEP_EP, ours.HAVE_DEEP_EP_V2) == (False, False)

    status = megatron_ep_v2.install(buffer="reference")
    assert cause in status["deep_ep"]
    assert fused_a2a.HAVE_DEEP_EP is False


def test_the_cause_shows_on_a_machine_without_gpus_too(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_broken_deep_ep(clean, tmp_path, BROKEN["AssertionError"])
    reason = megatron_ep_v2.install()["buffer_reason"]
    assert "no CUDA device here" in reason and "NCCL 2.28.9 is loaded" in reason
