"""Job: Megatron's own parser reads the flags of examples/configs. Prints one JSON document: config -> what came out.

Arguments: config=flags, the flags separated by the unit separator. CUDA is asked for its generation only: a Hopper.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from megatron.training import arguments


def parse(flags: list[str], gpus: int) -> dict[str, Any]:
    sys.argv = ["pretrain_gpt.py", *flags]
    os.environ.update(RANK="0", WORLD_SIZE=str(gpus), CUDA_DEVICE_MAX_CONNECTIONS="1")
    args = arguments.parse_args()
    arguments.validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    # TransformerConfig asks whether TransformerEngine is there for them.
    args.moe_permute_fusion = args.apply_rope_fusion = False
    config = arguments.core_transformer_config_from_args(args)
    values = vars(args) | vars(config)
    return {name: value for name, value in values.items() if value is None or isinstance(value, (str, int, float))}


def main() -> None:
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: type("Hopper", (), {"major": 9, "minor": 0})()
    found = {}
    for argument in sys.argv[1:]:
        name, gpus, flags = argument.split("=", 2)
        found[name] = parse(flags.split("\x1f"), int(gpus))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
