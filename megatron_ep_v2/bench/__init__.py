"""The benchmark `python -m megatron_ep_v2 bench`: compares Megatron's dispatchers, after checking their results."""
