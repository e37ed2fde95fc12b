"""Experts for rows that are sorted by expert: a SwiGLU MLP on DeepGEMM, on torch's grouped GEMM, or in a loop.

`mlp` is plain PyTorch; `module` is the same as a Megatron module, and imports megatron.
"""
