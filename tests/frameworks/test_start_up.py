"""How frameworks start: the lines of docs/frameworks.md, in the ways in which each framework published that it loads a
user's module or calls a user's function, against our hook.

The frameworks are stand-ins of a few lines. Each follows the files of the version that its comment names, and imports
Megatron where that one does. Megatron is an empty one with a witness (see `tests/cli/test_auto.py`), so that a new
interpreter takes no seconds; `tests/cli/test_auto.py` trains in processes that start in these ways.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest

from megatron_ep_v2 import settings
from tests.cli.test_auto import environment, ep, hooked, last_json, run
from tests.helpers.megatron_layer import transformer_config
from tests.helpers.paths import ROOT
from tests.helpers.shapes import CPU, Split
from tests.helpers.stacks import on_one_stack

__all__ = ["environment", "hooked"]  # fixtures

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
CAPACITY = settings.variable("num_max_tokens_per_rank")
BOUND = ["in moe_layer", "install"]


def snippets(section: str) -> str:
    """The code blocks of a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```\w*\n(.+?)^```", text, re.MULTILINE | re.DOTALL))


def flag(section: str, name: str) -> str:
    """The value of a flag of a section's command, or of a `name=value`."""
    (value,) = set(re.findall(rf"(?<![\w.]){re.escape(name)}[= ]('[^']*'|\S+)", snippets(section)))
    return value.strip("'")


SECTIONS = ["Megatron-LM", "Megatron-Bridge", "NeMo-RL", "verl", "slime", "ms-swift and mcore-bridge", "ROLL"]


@pytest.mark.parametrize("section", SECTIONS)
def test_its_fields_choose_the_dispatcher_that_is_bound(section: str) -> None:
    """In Megatron's own configuration, whose defaults the framework leaves where the page sets nothing."""
    given = re.findall(r'(moe[_-][\w-]+)(?:\s*[=:]\s*|\s+)?"?(\w*)', snippets(section))
    chosen: dict[str, Any] = {name.replace("-", "_"): value for name, value in given}
    if "moe_enable_deepep" in chosen:
        chosen["moe_enable_deepep"] = True
    assert chosen["moe_router_dtype"] == "fp32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # Megatron's, of moe_enable_deepep
        config = transformer_config(CPU, Split(1, 2), **{"moe_token_dispatcher_type": "alltoall"} | chosen)
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")


@pytest.mark.parametrize("section", ["NeMo-RL", "verl", "slime", "ms-swift and mcore-bridge", "ROLL"])
def test_its_capacity_is_a_setting(section: str) -> None:
    (value,) = re.findall(rf"{CAPACITY}\W+(\d+)", snippets(section))
    assert settings.resolve({CAPACITY: value}).num_max_tokens_per_rank == int(value)


# ------------------------------------------------------------------------------------- a module, or a function, by name

# verl 0.10.0.dev (1dda039): verl/__init__.py, verl/utils/import_utils.py, verl/workers/config/model.py,
# verl/workers/engine/megatron/transformer_impl.py.
VERL = """
import importlib, os

def import_external_libs(names):
    for name in [] if names is None else names if isinstance(names, list) else [names]:
        importlib.import_module(name)

if os.getenv("VERL_USE_EXTERNAL_MODULES"):
    import_external_libs(os.environ["VERL_USE_EXTERNAL_MODULES"].split(","))
"""
VERL_WORKER = """
import megatron.core.transformer.moe.moe_layer
from verl import import_external_libs

class ModelConfig:
    def __init__(self, external_lib=None):
        import_external_libs(external_lib)
"""


