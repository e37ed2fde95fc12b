"""Qwen3-MoE with Megatron-Bridge: its pretraining recipe, on megatron_ep_v2.

    torchrun --nproc-per-node 8 examples/configs/megatron_bridge_qwen3.py qwen3_30b_a3b

Written for Megatron-Bridge 0.3.1, which runs on megatron-core 0.16. qwen3_235b_a22b needs 128 GPUs.
"""

from __future__ import annotations

import sys
from typing import Any

import megatron_ep_v2


def on_flex_dispatcher(config: Any) -> Any:
    """The recipe's configuration, with the dispatcher that megatron_ep_v2 binds, and probabilities in fp32.

    The recipe itself chooses by the name of the GPU whether to use the flex dispatcher.
    """
    config.model.moe_token_dispatcher_type = "flex"
    config.model.moe_flex_dispatcher_backend = "deepep"
    config.model.moe_shared_expert_overlap = False
    config.model.moe_router_dtype = "fp32"
    return config


def main(name: str = "qwen3_30b_a3b") -> None:
    megatron_ep_v2.install()  # experts="grouped" trains the 30B faster; Hugging Face conversions want Megatron's own
    from megatron.bridge.recipes import qwen
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    recipe = getattr(qwen, f"{name}_pretrain_config")
    pretrain(on_flex_dispatcher(recipe()), forward_step)


if __name__ == "__main__":
    main(*sys.argv[1:])
