"""Experts for rows sorted by expert: a SwiGLU MLP on DeepGEMM, on torch's grouped GEMM, or in a loop.

`mlp` is plain PyTorch; `module` has the same experts as Megatron modules, and imports Megatron.
"""
