"""The benchmark of `python -m megatron_ep_v2 bench`: Megatron's dispatchers side by side, right results first."""
