"""The old name of `megatron_ep_v2.megatron.experts`, from which layer specs of users' own import `use_experts`."""

from megatron_ep_v2.megatron.experts import *  # noqa: F403
