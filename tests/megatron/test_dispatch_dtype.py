"""What rows travel as: by name, or as the model's recipe says; logged once, with the reason, never changed silently."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_ep_v2
from megatron_ep_v2 import settings
from megatron_ep_v2.buffers import pool
from megatron_ep_v2.buffers.reference import ReferenceBuffer
from megatron_ep_v2.errors import SettingsError
from megatron_ep_v2.settings import resolve, settle_dispatch_dtypes
from megatron_ep_v2.wire.formats import dtype_of_recipe
from tests.helpers.compare import relative_error
from tests.helpers.harness import run_ranks
from tests.helpers.megatron_layer import FlexLayer, hidden_states, installed, transformer_config
from tests.helpers.reports import log_records
from tests.helpers.shapes import Shape, Split

EP2 = Split(1, 2)
SHAPE = Shape(torch.bfloat16, hidden=256)
BOTH = ("dispatch_dtype", "grad_dispatch_dtype")


@pytest.fixture(autouse=True)
def _fresh_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in BOTH:
        monkeypatch.delenv(settings.variable(name), raising=False)
    settings.activate(None)
    yield
    settings.activate(None)


# --------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8", "mxfp8"])
def test_the_names_of_the_dtypes(name: str, dtype: str) -> None:
    assert getattr(resolve({settings.variable(name): dtype.upper()}), name) == dtype
    assert getattr(resolve({}, **{name: dtype}), name) == dtype
    assert getattr(resolve({}), name) == "auto"


@pytest.mark.parametrize("name", BOTH)
def test_nvfp4_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(SettingsError, match="nvfp4") as caught:
        resolve({settings.variable(name): "nvfp4"})
    text = str(caught.value)
    assert "one of auto, bf16, fp8, mxfp8" in text and settings.variable(name) in text
    assert "nvfp4 is not carried: deep_ep takes 8-bit values" in text


def test_what_is_asked_for_by_name_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCORE_DEEPEP_V2_GRAD_DISPATCH_DTYPE", "fp8")
    settings.activate(resolve(dispatch_dtype="mxfp8"))
    settle_dispatch_dtypes("bf16", "the model trains without FP8")
    described = settings.active().describe()
    assert described["dispatch_dtype"] == "mxfp8 (install())"
    assert described["grad_dispatch_dtype"] == "fp8 (MCORE_DEEPEP_V2_GRAD_DISPATCH_DTYPE)"


# ---------------------------------------------------------------------------------------------------------- auto


class Fp8Recipe(str, enum.Enum):
    """Megatron takes the enum or its text."""

    blockwise = "blockwise"
    mxfp8 = "mxfp8"


RECIPES: list[tuple[dict[str, Any], tuple[int, int] | None, str, str]] = [
    ({"fp8": None, "fp8_recipe": "delayed"}, (9, 0), "bf16", "without FP8"),
    ({"fp8": None, "fp8_recipe": "blockwise"}, (9, 0), "bf16", "without FP8"),
    ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, (9, 0), "fp8", "blockwise"),
    ({"fp8": "hybrid", "fp8_recipe": Fp8Recipe.blockwise}, (10, 0), "fp8", "blockwise"),
    ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, None, "fp8", "blockwise"),
    ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, (10, 0), "mxfp8", "mxfp8"),
    ({"fp8": "e4m3", "fp8_recipe": Fp8Recipe.mxfp8}, (10, 3), "mxfp8", "mxfp8"),
    ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, (9, 0), "bf16", "no GPU of compute capability 10.0"),
    ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, None, "bf16", "no GPU of compute capability 10.0"),
    ({"fp8": "hybrid", "fp8_recipe": "delayed"}, (9, 0), "bf16", "delayed"),
    ({"fp8": "hybrid", "fp8_recipe": "tensorwise"}, (9, 0), "bf16", "tensorwise"),
    ({"fp8": "hybrid", "fp8_recipe": "custom"}, (9, 0), "bf16", "custom"),
    ({"fp8": None, "fp8_recipe": "delayed", "fp4": "e2m1"}, (10, 0), "bf16", "FP4"),
]


@pytest.mark.parametrize(("config", "capability", "dtype", "word"), RECIPES)
def test_auto_follows_the_recipe(
    config: dict[str, Any], capability: tuple[int, int] | None, dtype: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    chosen, reason = dtype_of_recipe(SimpleNamespace(**config))
    assert chosen == dtype and word in reason


@pytest.mark.parametrize("by_name", [False, True])
def test_auto_is_settled_once(by_name: bool) -> None:
    settings.activate(resolve(dispatch_dtype="auto" if by_name else None))
    settle_dispatch_dtypes("fp8", "recipe A")
    settle_dispatch_dtypes("fp8", "recipe B")
    assert [settings.active().describe()[name] for name in BOTH] == ["fp8 (auto: recipe A)"] * 2
    with pytest.raises(SettingsError, match="cannot follow two models") as caught:
        settle_dispatch_dtypes("bf16", "the model trains without FP8")
    assert "fp8 (auto: recipe A)" in str(caught.value) and "bf16 (auto: the model trains without FP8)" in str(
        caught.value
    )
    assert "MCORE_DEEPEP_V2_DISPATCH_DTYPE to one of bf16, fp8, mxfp8" in str(caught.value)
    assert settings.active().dispatch_dtype == "fp8"


# -------------------------------------------------------------------------------------------- auto, in Megatron's layer


def set_recipe(monkeypatch: pytest.MonkeyPatch, recipe: str | None) -> None:
    """From now on layers are those of a model with this fp8_recipe; None = one that trains without FP8."""

    def config_of(*shapes: Any, **more: Any) -> Any:
        config = transformer_config(*shapes, **more)
        if recipe is not None:  # set afterwards: the configuration itself would ask for TransformerEngine
            config.fp8, config.fp8_recipe = "e4m3", recipe
        return config

    monkeypatch.setattr("tests.helpers.megatron_layer.transformer_config", config_of)


def run_recipe(group: Any, recipe: str | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a model. What was logged, what travelled, the output against the dense layer's."""
    travelled = []
    original = ReferenceBuffer.dispatch

    def dispatch(self: Any, x: Any, **arguments: Any) -> Any:
        parts = x if isinstance(x, tuple) else (x,)
        travelled.append([str(part.dtype).removeprefix("torch.") for part in parts])
        return original(self, x, **arguments)

    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        log_records(level=logging.INFO) as records,
        installed(EP2, **chosen),
    ):
        settled_before = settings.active().dispatch_dtype
        monkeypatch.setattr(ReferenceBuffer, "dispatch", dispatch)
        set_recipe(monkeypatch, recipe)
        layer = FlexLayer(SHAPE, EP2)
        for _ in range(2):
            hidden = hidden_states(SHAPE, 20).requires_grad_()
            output = layer(hidden)
            output.backward(hidden_states(SHAPE, 20, seed=1))
        expected = layer.dense(hidden)
        return {
            "before": settled_before,
            "log": [line for line in (record.getMessage() for record in records) if "dispatch_dtype" in line],
            "travelled": travelled,
            "error": relative_error(output, expected),
            "settings": {name: megatron_ep_v2.status()["settings"][name] for name in BOTH},
            "buffer": {name: megatron_ep_v2.status()["buffers"][0][name] for name in BOTH},
        }


