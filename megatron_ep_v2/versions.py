"""The versions that this package needs and is tested with, as errors and the doctor name them.

pyproject.toml, constraints.txt, docker/ and docs/ have to repeat them: `tests/test_versions.py` compares.
"""

PYTHON = "3.10"

MEGATRON_CORE = "0.16.1 to 0.19.2"  # constraints.txt has both ends
MEGATRON_CORE_SERIES = "0.16 to 0.19"

TORCH = "2.4"
TORCH_GROUPED_GEMM = "2.8"  # torch._grouped_mm, which the kinds of experts "grouped" and "deepgemm" need
TORCH_DEEP_EP_V2 = "2.10"  # says DeepEP V2

DEEP_EP_V2 = "2.1.0"
NCCL = "2.30.4"  # deep_ep 2.1.0's README; below 2.31 it asks for the very version that it was built with
