"""Imported by the server that ranks are forked from: what costs seconds to import, and nothing done with it."""

from __future__ import annotations

import gc
import importlib
import os
import warnings

gc.disable()  # in the server; ranks begin with gc.enable()
NAMES = ["torch.distributed"]
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # where there are GPUs, what Megatron imports may open them
    parts = ("datasets.gpt_dataset", "dist_checkpointing", "distributed", "models.gpt.gpt_layer_specs", "optimizer")
    NAMES += [*(f"megatron.core.{part}" for part in parts), "megatron.core.models.gpt.gpt_model"]
    NAMES += ["matplotlib.pyplot", "pytest"]
with warnings.catch_warnings():  # Megatron says which optional packages it does not find
    warnings.simplefilter("ignore")
    for name in NAMES:
        importlib.import_module(name)
gc.freeze()  # a collection in a rank then passes all of it by, and copies no page of it
