"""Packaging of fairseq_powernorm: norms for any PyTorch model, and a plugin for an unmodified fairseq."""
import importlib.util
import pathlib
import re

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

ROOT = pathlib.Path(__file__).parent
KERNELS = pathlib.Path("fairseq_powernorm") / "kernels"
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fairseq_powernorm" / "version.py").read_text(), re.M
).group(1)

# Three distributions own the folder fairseq/; exactly one may be installed.
LINUX = 'sys_platform == "linux" and platform_machine == "x86_64"'
PREBUILT = f'python_version >= "3.11" and python_version < "3.13" and {LINUX}'
ELSEWHERE = (
    'python_version >= "3.11" and (python_version >= "3.13" or sys_platform != "linux" or platform_machine != "x86_64")'
)


class Build(build_py):
    """Copies the modules and compiles the C kernel beside them; without a compiler the torch kernel serves."""

    def run(self):
        super().run()
        spec = importlib.util.spec_from_file_location("kernel_build", ROOT / KERNELS / "build.py")
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        folder = ROOT / KERNELS if getattr(self, "editable_mode", False) else pathlib.Path(self.build_lib) / KERNELS
        try:
            build.build(folder)
        except build.BuildError as error:
            print(f"the C kernel is not built, the torch kernel will serve: {error}")
            if (folder / build.NAME).exists():  # of an earlier build, maybe from other sources
                (folder / build.NAME).unlink()
        self.distribution.compiled = (folder / build.NAME).is_file()


class PartlyCompiled(Distribution):
    """A distribution with a compiled part where there is a compiler, which is known once it has been built."""

    compiled = True

    def has_ext_modules(self):
        return self.compiled


commands = {"build_py": Build}
if bdist_wheel is not None:

    class Wheel(bdist_wheel):
        """The compiled library is plain C: one wheel for all versions of Python and torch on a platform.

        Without it, one wheel for all platforms.
        """

        def run(self):
            self.run_command("build")
            self.root_is_pure = not self.distribution.compiled
            super().run()

        def get_tag(self):
            return ("py3", "none", super().get_tag()[2])

    commands["bdist_wheel"] = Wheel

setup(
    name="fairseq_powernorm",
    version=VERSION,
    description="Power Normalization (Shen et al., ICML 2020): norms for any PyTorch model, and a plugin for fairseq",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_powernorm", "fairseq_powernorm.*"]),
    package_data={"fairseq_powernorm.kernels": ["csrc/*"], "fairseq_powernorm.experiments.data": ["*.tsv"],
                  "fairseq_powernorm.experiments.reports": ["*.html.j2"]},
    cmdclass=commands,
    distclass=PartlyCompiled,
    python_requires=">=3.8",
    # what the plugin needs; the norms need torch only, which is what --no-deps is for
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
        "sentencepiece>=0.2",
        "subword-nmt>=0.3.8",
    ],
    extras_require={
        "data": ["sacremoses>=0.1", "regex"],
        "plots": ["jinja2", "matplotlib", "tensorboard"],
        # hydra 1.0, which fairseq 0.12.2 needs, is too old for it
        "slurm": [f'{name}; python_version >= "3.11"' for name in ("submitit>=1.5", "hydra-submitit-launcher>=1.2")],
        "export": ["onnx>=1.15", "onnxruntime>=1.17"],
        # the lowest versions that their tests pass with: tests/checks/integrations.sh
        "integrations": [
            f'{name}; python_version >= "3.9"' for name in ("accelerate>=1.6.0", "lightning>=2.5.0", "transformers>=4.57.1")
        ],
        # Triton's kernels are interpreted where there is no GPU; torch >= 2.5 for CUDA brings one that fits
        "test": [
            "pytest>=7", "pytest-xdist>=3", "onnx>=1.15", "onnxruntime>=1.17",
            "mosestokenizer>=1.2",  # Moses' Perl scripts, which judge ours
            # style and types: another version would find other faults
            "ruff>=0.17,<0.18",
            'mypy>=2.4,<2.5; python_version >= "3.11"',
            'triton>=3.1; python_version >= "3.9" and sys_platform == "linux" and platform_machine == "x86_64"',
        ],
    },
)
