"""`bench --step` and `--tune`: whole training steps of a Qwen3-MoE.

One model in one process; between steps only its token dispatchers and its experts are exchanged, and all kinds of
experts are views of the same weights and gradients. So each of them meets the same weights, the same tokens and, with a
learning rate of 0, the same routing in every step.
"""
