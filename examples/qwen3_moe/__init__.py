"""Qwen3-MoE on megatron.core, one process per rank: the modules behind `pretrain_qwen3_moe.py`.

presets     model shapes and training recipes
options     the command line, as one frozen dataclass
runtime     process group, device, and how all ranks end together
data        byte-level text, split by file into training and validation
indexed     Megatron's .bin/.idx through megatron.core.datasets
loop        the steps between two checkpoints, and Ctrl-C
checkpoint  one shard per rank, exact resume
progress    progress bar, metrics.jsonl
report      loss plot and the summary

The model, its optimizer and its training step are `megatron_ep_v2.megatron.qwen3_moe`, for `bench --step` times them.
"""
