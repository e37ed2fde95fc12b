"""Qwen3-MoE with Megatron-Bridge: one of its pretraining recipes for H100, on megatron_ep_v2.

    torchrun --nproc-per-node 8 examples/configs/megatron_bridge_qwen3.py
    torchrun ... examples/configs/megatron_bridge_qwen3.py qwen3_235b_a22b_pretrain_256gpu_h100_bf16_config

Written for Megatron-Bridge 0.6.2. A recipe's name says for how many GPUs it is; the model's configuration and the
tokenizer come from the Hugging Face hub, the data are made up until `dataset` is set. The older name
`qwen3_30b_a3b_pretrain_config` now stands for the recipe for 16 GPUs, on HybridEP.
"""

from __future__ import annotations

import sys
from typing import Any

import megatron_ep_v2


def on_flex_dispatcher(config: Any) -> Any:
    """The recipe's configuration, with the dispatcher that megatron_ep_v2 binds, and probabilities in fp32.

    The recipe itself chooses by the name of the GPU whether to use the flex dispatcher, and falls back to alltoall with
    a line in the log. After this Bridge refuses such a GPU (GB200, GB300) when training starts.
    """
    config.model.moe_token_dispatcher_type = "flex"
    config.model.moe_flex_dispatcher_backend = "deepep"
    config.model.moe_shared_expert_overlap = False
    config.model.moe_router_dtype = "fp32"
    config.model.moe_hybridep_num_sms = None  # megatron-core 0.19 would copy it into the count of all backends
    return config


def main(name: str = "qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config") -> None:
    megatron_ep_v2.install()  # experts="grouped" trains the 30B faster; Hugging Face conversions want Megatron's own
    from megatron.bridge.recipes.qwen import h100
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(on_flex_dispatcher(getattr(h100, name)()), forward_step)


if __name__ == "__main__":
    main(*sys.argv[1:])
