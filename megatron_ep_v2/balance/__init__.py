"""Overload of ranks, and the plan of redundant experts that remove it.

Dispatch by that plan is in `megatron.redundant`, the weights of replicas in `experts.redundant`.
"""
