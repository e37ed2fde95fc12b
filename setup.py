"""What pyproject.toml cannot say: patches/ and the example that `train` runs lie next to the package in the source
tree, inside it once installed."""

from setuptools import find_packages, setup

BESIDE = {
    "megatron_ep_v2.patches": "patches",
    "megatron_ep_v2.examples": "examples",
    "megatron_ep_v2.examples.qwen3_moe": "examples/qwen3_moe",
}

setup(
    packages=[*find_packages(include=["megatron_ep_v2", "megatron_ep_v2.*"]), *BESIDE],
    package_dir=BESIDE,
)
