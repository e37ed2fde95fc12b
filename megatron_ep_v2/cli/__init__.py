"""The commands of `python -m megatron_ep_v2`."""
