"""Which buffer `install()` takes for what is installed here, and what it says about it. DeepEP and CUDA are faked."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

import megatron_ep_v2
from megatron_ep_v2 import fused_a2a as ours
from megatron_ep_v2.buffers.carriers import CARRIERS
from megatron_ep_v2.errors import SettingsError, UnavailableError
from megatron_ep_v2.generations import install_command
from megatron_ep_v2.probe import load_class, probe
from tests.helpers.megatron_names import MANAGER, clean, names, rebound, set_cuda, set_deep_ep

__all__ = ["clean"]  # a fixture

LEGACY, ELASTIC, EP, HYBRID = "Buffer", "ElasticBuffer", "EPBuffer", "HybridEPBuffer"
V25 = "deep_ep_v25"

pytestmark = pytest.mark.usefixtures("clean")


@dataclass(frozen=True)
class Machine:
    """What is installed as deep_ep and as deep_ep_v25, and which buffer that must give; None = an error."""

    cuda: bool
    deep_ep: tuple[str, ...]
    buffer: str | None
    v25: tuple[str, ...] = ()

    def __str__(self) -> str:
        v25 = f"+v25.{'+'.join(self.v25)}" if self.v25 else ""
        return f"{'cuda' if self.cuda else 'cpu'}-{'+'.join(self.deep_ep) or 'nothing'}{v25}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.deep_ep + self.v25

    @property
    def have_deep_ep(self) -> bool:
        return bool({LEGACY, ELASTIC, EP} & set(self.classes))

    def set_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        set_cuda(monkeypatch, self.cuda)
        set_deep_ep(monkeypatch, *self.deep_ep)
        set_deep_ep(monkeypatch, *self.v25, version="2.5.0", package=V25)


MACHINES = [
    Machine(True, (EP,), "ep"),
    Machine(True, (), "ep", (EP,)),
    Machine(True, (LEGACY, ELASTIC), "ep", (EP,)),
    Machine(True, (LEGACY,), "ep", (EP,)),
    Machine(True, (ELASTIC,), "elastic"),
    Machine(True, (LEGACY, ELASTIC), "elastic"),
    Machine(True, (LEGACY, ELASTIC, HYBRID), "elastic"),
    Machine(True, (LEGACY,), "megatron"),
    Machine(True, (LEGACY, HYBRID), "megatron"),
    Machine(True, (HYBRID,), None),
    Machine(True, (), None),
    Machine(False, (EP,), "reference"),
    Machine(False, (), "reference", (EP,)),
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
    assert error.fix and "install DeepEP 2.1" in error.fix and "MCORE_DEEPEP_V2_BUFFER=reference" in error.fix
    assert install_command("2.1", torch.__version__) in error.fix
    assert ("in an environment without another DeepEP" in error.fix) is bool(machine.deep_ep)
    assert error.found == megatron_ep_v2.status()["deep_ep"]
    assert ("HybridEPBuffer" if machine.deep_ep else "no module named 'deep_ep' or 'deep_ep_v25'") in error.found

    assert megatron_ep_v2.install(buffer="reference")["buffer_reason"] == "asked for by install()"
    megatron_ep_v2.uninstall()
    clean.setenv("MCORE_DEEPEP_V2_BUFFER", "reference")
    assert megatron_ep_v2.install()["buffer_reason"] == "asked for by MCORE_DEEPEP_V2_BUFFER"


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_our_flags_say_what_is_there(machine: Machine, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    assert ours.HAVE_DEEP_EP is (LEGACY in machine.classes)
    assert ours.HAVE_DEEP_EP_V2 is bool({ELASTIC, EP} & set(machine.classes))
    status = megatron_ep_v2.status()
    assert (status["have_deep_ep"], status["have_deep_ep_v2"]) == (ours.HAVE_DEEP_EP, ours.HAVE_DEEP_EP_V2)


@pytest.mark.parametrize("machine", BOUND, ids=str)
def test_megatrons_flag_is_true_after_install(machine: Machine, clean: pytest.MonkeyPatch) -> None:
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


def test_the_generation_is_found_by_the_api_and_not_by_the_version(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, version="2.9.0")
    assert megatron_ep_v2.install()["buffer"] == "megatron"
    megatron_ep_v2.uninstall()
    set_deep_ep(clean, ELASTIC, version="1.0.0+local")
    assert megatron_ep_v2.install()["buffer"] == "elastic"


# --------------------------------------------------------------------------------------------------- asked for by name


@pytest.mark.parametrize("buffer", ["ep", "elastic", "legacy"])
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_a_buffer_asked_for_by_name(machine: Machine, buffer: str, clean: pytest.MonkeyPatch) -> None:
    machine.set_up(clean)
    here = CARRIERS[buffer].deep_ep_class in machine.classes
    if here and machine.cuda:
        status = megatron_ep_v2.install(buffer=buffer)
        assert status["buffer"] == buffer and status["buffer_reason"].startswith("asked for by install()")
        return
    with pytest.raises(UnavailableError, match=f"the {buffer} buffer, asked for by install") as caught:
        megatron_ep_v2.install(buffer=buffer)
    assert caught.value.found == ("no CUDA device" if here else megatron_ep_v2.status()["deep_ep"])
    assert caught.value.needed and caught.value.fix
    another = machine.cuda and {EP, ELASTIC} & set(machine.classes)
    assert ("leave the setting buffer at auto" in caught.value.fix) is bool(another)


def test_the_class_is_taken_from_the_package_that_has_it(clean: pytest.MonkeyPatch) -> None:
    Machine(True, (LEGACY, ELASTIC), "ep", (EP,)).set_up(clean)
    for buffer, package in (("ep", V25), ("elastic", "deep_ep"), ("legacy", "deep_ep")):
        assert load_class(buffer) is getattr(sys.modules[package], str(CARRIERS[buffer].deep_ep_class))
    set_deep_ep(clean)
    with pytest.raises(UnavailableError, match="needs a class of DeepEP that is not here"):
        load_class("legacy")


@pytest.mark.parametrize("buffer", ["auto", "elastic"])
def test_deep_ep_2_0_is_refused_by_its_api(buffer: str, clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, ELASTIC, version="2.1.0", zero_padding=False)
    with pytest.raises(UnavailableError, match="of a generation that this package does not carry") as caught:
        megatron_ep_v2.install(buffer=buffer)
    assert caught.value.found and "generation 2.0: older than 2.1" in caught.value.found
    assert caught.value.fix and install_command("2.1", torch.__version__) in caught.value.fix
    assert "without another DeepEP" in caught.value.fix
    assert ours.HAVE_DEEP_EP_V2 is True, "its class is there"


def test_the_legacy_buffer_has_the_compact_layout_only(clean: pytest.MonkeyPatch) -> None:
    set_cuda(clean, True)
    set_deep_ep(clean, LEGACY, ELASTIC)
    assert megatron_ep_v2.install(buffer="legacy")["layout"] == "compact"
    assert token_dispatcher._DeepepManager.__name__ == "CompactManager"
    assert token_dispatcher.fused_dispatch is ours.fused_dispatch
    for settings, said in (({"layout": "expanded"}, "no expanded layout"), ({"sync_free": True}, "does not wait")):
        with pytest.raises(SettingsError, match=said) as caught:
            megatron_ep_v2.install(buffer="legacy", **settings)
        assert (
            caught.value.needed and "the EPBuffer or the ElasticBuffer or the reference buffer" in caught.value.needed
        )
        assert caught.value.fix and caught.value.fix.endswith("leave the setting buffer at auto"), "V2 is here"
    set_deep_ep(clean, LEGACY)
    with pytest.raises(SettingsError) as caught:
        megatron_ep_v2.install(buffer="legacy", layout="expanded")
    assert caught.value.fix and caught.value.fix.endswith(install_command("2.1", torch.__version__))


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


def set_broken_deep_ep(monkeypatch: pytest.MonkeyPatch, folder: Path, statement: str) -> None:
    """A deep_ep whose import runs this statement."""
    (folder / "deep_ep.py").write_text(statement)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    probe.cache_clear()


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
    assert caught.value.fix and "megatron_ep_v2 doctor` says why" in caught.value.fix
    assert "pip install" not in caught.value.fix, "it may be what is there"

    status = megatron_ep_v2.install(buffer="reference")
    assert cause in status["deep_ep"]
    assert fused_a2a.HAVE_DEEP_EP is False


def test_a_broken_package_next_to_one_that_works(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_cuda(clean, True)
    set_broken_deep_ep(clean, tmp_path, BROKEN["ImportError"])
    set_deep_ep(clean, EP, version="2.5.0", package=V25)
    status = megatron_ep_v2.install()
    assert status["buffer"] == "ep" and "deep_ep cannot be imported: ImportError" in status["buffer_reason"]
    with pytest.raises(UnavailableError) as caught:
        megatron_ep_v2.install(buffer="elastic")
    assert caught.value.fix and "leave the setting buffer at auto, which takes ep" in caught.value.fix


def test_the_cause_shows_on_a_machine_without_gpus_too(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_broken_deep_ep(clean, tmp_path, BROKEN["AssertionError"])
    reason = megatron_ep_v2.install()["buffer_reason"]
    assert "no CUDA device here" in reason and "NCCL 2.28.9 is loaded" in reason
