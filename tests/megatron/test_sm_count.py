"""Which SM count of Megatron's configuration is taken: that of the flex dispatcher's backend deepep, not HybridEP's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.megatron.symbols import MANAGER

NUM_SMS = "MCORE_DEEPEP_V2_NUM_SMS"
OF_ALL, OWN, OTHER = "moe_flex_dispatcher_num_sms", "moe_deepep_num_sms", "moe_hybridep_num_sms"
HAS_ONE_FOR_ALL = OF_ALL in {field.name for field in dataclasses.fields(TransformerConfig)}  # from 0.19 on

NOT_SET = "0 (default)"
ON_ALL_VERSIONS: list[tuple[dict[str, int], str]] = [
    ({}, NOT_SET),
    ({OWN: 24}, "24 (Megatron's SM count)"),
    ({OWN: 20}, NOT_SET),
    ({OTHER: 16}, NOT_SET),
    ({OTHER: 32}, NOT_SET),
    ({OWN: 24, OTHER: 24}, "24 (Megatron's SM count)"),
]
WHERE_ONE_IS_FOR_ALL: list[tuple[dict[str, int], str]] = [
    ({OF_ALL: 24}, "24 (Megatron's SM count)"),
    ({OF_ALL: 20}, NOT_SET),
    ({OF_ALL: 28, OWN: 24}, "28 (Megatron's SM count)"),
    ({OF_ALL: 24, OTHER: 16}, "24 (Megatron's SM count)"),
    ({OF_ALL: 16, OTHER: 16}, NOT_SET),  # as if it were Megatron's copy
]


class Group:
    """Stands for a process group, which a manager only keeps until its first dispatch."""


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Keeps what a test builds alive; the package is installed meanwhile, with no settings of the developer's shell."""
    monkeypatch.delenv(NUM_SMS, raising=False)
    megatron_ep_v2.install(buffer="reference")
    yield []
    megatron_ep_v2.uninstall()


def build(**values: Any) -> Any:
    """The manager of a flex dispatcher, as Megatron builds it for this configuration."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=1,
        num_moe_experts=4,
        use_cpu_initialization=True,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="deepep",
        moe_router_dtype="fp32",
        **values,
    )
    return getattr(token_dispatcher, MANAGER)(Group(), 2, 2, 4, config)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(("values", "wanted"), ON_ALL_VERSIONS + WHERE_ONE_IS_FOR_ALL * HAS_ONE_FOR_ALL, ids=str)
def test_the_count_of_a_configuration(values: dict[str, int], wanted: str, managers: list[Any]) -> None:
    managers.append(build(**values))
    assert settings.active().describe()["num_sms"] == wanted


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_another_backends_count_replaces_no_other(managers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of an earlier model's, nor of the user's, nor when a layer continues after another `install()`."""
    managers += [build(moe_deepep_num_sms=24), build(moe_hybridep_num_sms=16)]
    assert settings.active().describe()["num_sms"] == "24 (Megatron's SM count)"
    megatron_ep_v2.install(buffer="reference", num_sms=12)
    managers[1]._check_installed()
    assert settings.active().describe()["num_sms"] == "12 (install())"
    monkeypatch.setenv(NUM_SMS, "16")
    managers.clear()
    megatron_ep_v2.install(buffer="reference")
    managers.append(build(moe_hybridep_num_sms=16))
    assert settings.active().describe()["num_sms"] == f"16 ({NUM_SMS})"
