"""Names of variables and arguments: a misspelt one is refused with the nearest right one, and one setting has two."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.doctor import host, software
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.megatron import binding
from megatron_ep_v2.settings import PREFIX, resolve

USUAL, ALIAS = PREFIX + "MAX_TOKENS_PER_RANK", PREFIX + "NUM_MAX_TOKENS_PER_RANK"
ALL = "one of MCORE_DEEPEP_V2_BUFFER, MCORE_DEEPEP_V2_LAYOUT, "


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None of the developer's shell, and no settings left in force."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    settings.activate(None)
    yield
    settings.activate(None)


MISSPELT = {
    "NUM_SM": "NUM_SMS",
    "SYNCFREE": "SYNC_FREE",
    "SYNC_FREE_ROW_PERCENT": "SYNC_FREE_ROWS_PERCENT",
    "MAX_TOKEN_PER_RANK": "MAX_TOKENS_PER_RANK",
    "NUM_MAX_TOKEN_PER_RANKS": "NUM_MAX_TOKENS_PER_RANK",
    "WATCHDOG_SECONDS": "WATCHDOG_SECS",
    "Layout": "LAYOUT",
    "DISPATCH_TYPE": "DISPATCH_DTYPE",
    "TESTS": None,
    "XYZ": None,
    "": None,
}


@pytest.mark.parametrize(("wrong", "right"), MISSPELT.items())
def test_a_misspelt_variable_is_refused_with_the_nearest_name(wrong: str, right: str | None) -> None:
    """Whatever its value is, and also next to right ones."""
    for value in ("1", ""):
        with pytest.raises(SettingsError) as caught:
            resolve({PREFIX + "NUM_QPS": "4", PREFIX + wrong: value})
        assert caught.value.what == f"unknown variable {PREFIX}{wrong} in the environment"
        if right is None:
            assert caught.value.needed and caught.value.needed.startswith(ALL)
        else:
            assert caught.value.needed == PREFIX + right


def test_other_variables_are_not_looked_at() -> None:
    known = {PREFIX + "TEST_ROUNDS": "20", settings.variable("num_sms"): "24", ALIAS: ""}
    others = {"MCORE_DEEPEP_NUM_SM": "1", "MY_MCORE_DEEPEP_V2_SM": "1", "EP_NUM_SM": "1"}
    resolved = resolve(known | others)
    assert resolved.num_sms == 24 and list(resolved.sources) == ["num_sms"]
    assert resolve({name: "" for each in settings.NAMES for name in settings.variables(each)}) == settings.Settings()


@pytest.mark.parametrize(
    ("wrong", "right"), [("num_sm", "num_sms"), ("max_tokens_per_rank", "num_max_tokens_per_rank")]
)
def test_a_misspelt_argument_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(SettingsError) as caught:
        megatron_ep_v2.install(**{wrong: 24})
    assert caught.value.what == f"unknown setting {wrong!r}" and caught.value.needed == right
    with pytest.raises(SettingsError, match="needed: one of buffer, layout, "):
        megatron_ep_v2.install(color="red")
    assert not binding.bound()


def test_install_and_doctor_say_the_same_about_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "NUM_SM", "24")
    monkeypatch.setenv(PREFIX + "BUFFER", "reference")
    with pytest.raises(SettingsError) as caught:
        megatron_ep_v2.install(buffer="reference")
    assert not binding.bound()
    facts = host.read_host()
    check, error = software.check_settings(facts), caught.value
    assert (check.status, check.found, check.needed, check.fix) == ("fail", error.what, error.needed, error.fix)
    assert error.needed == settings.variable("num_sms")
    assert facts["environment"][PREFIX + "NUM_SM"] == "24", "a report has it"


# ----------------------------------------------------------------------------------------------- a setting of two names


@pytest.mark.parametrize("environ", [{USUAL: "4096"}, {ALIAS: " 4096"}, {USUAL: "4096 ", ALIAS: "4096"}])
def test_the_capacity_has_two_variables_and_the_status_names_the_one_that_was_used(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    shown = megatron_ep_v2.status()["settings"]["num_max_tokens_per_rank"]
    assert shown == f"4096 ({next(iter(environ))})"
    assert {name: value for name, value in settings.shown_environment().items() if name.startswith(PREFIX)} == environ
    assert resolve(num_max_tokens_per_rank=512).num_max_tokens_per_rank == 512


def test_two_values_for_the_capacity_are_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({USUAL: "4096", ALIAS: "8192"})
    assert caught.value.found == f"{USUAL}=4096, {ALIAS}=8192"
    assert caught.value.fix == f"unset {ALIAS}"


def test_a_wrong_value_of_the_second_variable_names_that_variable() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({ALIAS: "4k"})
    assert f"'4k' from {ALIAS}" in str(caught.value) and f"or unset {ALIAS}" in str(caught.value)