@on_one_stack
def test_verl(hooked: Any, tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").write_text(VERL)
    (tmp_path / "verl" / "worker.py").write_text(VERL_WORKER)
    names = flag("verl", "VERL_USE_EXTERNAL_MODULES")
    source = "import os\nos.environ['VERL_USE_EXTERNAL_MODULES'] = {!r}\nimport verl\nresult = [list(events)]\n"
    source += "from verl.worker import ModelConfig\nresult.append(list(events))\n"
    source += "ModelConfig(external_lib={!r})\nresult.append(events)"
    assert hooked(source.format(names, None)) == [[], BOUND, BOUND]
    library = flag("verl", "actor_rollout_ref.model.external_lib")
    assert hooked(source.format("", library)) == [[], ["in moe_layer"], BOUND]
    assert hooked(source.format("", None))[-1] == ["in moe_layer"], "without either it is Megatron's own"


# slime 0.3.1 (624b824): slime/backends/megatron_utils/initialize.py, slime/utils/misc.py.
SLIME = """
def load_function(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)

def init(args):
    import megatron.core.parallel_state
    load_function(args.custom_megatron_init_path)(args)

import megatron.core.transformer.moe.moe_layer
from types import SimpleNamespace
"""


@on_one_stack
def test_slime(hooked: Any) -> None:
    path, variables = flag("slime", "--custom-megatron-init-path"), json.loads(flag("slime", "--train-env-vars"))
    assert set(variables) == {CAPACITY} and all(isinstance(value, str) for value in variables.values())
    source = f"{SLIME}\ninit(SimpleNamespace(custom_megatron_init_path={path!r}, seq_length=4096))\nresult = events"
    seen = hooked(source)
    assert seen == [*BOUND, "install"], "by the import, and by the call, which finds it done"


# ms-swift 4.6.0.dev (3602360): swift/utils/utils.py (import_external_file), swift/arguments/base_args/base_args.py.
SWIFT = """
import argparse, os
parser = argparse.ArgumentParser()
parser.add_argument("--external_plugins", nargs="+", default=[])
for file in parser.parse_args({arguments!r}).external_plugins:
    folder, name = os.path.split(os.path.abspath(file))
    sys.path.insert(0, folder)
    importlib.import_module(name.split(".", 1)[0])
result = [list(events)]
import megatron.core.transformer.moe.moe_layer
result.append(events)
"""


@on_one_stack
def test_ms_swift(hooked: Any, tmp_path: Path) -> None:
    (name,) = re.findall(r"A file `(\w+\.py)` with one line, `(.+?)`", PAGE)
    assert flag("ms-swift and mcore-bridge", "--external_plugins") == name[0]
    plugin = tmp_path / "elsewhere" / name[0]
    plugin.parent.mkdir()
    plugin.write_text(name[1])
    assert hooked(SWIFT.format(arguments=["--external_plugins", str(plugin)])) == [[], BOUND]
    assert hooked(SWIFT.format(arguments=[])) == [[], ["in moe_layer"]]


# ------------------------------------------------------------------------------------------ an interpreter of Ray's own

# NeMo-RL main (7ea279a): nemo_rl/distributed/worker_groups.py, nemo_rl/utils/venvs.py: the worker is a Python of a
# virtual environment, with the driver's variables and those of `megatron_cfg.env_vars`.
# ROLL main (8eb27cc): roll/distributed/executor/cluster.py: the variables of Ray's processes and of `system_envs`.
WORKER = """
import json, sys
seen = ["megatron_ep_v2.auto" in sys.modules, "torch" in sys.modules]
from megatron_ep_v2 import settings
print(json.dumps([*seen, settings.resolve().num_max_tokens_per_rank]))
"""


@on_one_stack
@pytest.mark.parametrize("section", ["NeMo-RL", "ROLL"])
def test_workers_of_ray(section: str, environment: tuple[Path, Path]) -> None:
    interpreter, _ = environment
    assert "-m megatron_ep_v2 auto enable" in PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert ep(interpreter, "auto", "enable")[0] == 0
    variables = dict(re.findall(rf'^ +({settings.PREFIX}\w+): "(\w+)"', snippets(section), re.MULTILINE))
    assert set(variables) == {settings.AUTO, CAPACITY}
    venv = {"VIRTUAL_ENV": str(interpreter.parents[1]), "UV_PROJECT_ENVIRONMENT": str(interpreter.parents[1])}
    more = venv if section == "NeMo-RL" else {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    capacity = int(variables[CAPACITY])
    assert last_json(run("-c", WORKER, interpreter=interpreter, **variables, **more)) == [True, False, capacity]
    others = {CAPACITY: variables[CAPACITY], **more}
    assert last_json(run("-c", WORKER, interpreter=interpreter, **others)) == [False, False, capacity]


# mcore_adapter main (8eb27cc): mcore_adapter/src/mcore_adapter/training_args.py (the field, its parser of a command
# line) and models/model_config.py (update_with_args); roll/distributed/strategy/megatron_strategy.py (no parser).
@dataclass
class TrainingArguments:
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = "allgather"
    moe_router_dtype: str | None = None
    additional_configs: dict[str, Any] | None = None

    @classmethod
    def of_command_line(cls, arguments: list[str]) -> TrainingArguments:
        parser = argparse.ArgumentParser(exit_on_error=False)
        for name, hint in get_type_hints(cls).items():
            parser.add_argument(f"--{name}", choices=get_args(hint) if name == "moe_token_dispatcher_type" else None)
        return cls(**{name: value for name, value in vars(parser.parse_args(arguments)).items() if value})

    def update(self, model: dict[str, Any]) -> dict[str, Any]:
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "additional_configs"}
        return model | (self.additional_configs or {}) | own


@on_one_stack
def test_roll() -> None:
    strategy = dict(re.findall(r"^      (moe_\w+): (\w+)$", snippets("ROLL"), re.MULTILINE))
    assert TrainingArguments(**strategy).update({})["moe_token_dispatcher_type"] == "flex"
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'flex'"):
        TrainingArguments.of_command_line(["--moe_token_dispatcher_type", "flex"])
    both = TrainingArguments("alltoall", additional_configs=strategy)
    assert both.update({})["moe_token_dispatcher_type"] == "alltoall", "the field is written over it"
