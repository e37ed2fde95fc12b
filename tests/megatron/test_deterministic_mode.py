"""Deterministic mode: who turns it on, and the same bits in both layouts. Kernels: tests/gpu/test_deterministic.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2 import destroy_buffers, settings
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron.managers import follow_deterministic_mode
from tests.helpers.deterministic_rounds import bits_of_a_layer, repeat
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import hidden_states, make_layer, process_groups, step
from tests.helpers.shapes import CPU, Shape

# fp32, because torch rounds what it adds up in bf16 on a CPU (embedding_bag) in another way than elsewhere.
OF_GPU_TEST = Shape(topk=4, hidden=256, tokens=64)
BY_MEGATRON = "True (Megatron's --deterministic-mode)"


def layouts_apart(group: Any, mode: dict[str, Any], by_name: bool) -> tuple[str, dict[str, float]]:
    """The setting, and how far the two layouts are apart: output and each gradient of the real layer."""
    with process_groups():
        results = []
        for layout in ("compact", "expanded"):
            layer = make_layer(CPU, "flex", layout, **mode)
            if by_name:
                megatron_ep_v2.install(
                    buffer="reference", layout=layout, deterministic=True, num_max_tokens_per_rank=CPU.tokens
                )
            results.append(step(layer, hidden_states(CPU, CPU.tokens, 1)))
            said = settings.active().describe()["deterministic"]
        apart = {name: (results[0][name] - results[1][name]).abs().max().item() for name in results[0]}
        return said, apart


@pytest.mark.parametrize("by_name", [False, True], ids=["--deterministic-mode", "by name"])
def test_both_layouts_give_the_same_bits(by_name: bool) -> None:
    mode = {} if by_name else {"deterministic_mode": True}
    for said, apart in run_ranks(2, layouts_apart, mode, by_name):
        assert said == ("True (install())" if by_name else BY_MEGATRON)
        assert apart and not any(apart.values()), apart


def test_without_it_they_do_not() -> None:
    """The negative control: sums of three or more selections in another order."""
    apart = [apart for _, apart in run_ranks(2, layouts_apart, {}, False)]
    assert any(value > 0 for by_name in apart for value in by_name.values())


def turn_on_late(group: Any) -> str:
    with process_groups():
        step(make_layer(CPU, "flex"), hidden_states(CPU, CPU.tokens, 1))
        installed = settings.active()
        uninstall, megatron_ep_v2.uninstall = megatron_ep_v2.uninstall, lambda: None  # make_layer would start again
        install, megatron_ep_v2.install = megatron_ep_v2.install, lambda **_: None
        try:
            make_layer(CPU, "flex", deterministic_mode=True)
        except SettingsError as error:
            assert settings.active() == installed, "what was refused has changed something"
            return str(error)
        finally:
            megatron_ep_v2.uninstall, megatron_ep_v2.install = uninstall, install
    return "nothing was raised"


def test_after_a_buffer_was_built_it_comes_too_late() -> None:
    for said in run_ranks(2, turn_on_late):
        assert "comes too late" in said and "deterministic=False (default)" in said and "DETERMINISTIC=1" in said


def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_active", settings.resolve({"MCORE_DEEPEP_V2_DETERMINISTIC": "off"}))
    follow_deterministic_mode(SimpleNamespace(deterministic_mode=True), None)
    assert settings.active().describe()["deterministic"] == "False (MCORE_DEEPEP_V2_DETERMINISTIC)"
    monkeypatch.setattr(settings, "_active", settings.resolve({}))
    follow_deterministic_mode(SimpleNamespace(deterministic_mode=False), None)
    assert not settings.active().deterministic
    follow_deterministic_mode(SimpleNamespace(deterministic_mode=True), None)
    assert settings.active().describe()["deterministic"] == BY_MEGATRON


def under_torchs_mode(group: Any) -> bool:
    """The reference, too, works with torch's deterministic mode in its default state."""
    torch.use_deterministic_algorithms(True)
    try:
        with process_groups():
            first, second = (
                step(make_layer(CPU, "flex", deterministic_mode=True), hidden_states(CPU, CPU.tokens, 1))
                for _ in range(2)
            )
            return all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_torchs_own_deterministic_mode_goes_with_it() -> None:
    assert run_ranks(2, under_torchs_mode, fresh=True) == [True, True]


def test_the_layer_of_the_gpu_test_repeats_on_the_reference() -> None:
    """Its fingerprints are of the same things in both layouts, and differ where selections are not sorted."""
    for found in run_ranks(2, repeat, OF_GPU_TEST, True, 2):
        for name in found[True]:
            assert len({*found[True][name], *found[False][name]}) == 1, name
    apart = [
        {name for name in found[True] if found[True][name] != found[False][name]}
        for found in run_ranks(2, unsorted_and_sorted, OF_GPU_TEST)
    ]
    assert {"output", "grad_x"} & set.union(*apart)


def unsorted_and_sorted(group: Any, shape: Shape) -> Any:
    """The expanded layout with the selections as they come, the compact one with sorted ones."""
    found = {}
    for expand in (False, True):
        settings.activate(settings.resolve(buffer=shape.buffer, deterministic=not expand))
        found[expand] = bits_of_a_layer(group, shape, expand)
        destroy_buffers()
    settings.activate(None)
    return found
