"""Settings: who wins, where a value came from, and what a value that cannot be used says."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_ep_v2 import settings
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.fused_a2a import set_deepep_num_sms
from megatron_ep_v2.settings import Settings, resolve

NUM_SMS = "MCORE_DEEPEP_V2_NUM_SMS"
MEGATRON = "Megatron's SM count"


@pytest.fixture(autouse=True)
def _fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of the developer's shell, none left in force."""
    for name in settings.NAMES:
        monkeypatch.delenv(settings.variable(name), raising=False)
    settings.activate(None)
    yield
    settings.activate(None)


# ---------------------------------------------------------------------------------------------------- who wins


def test_defaults() -> None:
    resolved = resolve({})
    assert resolved == Settings()
    assert {resolved.source(name) for name in settings.NAMES} == {"default"}


def test_a_variable_wins_over_the_default_and_an_argument_over_both() -> None:
    environ = {NUM_SMS: "24", "MCORE_DEEPEP_V2_LAYOUT": "compact"}
    resolved = resolve(environ, layout="expanded")
    assert (resolved.num_sms, resolved.source("num_sms")) == (24, NUM_SMS)
    assert (resolved.layout, resolved.source("layout")) == ("expanded", "install()")
    assert (resolved.buffer, resolved.source("buffer")) == ("auto", "default")


def test_none_and_an_empty_variable_are_not_given() -> None:
    resolved = resolve({NUM_SMS: " ", "MCORE_DEEPEP_V2_LAYOUT": "compact"}, layout=None)
    assert (resolved.num_sms, resolved.source("num_sms")) == (0, "default")
    assert (resolved.layout, resolved.source("layout")) == ("compact", "MCORE_DEEPEP_V2_LAYOUT")


def test_a_given_default_counts_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve({NUM_SMS: "24"}, num_sms=0)
    assert (resolved.num_sms, resolved.source("num_sms")) == (0, "install()")
    monkeypatch.setenv(NUM_SMS, "0")
    set_deepep_num_sms(24)
    assert settings.active().describe()["num_sms"] == f"0 ({NUM_SMS})"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("buffer", "Reference", "reference"),
        ("buffer", "EP", "ep"),
        ("gin", " off ", "off"),
        *[("experts", text, text.lower()) for text in ("Megatron", "GROUPED", "DeepGEMM", "sequential")],
        ("num_qps", "12", 12),
        ("num_max_tokens_per_rank", "4096", 4096),
        *[("deterministic", text, True) for text in ("1", "true", "TRUE", "on")],
        *[("allow_hybrid_mode", text, False) for text in ("0", "false", "False", "off")],
    ],
)
def test_text_of_variables(name: str, text: str, value: object) -> None:
    assert getattr(resolve({settings.variable(name): text}), name) == value


def test_names_of_variables() -> None:
    """All have the prefix and the field's name, but for the one that upstream's pull request introduced."""
    assert settings.variable("num_max_tokens_per_rank") == "MCORE_DEEPEP_V2_MAX_TOKENS_PER_RANK"
    others = set(settings.NAMES) - {"num_max_tokens_per_rank"}
    assert {settings.variable(name) for name in others} == {f"MCORE_DEEPEP_V2_{name.upper()}" for name in others}


def test_the_environment_is_read_at_first_use_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NUM_SMS, "24")
    assert settings.active().num_sms == 24
    monkeypatch.setenv(NUM_SMS, "32")
    assert settings.active().num_sms == 24
    settings.activate(None)
    assert settings.active().num_sms == 32


# -------------------------------------------------------------------------------------------- Megatron's own values


def test_megatron_wins_over_the_default_only(monkeypatch: pytest.MonkeyPatch) -> None:
    set_deepep_num_sms(16)
    assert settings.active().describe()["num_sms"] == f"16 ({MEGATRON})"

    monkeypatch.setenv(NUM_SMS, "24")
    settings.activate(None)
    set_deepep_num_sms(16)
    assert settings.active().describe()["num_sms"] == f"24 ({NUM_SMS})"

    settings.activate(resolve(num_sms=32))
    set_deepep_num_sms(16)
    assert settings.active().describe()["num_sms"] == "32 (install())"


def test_megatrons_twenty_stands_for_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_deepep_num_sms(20)
    assert settings.active().describe()["num_sms"] == "0 (default)"
    monkeypatch.setenv(NUM_SMS, "20")
    settings.activate(None)
    assert settings.active().describe()["num_sms"] == f"20 ({NUM_SMS})", "by name, exactly 20 can be had"


def test_a_later_model_may_offer_another_value() -> None:
    set_deepep_num_sms(16)
    set_deepep_num_sms(28)
    assert settings.active().describe()["num_sms"] == f"28 ({MEGATRON})"


def test_a_bad_value_of_megatron_names_megatron() -> None:
    with pytest.raises(SettingsError, match="-1 from Megatron's SM count"):
        set_deepep_num_sms(-1)
    assert settings.active().describe()["num_sms"] == "0 (default)"


# --------------------------------------------------------------------------------------------------- wrong values

WRONG = {
    "buffer": "ibgda",
    "layout": "sorted",
    "experts": "te",
    "gin": "maybe",
    "num_max_tokens_per_rank": "4k",
    "num_sms": "-1",
    "num_qps": "1.5",
    "sl_idx": "--3",
    "deterministic": "yes please",
    "allow_hybrid_mode": "2",
}


@pytest.mark.parametrize(("name", "text"), WRONG.items())
def test_a_wrong_variable_is_named(name: str, text: str) -> None:
    variable = settings.variable(name)
    with pytest.raises(SettingsError) as caught:
        resolve({variable: text})
    message = str(caught.value)
    assert f"from {variable}" in message and text.removeprefix("-") in message
    assert "\n  needed: " in message and "\n  fix: " in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout", "Compact"),
        ("experts", "Grouped"),
        ("experts", True),
        ("layout", ""),
        ("num_sms", "24"),
        ("num_sms", True),
        ("num_max_tokens_per_rank", -4096),
        ("num_qps", 2.0),
        ("deterministic", 1),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: object) -> None:
    """Values from Python are not converted: text for a number is a mistake there."""
    with pytest.raises(SettingsError) as caught:
        resolve({}, **{name: value})
    assert f"{value!r} from install()" in str(caught.value) and name in str(caught.value)


def test_choices_are_listed() -> None:
    with pytest.raises(SettingsError, match="one of auto, compact, expanded"):
        resolve({}, layout="sorted")
    with pytest.raises(SettingsError, match="one of megatron, grouped, deepgemm, sequential"):
        resolve({}, experts="te")


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="unknown setting 'num_sm'") as caught:
        resolve({}, num_sm=24)
    assert "num_sms" in str(caught.value), "the list of what there is"


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().num_sms = 24  # type: ignore[misc]


# ---------------------------------------------------------------------------- variables that libraries read at build


def test_variables_for_a_library_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_KEPT", "before")
    monkeypatch.delenv("EP_NEW", raising=False)
    with pytest.raises(ZeroDivisionError), settings.environment(EP_KEPT="inside", EP_NEW="inside"):
        assert (os.environ["EP_KEPT"], os.environ["EP_NEW"]) == ("inside", "inside")
        raise ZeroDivisionError
    assert os.environ["EP_KEPT"] == "before"
    assert "EP_NEW" not in os.environ
