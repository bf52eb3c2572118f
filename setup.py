"""Packaging of fairseq_powernorm, a plugin for an unmodified fairseq."""
import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fairseq_powernorm" / "version.py").read_text(), re.M
).group(1)

# Three distributions own the folder fairseq/; exactly one may be installed.
PREBUILT = 'python_version >= "3.11" and python_version < "3.13" and sys_platform == "linux" and platform_machine == "x86_64"'
ELSEWHERE = 'python_version >= "3.11" and (python_version >= "3.13" or sys_platform != "linux" or platform_machine != "x86_64")'

setup(
    name="fairseq_powernorm",
    version=VERSION,
    description="Power Normalization (Shen et al., ICML 2020) for Transformers, as a fairseq plugin",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_powernorm", "fairseq_powernorm.*"]),
    python_requires=">=3.8",
    install_requires=[
        "torch>=2.4",
        "numpy",
        "packaging",
        'fairseq==0.12.2; python_version < "3.11"',
        f"ve-fairseq==0.12.3; {PREBUILT}",
        f"fairseq-fixed==0.12.3.1; {ELSEWHERE}",
        'hydra-core>=1.3.2,<1.4; python_version >= "3.11"',
        'omegaconf>=2.3,<2.4; python_version >= "3.11"',
        "sacrebleu>=2.0",
    ],
    extras_require={
        "data": ["sacremoses>=0.1", "subword-nmt>=0.3.8", "sentencepiece>=0.2"],
        "plots": ["matplotlib", "tensorboard"],
        # hydra 1.0, which fairseq 0.12.2 needs, is too old for it
        "slurm": [f'{name}; python_version >= "3.11"' for name in ("submitit>=1.5", "hydra-submitit-launcher>=1.2")],
        "test": ["pytest>=7", "pytest-xdist>=3"],
    },
)
