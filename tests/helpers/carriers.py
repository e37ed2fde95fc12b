"""The carrier of DeepEP V2 that is installed here. The tests on GPUs name no carrier themselves, so a new row of
`buffers.carriers.CARRIERS` is tested by all of them."""

from __future__ import annotations

import importlib
from typing import Any


def v2_carrier() -> str:
    """Its name in CARRIERS. No environment has two of them: each generation of deep_ep needs an NCCL of its own."""
    from megatron_ep_v2.probe import probe  # not above: a job looks at a Megatron without this package

    name = probe().v2_carrier
    assert name is not None, probe().describe()
    return name


def buffer_class(name: str) -> Any:
    """The class of a carrier, made as `class(group, spec, settings, hosts)`."""
    from megatron_ep_v2.buffers.carriers import CARRIERS

    module, attribute = CARRIERS[name].path
    return getattr(importlib.import_module(module), attribute)
