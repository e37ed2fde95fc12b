"""All code that imports Megatron-Core: the symbols that `install()` binds, and their replacements."""

from megatron_ep_v2 import cuda_toolkit

cuda_toolkit.provide()  # Megatron imports deep_ep, which looks for a compiler at once
