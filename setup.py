"""What pyproject.toml cannot say: patches/ lies next to the package in the source tree, inside it once installed."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_ep_v2", "megatron_ep_v2.*"]), "megatron_ep_v2.patches"],
    package_dir={"megatron_ep_v2.patches": "patches"},
)