PLAIN, FP8, MXFP8 = ["bfloat16"], ["float8_e4m3fn", "float32"], ["float8_e4m3fn", "int32"]
RUNS: dict[str, tuple[str | None, dict[str, Any], str, list[str], list[str]]] = {
    # recipe, install(), what is reported, what travels forward and backward
    "bf16 model": (None, {}, "bf16 (auto: the model trains without FP8)", PLAIN, PLAIN),
    "blockwise": ("blockwise", {}, "fp8 (auto: the model's fp8_recipe is blockwise, with the same groups)", FP8, FP8),
    "mxfp8, but no such GPU": ("mxfp8", {}, "bf16 (auto: the model's fp8_recipe is mxfp8, but", PLAIN, PLAIN),
    "delayed": ("delayed", {}, "bf16 (auto: the model's fp8_recipe is delayed, which", PLAIN, PLAIN),
    "by name": (
        "blockwise",
        {"dispatch_dtype": "mxfp8", "grad_dispatch_dtype": "bf16"},
        "mxfp8 (install())",
        MXFP8,
        PLAIN,
    ),
    "compact": ("blockwise", {"layout": "compact"}, "bf16 (auto: no model with an fp8_recipe in", PLAIN, PLAIN),
    "compact, by name": (
        None,
        {"layout": "compact", "dispatch_dtype": "fp8", "grad_dispatch_dtype": "mxfp8"},
        "fp8 (install())",
        FP8,
        MXFP8,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_model_of_megatron(name: str) -> None:
    recipe, chosen, reported, forward, backward = RUNS[name]
    for found in run_ranks(2, run_recipe, recipe, chosen):
        assert found["before"] == chosen.get("dispatch_dtype", "auto")
        assert found["travelled"] == [forward, backward] * 2
        assert found["settings"]["dispatch_dtype"].startswith(reported)
        assert found["buffer"] == found["settings"]
        [line] = found["log"]  # once, in two steps
        assert all(f"{key} {value}" in line for key, value in found["settings"].items())
        assert found["error"] < 0.05


def build_two_models(group: Any) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch, installed(EP2):
        FlexLayer(SHAPE, EP2)(hidden_states(SHAPE, 4))
        set_recipe(monkeypatch, "blockwise")
        with pytest.raises(SettingsError, match="cannot follow two models") as caught:
            FlexLayer(SHAPE, EP2)
        assert len(pool.buffers()) == 1 and settings.active().dispatch_dtype == "bf16"
        return str(caught.value)


def test_a_second_model_with_another_recipe_is_refused() -> None:
    for text in run_ranks(2, build_two_models):
        assert "bf16 (auto: the model trains without FP8)" in text and "fp8 (auto: the model's fp8_recipe" in text


def test_the_configuration_has_the_fields_that_are_read() -> None:
    config = transformer_config(SHAPE, Split(1, 1), expert_model_parallel_size=1)
    assert config.fp8 is None and config.fp8_recipe == "delayed" and config.params_dtype == torch.bfloat16
    assert dtype_of_recipe(config)[0] == "bf16"
