"""Builds the C kernel and the autograd function in C++ with the system's compilers.

Standard library only: setup.py and the scripts run it by its path. ``python fairseq_powernorm/kernels/build.py`` builds both
beside this file unless current ones are there. The C kernel fits any torch; the autograd function is compiled for the torch
that is installed, of which nothing but headers and ``version.py`` is read here.
"""
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
SOURCES = tuple(HERE / "csrc" / name for name in ("powernorm.c", "sweeps.h", "tiles.h", "batch_sweeps.h", "batch.h"))
NAME = "libpowernorm.so"
#: no flag ties the library to the processor of this machine: the code chooses its instructions when it runs
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi")
#: the autograd function: sources, the first of which is compiled, module, and what its file is called besides
AUTOGRAD_SOURCES = (HERE / "csrc" / "autograd.cpp", HERE / "csrc" / "batch_autograd.h")
AUTOGRAD = "powernorm_autograd"
AUTOGRAD_FLAGS = ("-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
#: what people build both with, whatever stands there
BUILD = "python -m fairseq_powernorm.kernels --build"
#: what the compiler must know of the installed torch: printed by another process, which imports it
_FACTS = """
import json, re, torch
standard = re.search(r"C\\+\\+ Version: (\\d{4})", torch.__config__.show())
print(json.dumps({"standard": standard.group(1)[2:] if standard else "17", "abi": int(torch._C._GLIBCXX_USE_CXX11_ABI)}))
"""


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
    remedy = f"build it with: {BUILD}"
    elsewhere = installed_library()
    if elsewhere is not None:
        return (
            f"it is not built in {HERE}, which hides the installed package with its kernel, {elsewhere}; {remedy}, or "
            "run from another folder"
        )
    return f"it was built from other sources; {remedy}" if library.is_file() else f"it is not built; {remedy}"


def compiler(variable: str = "CC", candidates: Sequence[str] = ("cc", "gcc", "clang"), language: str = "C") -> List[str]:
    """A compiler's command: what the environment variable says, else the first candidate in PATH.

    Raises:
        BuildError: there is none
    """
    given = os.environ.get(variable, "").strip()
    for words in [shlex.split(given)] if given else [[name] for name in candidates]:
        if shutil.which(words[0]):
            return words
    if given:
        raise BuildError(f"{variable}={given!r} is not a command")
    raise BuildError(f"no {language} compiler: neither {', '.join(candidates[:-1])} nor {candidates[-1]} is in PATH")


def _compile(command: Sequence[str], target: Path) -> Path:
    """Run a compiler, and put what it makes in the place of ``target`` in one step."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as work:
            made = os.path.join(work, target.name)
            done = subprocess.run([*command, "-o", made], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                lines = done.stdout.strip().splitlines()
                first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
                raise BuildError(f"{command[0]} failed with exit status {done.returncode}: {first}")
            os.replace(made, target)
    except OSError as error:
        raise BuildError(str(error)) from error
    return target


def build(folder: Optional[Path] = None) -> Path:
    """Compile the library into ``folder`` (default: beside this file), replacing what stands there in one step.

    Raises:
        BuildError: there is no compiler, it fails, or the folder cannot be written
    """
    command = [*compiler(), *FLAGS, f'-DPN_SOURCE="{source_hash()}"', str(SOURCES[0]), "-lm"]
    return _compile(command, Path(folder or HERE) / NAME)


# ---------------------------------------------------------------- the autograd function in C++


def _torch() -> Path:
    """The folder of the installed torch.

    Raises:
        BuildError: there is none
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    return Path(spec.origin).parent


def autograd_name() -> str:
    """File name of the autograd function that fits its source, the installed torch and this Python.

    Raises:
        BuildError: torch is not installed
    """
    version = _torch() / "version.py"
    marks = [*(path.read_bytes() for path in AUTOGRAD_SOURCES), version.read_bytes(), " ".join(AUTOGRAD_FLAGS).encode()]
    marks.append(str(sysconfig.get_config_var("SOABI")).encode())
    return f"{AUTOGRAD}-{hashlib.sha256(b'|'.join(marks)).hexdigest()[:16]}.so"


def autograd_folders() -> List[Path]:
    """Where it may lie: beside this file, or, where that cannot be written, in the user's cache."""
    given = (os.environ.get("XDG_CACHE_HOME", ""), os.path.join(os.path.expanduser("~"), ".cache"))
    # a user without a home, or a relative path: nothing is loaded from where somebody happens to be
    caches = [Path(cache) / "fairseq_powernorm" for cache in given if os.path.isabs(cache)]
    return [HERE, *caches[:1]]


def find_autograd() -> Optional[Path]:
    """The autograd function, if it has been built."""
    with contextlib.suppress(BuildError):
        name = autograd_name()
        for folder in autograd_folders():
            if (folder / name).is_file():
                return folder / name
    return None


def _failure(name: str) -> Path:
    """The file that says why it could not be built."""
    return _folder_to_write() / f"{name}.failed"


def _failed() -> bool:
    with contextlib.suppress(BuildError):
        return _failure(autograd_name()).exists()
    return True


def _folder_to_write() -> Path:
    for folder in autograd_folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise BuildError(f"no folder can be written: {', '.join(map(str, autograd_folders()))}")


def why_no_autograd() -> str:
    """Why it has not been built: what its last build said, if there was one."""
    try:
        return f"{_failure(autograd_name()).read_text().strip()}; to try again: {BUILD}"
    except BuildError as error:
        return str(error)
    except OSError:
        return f"it is not built; build it with: {BUILD}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Is this the only process that builds there? The folder is locked, until the process ends at the latest."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                alone = False
            except OSError:
                pass  # a file system without locks: several may build at a time, and the last one wins
        yield alone
    finally:
        os.close(descriptor)


def build_autograd() -> Path:
    """Compile the autograd function for the installed torch.

    Raises:
        BuildError: there is no torch or no compiler, it fails, no folder can be written, or another process is building it
    """
    name, folder, root = autograd_name(), _folder_to_write(), _torch()
    command = compiler("CXX", ("c++", "g++", "clang++"), "C++")  # one that is missing today is no failure to remember
    with _alone(folder) as alone:
        if not alone:
            raise BuildError("another process is building it")
        try:
            done = subprocess.run(
                [sys.executable, "-c", _FACTS], capture_output=True, text=True, cwd=folder.anchor
            )
            if done.returncode != 0:
                raise BuildError(f"torch cannot be imported: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            facts: Dict[str, str] = json.loads(done.stdout.splitlines()[-1])
            include = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
            print(f"building the autograd function in C++ for torch in {root} (some seconds)", file=sys.stderr, flush=True)
            found = _compile(
                [
                    *command, f"-std=c++{facts['standard']}", *AUTOGRAD_FLAGS,
                    f"-D_GLIBCXX_USE_CXX11_ABI={facts['abi']}", *(f"-I{each}" for each in include),
                    f"-I{sysconfig.get_paths()['include']}", str(AUTOGRAD_SOURCES[0]), f"-L{root / 'lib'}",
                    "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10",
                ],
                folder / name,
            )  # fmt: skip
            with contextlib.suppress(OSError):
                _failure(name).unlink()
            return found
        except BuildError as error:
            with contextlib.suppress(OSError):
                _failure(name).write_text(f"{error}\n")
            raise


def start_autograd() -> bool:
    """Have it built by a process of its own, unless that failed before or is being done; returns whether it is under way."""
    # a program that has been frozen into one file is its own interpreter: it would start itself
    if not sys.executable or getattr(sys, "frozen", False) or not (HERE / "build.py").is_file():
        return False
    try:
        folder = _folder_to_write()
        if _failed():
            return False
        compiler("CXX", ("c++", "g++", "clang++"), "C++")
        with _alone(folder) as alone:
            if not alone:
                return True
        subprocess.Popen(
            [sys.executable, str(HERE / "build.py"), "--in-background"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, cwd=folder.anchor,
        )  # fmt: skip
    except (BuildError, OSError):
        return False
    return True


def main(arguments: Sequence[str] = ()) -> int:
    """Build what is missing and say what was done; a machine without a compiler is no failure."""
    if "--in-background" in arguments:
        os.nice(10)
    if not is_current(HERE / NAME):
        try:
            build()
            print("built the C kernel")
        except BuildError as error:
            print(f"the C kernel is not built, the torch kernel serves: {error}")
    if find_autograd() is None and not _failed():
        try:
            build_autograd()
            print("built the autograd function in C++")
        except BuildError as error:
            print(f"the autograd function in C++ is not built, that in Python serves: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
