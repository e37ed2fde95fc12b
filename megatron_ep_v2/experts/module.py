"""The old name of `megatron_ep_v2.megatron.experts`, from which users' layer specs import `use_experts`."""

from megatron_ep_v2.megatron.experts import *  # noqa: F403
