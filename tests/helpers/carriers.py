"""The carrier of DeepEP V2 that is installed here. The tests on GPUs name no carrier themselves, so a new row of
`buffers.carriers.CARRIERS` is tested by all of them."""

from __future__ import annotations

import importlib
from typing import Any


def v2_carrier() -> str:
    """Its name in CARRIERS. No environment has two of them: each generation of deep_ep needs an NCCL of its own."""
    from megatron_ep_v2.buffers.carriers import CARRIERS  # not above: a job looks at a Megatron without this package
    from megatron_ep_v2.probe import probe

    found = [name for name in probe().carriers if CARRIERS[name].is_v2]
    assert found, probe().describe()
    return found[0]


def buffer_class(name: str) -> Any:
    """The class of a carrier, made as `class(group, spec, settings, hosts)`."""
    from megatron_ep_v2.buffers.carriers import CARRIERS

    module, attribute = CARRIERS[name].path
    return getattr(importlib.import_module(module), attribute)
