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
NCCL_25 = "2.32.3"  # says DeepEP 2.5's check at import
NVCC = "12.3"  # deep_ep 2.1.0's README
NVCC_BLACKWELL = "12.8"
NVCC_25 = "13.1"  # says the check of DeepEP 2.5's wheel at import

_NVCC = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-cccl")
# Generation, and its compiler as wheels of one CUDA version, which lie in one folder. NCCL's headers ask for CCCL's,
# which refuse a compiler of another version than the runtime's headers, and torch brings the latter, those of 13.0.
# There is no wheel of cuobjdump 13.0; from 13.5 on its -symbols prints FUNC for STT_FUNC, which DeepEP 2.1 looks for.
CUOBJDUMP_BELOW = "13.5"
NVCC_WHEELS = (
    ("2.1", *(f"nvidia-{part}==13.0.*" for part in _NVCC), f"nvidia-cuda-cuobjdump<{CUOBJDUMP_BELOW}"),
    ("2.5", *(f"nvidia-{part}==13.1.*" for part in _NVCC)),
)
# What has to replace wheels that torch pins: installed after torch, without their dependencies.
CUDA_RUNTIME_25 = "nvidia-cuda-runtime==13.1.*"

# Wheels of DeepEP on the package registry: generation, distribution, its version, the torch to install with it, the
# NCCL to install over torch's (None = torch's own fits). docs/compatibility.md says which of them ran where.
# The first of a generation is the one to install where torch can be chosen.
WHEELS = (
    ("2.1", "sgl-deep-ep", "0.1.2.post1", "2.14.1", None),
    ("2.1", "tokenspeed-deepep", "2.1.0.post20260801", "2.11.0", "==2.30.7"),
    ("2.1", "tokenspeed-deepep", "2.1.0.post20260801", "2.12.0", "==2.30.7"),
    ("2.1", "tokenspeed-deepep", "2.1.0.post20260810", "2.13.0", "==2.30.7"),
    ("2.5", "sgl-deep-ep-v25", "0.1.0rc0", "2.14.1", f">={NCCL_25}"),
)
