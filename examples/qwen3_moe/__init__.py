"""Qwen3-MoE on megatron.core, one process per rank: the modules behind `pretrain_qwen3_moe.py`.

presets     model shapes and training recipes
options     the command line, as one frozen dataclass
runtime     process group, device, and how all ranks end together
model       TransformerConfig, layer spec, GPTModel and its initialisation
cpu         what Megatron-Core needs substituted on a machine without CUDA
data        byte-level text, split by file into training and validation
indexed     Megatron's .bin/.idx through megatron.core.datasets
optimizer   gradient reduction, global norm, AdamW on fp32 masters
train       Trainer: one step, one evaluation, the gradients by name
loop        the steps between two checkpoints, and Ctrl-C
checkpoint  one shard per rank, exact resume
progress    progress bar, metrics.jsonl
report      loss plot and the summary
"""
