"""The commands of `megatron-ep-v2`, which is `python -m megatron_ep_v2` under a name of its own."""

import sys
from pathlib import Path


def prog() -> str:
    """How this program was started, for usage texts: the console script by its name, or `python -m megatron_ep_v2`."""
    return "megatron-ep-v2" if Path(sys.argv[0]).stem == "megatron-ep-v2" else "python -m megatron_ep_v2"
