"""Source distribution, wheels, and a checkout that hides an installation, each used from a folder of its own."""
import fnmatch
import pathlib
import shutil
import tarfile
import zipfile

import pytest
import toy
from test_cli import train

from fairseq_powernorm.kernels import build

pytestmark = pytest.mark.slow

MADE_AT_THE_TOP = (".git", ".venv*", "data", "runs", "build", "dist", "outputs", "multirun", "checkpoints")
MADE_ANYWHERE = ("__pycache__", "*.egg-info", "*.so", "*.failed", ".*_cache")


def copy_checkout(source, target):
    """Copy what is part of the source."""

    def ignore(folder, names):
        patterns = MADE_ANYWHERE + (MADE_AT_THE_TOP if pathlib.Path(folder) == source else ())
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    shutil.copytree(source, target, ignore=ignore)


NO_COMPILER = dict(CC="there-is-no-compiler")
HAS_COMPILER = any(map(shutil.which, ("cc", "gcc", "clang")))
with_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler: nothing compiled can be packaged")

STEP = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from fairseq_powernorm.norms import PowerNorm
x = torch.randn(5, 3, 8, requires_grad=True)
PowerNorm(8)(x).sum().backward()
import fairseq_powernorm
print(fairseq_powernorm.__file__)
"""
REGISTERED = """
import fairseq_powernorm.register
from fairseq.models import ARCH_MODEL_REGISTRY
print("registered:", "transformer_pn_tiny" in ARCH_MODEL_REGISTRY)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """A source distribution of this checkout, unpacked; without git and without anything built."""
    folder = tmp_path_factory.mktemp("sdist")
    copy_checkout(toy.ROOT, folder / "checkout")
    toy.command("python", "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


#: in place of a compiler, which takes seconds: puts the checkout's library, which is of these sources, where it is told to
COPY = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
cp "{library}" "$2"
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """The variables that say what compiles: the C kernel only, and nothing where there is no compiler at all."""
    if not HAS_COMPILER:
        return {}
    program = tmp_path_factory.mktemp("compiler") / "cc"
    program.write_text(COPY.format(library=build.HERE / build.NAME))
    program.chmod(0o755)
    return dict(CC=str(program), CXX="there-is-no-compiler")


def pip(*words, cwd, **environment):
    toy.command("python", "-m", "pip", *words, cwd=cwd, **environment)


def wheel(source, folder, **environment):
    """Build a wheel of a source folder; the only one in ``folder``."""
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder, **environment)
    (found,) = folder.glob("*.whl")
    return found


def install(archive, site, program=STEP):
    """What pip does with a wheel's modules; then a program with them, from an empty folder: what it printed."""
    pip("install", "-q", "--no-deps", "--target", site, archive, cwd=archive.parent)
    empty = archive.parent / "empty"
    empty.mkdir()
    done = toy.command("python", "-c", program, cwd=empty, PYTHONPATH=str(site))
    assert str(site) in done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(sdist, compiler, tmp_path_factory):
    """A wheel of the source distribution, made where there may be a compiler; the folder in which it is installed; and what
    was printed there by a training step and a registration."""
    folder = tmp_path_factory.mktemp("installed")
    made = wheel(sdist, folder, **compiler)
    return made, folder / "site", install(made, folder / "site", STEP + REGISTERED)


def files(folder):
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_source_distribution_holds_all_of_a_checkout(sdist):
    """Every file of the source is in it: package, tests, configurations, scripts, results and .ci."""
    checkout = sdist.parent.parent / "checkout"
    missing = {name for name in files(checkout) - files(sdist) if ".egg-info" not in name}
    assert not missing, sorted(missing)
    for name in (".ci/run", "configs/demo.yaml", "scripts/train.sh", "tests/conftest.py", "tests/checks/README.md"):
        assert (sdist / name).is_file(), name


def test_tests_of_the_source_distribution_pass(sdist, compiler):
    """Tests run in it, as a packager runs them, and first ask for the compiled kernel if there is a compiler."""
    files = ("tests/test_imports.py::test_floors", "tests/norms/test_scale.py")
    words = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", 0, *files)
    if HAS_COMPILER:
        done = toy.command(*words, cwd=sdist, check=False)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR and "--build" in done.stderr, done.stdout + done.stderr
        toy.command("python", "-m", "fairseq_powernorm.kernels", "--build", cwd=sdist, **compiler)
    passed = toy.command(*words, cwd=sdist).stdout
    assert " passed" in passed and "failed" not in passed


@with_compiler
def test_a_wheel_with_the_compiled_kernel(installed):
    """Its tag names the platform and no version of Python, and the kernel works after installation."""
    made, _, printed = installed
    assert made.name.split("-")[2:4] == ["py3", "none"] and made.stem.split("-")[4] != "any"
    assert "fairseq_powernorm/kernels/libpowernorm.so" in zipfile.ZipFile(made).namelist()
    assert "kernel C" in printed


def test_installed_by_pip_and_by_bare_name(installed, toy_data, tmp_path):
    """pip-installed elsewhere, the plugin is found by import, and by bare name from that place, without the checkout."""
    _, site, printed = installed
    assert "registered: True" in printed
    done = train(toy_data, tmp_path / "run", "--max-update", 2, "--disable-validation", cwd=site)
    assert len(toy.losses(done.stdout + done.stderr)) == 2


def test_a_wheel_without_the_compiled_kernel(sdist, tmp_path):
    """Built where there is no compiler, be it after a build where there was one, its tag is that of pure Python, it holds
    no library, and the norms work."""
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    stale = source / "build" / "lib" / "fairseq_powernorm" / "kernels" / build.NAME
    for path in (stale, source / "fairseq_powernorm" / "kernels" / build.NAME):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier build")
    made = wheel(source, tmp_path, **NO_COMPILER)
    assert made.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith(".so")]
    assert "not built" in install(made, tmp_path / "site")


@with_compiler
def test_a_checkout_that_hides_an_installation(sdist, installed, tmp_path):
    """``pip install .`` and then Python in the checkout: the log says that the checkout has no kernel, where the installed
    one is, and what to do; elsewhere the installed kernel is used."""
    _, site, elsewhere = installed
    assert "kernel C" in elsewhere
    checkout = tmp_path / "checkout"
    copy_checkout(sdist, checkout)
    done = toy.command("python", "-c", STEP, cwd=checkout, PYTHONPATH=str(site))
    assert str(checkout) in done.stdout
    said = " ".join(line for line in done.stderr.splitlines() if "not built" in line)
    for words in (str(checkout / "fairseq_powernorm"), str(site / "fairseq_powernorm"), "kernels --build"):
        assert words in said, done.stderr


def test_dependencies(sdist):
    """The distribution asks for what the plugin needs without an extra."""
    text = (sdist / "PKG-INFO").read_text()
    needed = [
        line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    for name in ("torch", "fairseq", "sacrebleu", "sentencepiece", "subword-nmt", "omegaconf"):
        assert any(line.startswith(name) for line in needed), (name, needed)
