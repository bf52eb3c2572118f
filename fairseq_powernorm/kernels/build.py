"""Builds the C kernel with the system's compiler. Standard library only: setup.py and the scripts run it by its path.

``python fairseq_powernorm/kernels/build.py`` builds the library beside this file unless a current one is there.
"""
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "csrc" / "powernorm.c", HERE / "csrc" / "sweeps.h")
NAME = "libpowernorm.so"
#: no flag ties the library to the processor of this machine: the code chooses its instructions when it runs
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")


class BuildError(Exception):
    """The library cannot be built; the message says why."""


def source_hash() -> str:
    """What marks a library as built from these sources with these flags."""
    text = b"".join(path.read_bytes() for path in SOURCES) + " ".join(FLAGS).encode()
    return hashlib.sha256(text).hexdigest()


def is_current(library: Path) -> bool:
    """Is this a library built from these sources?"""
    return library.is_file() and source_hash().encode() in library.read_bytes()


def installed_library() -> Optional[Path]:
    """The current library of another copy of this package, which this one hides from Python; None if there is none.

    After ``pip install .``, Python started in the checkout takes the modules from there, where no library was built.
    """
    package = HERE.parent
    for entry in sys.path:
        folder = Path(entry or os.curdir).resolve() / package.name / HERE.name
        if folder != HERE and is_current(folder / NAME):
            return folder / NAME
    return None


def why_missing(library: Path = HERE / NAME) -> str:
    """Why there is no current library, and how to get one: for the log."""
    remedy = "build it with: python -m fairseq_powernorm.kernels --build"
    elsewhere = installed_library()
    if elsewhere is not None:
        return (
            f"it is not built in {HERE}, which hides the installed package with its kernel, {elsewhere}; {remedy}, or "
            "run from another folder"
        )
    return f"it was built from other sources; {remedy}" if library.is_file() else f"it is not built; {remedy}"


def compiler() -> List[str]:
    """The C compiler's command: the environment variable CC, else the first of cc, gcc, clang in PATH.

    Raises:
        BuildError: there is none
    """
    given = os.environ.get("CC", "").strip()
    candidates = [shlex.split(given)] if given else [["cc"], ["gcc"], ["clang"]]
    for words in candidates:
        if shutil.which(words[0]):
            return words
    raise BuildError(f"CC={given!r} is not a command" if given else "no C compiler: neither cc, gcc nor clang is in PATH")


def build(folder: Optional[Path] = None) -> Path:
    """Compile the library into ``folder`` (default: beside this file), replacing what stands there in one step.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written
    """
    target = Path(folder or HERE) / NAME
    command = [*compiler(), *FLAGS, f'-DPN_SOURCE="{source_hash()}"']
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
            made = os.path.join(work, NAME)
            done = subprocess.run(
                [*command, str(SOURCES[0]), "-o", made, "-lm"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode != 0:
                lines = done.stdout.strip().splitlines()
                first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise BuildError(f"{command[0]} failed with exit status {done.returncode}: {first}")
            os.replace(made, target)
    except OSError as error:
        raise BuildError(str(error)) from error
    return target


def main() -> int:
    """Build if needed and say what was done; a machine without a compiler is no failure."""
    if is_current(HERE / NAME):
        return 0
    try:
        build()
        print("built the C kernel")
    except BuildError as error:
        print(f"the C kernel is not built, the torch kernel serves: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
