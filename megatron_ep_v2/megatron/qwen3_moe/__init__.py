"""A Qwen3-MoE on megatron.core and a training step of it: what `bench --step` times and the example trains.

options.py       sizes, recipe, and how the model is built
model.py         the GPTModel: configuration, layer spec, initialisation, parameter names
cpu.py           what Megatron needs substituted on a machine without CUDA
optimizer.py     gradients in fp32, AdamW on fp32 masters
trainer.py       one step, one evaluation
expert_kinds.py  several kinds of experts in one model, on the same weights
"""
