"""Shared fixtures. Golden traces and real corpora are found through the environment variable PN_SHARED."""
import gc
import logging
import os
import pathlib
import random
import signal
import threading

import pytest

# read when torch is imported. One thread each: processes run side by side, and OpenMP's threads wait for each other busily
os.environ.setdefault("OMP_NUM_THREADS", "1")
# as scripts/lib/environment.sh sets it: what is started in another environment begins cold, see warm.py
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

# what is built is tested; nothing is built in the background
os.environ.setdefault("POWERNORM_AUTOGRAD", "prebuilt")
if not torch.cuda.is_available():
    # read when Triton is imported: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # torch's own way notes a seed for each kind of accelerator, with the stack as text: a millisecond, thousands of times
    torch.manual_seed = torch.default_generator.manual_seed

import toy
import warm

from fairseq_powernorm.kernels import build, c

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: files that take long, in this order before the others: the last process to end should not end alone
FIRST = ("test_slurm", "test_lm_pipeline", "test_pipeline", "test_distributed", "test_reproduce", "test_honest",
         "test_launch", "test_register", "test_triton", "test_fold", "test_cli", "test_resume", "test_packaging",
         "test_two_ranks")


# programs in the tests' own process leave log handlers behind, to streams that pytest has closed since
logging.raiseExceptions = False

# a shell starts what it leaves in the background deaf to ^C, which the scripts' tests send
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header():
    return f"C kernel: {c.unavailable() or c.describe()}"


def pytest_configure(config):
    gc.disable()  # until the tests begin nothing is garbage
    try:
        build.compiler()
    except build.BuildError:
        pass  # the header says that its tests are left out
    else:
        if c.unavailable():
            raise pytest.UsageError(f"the C kernel would not be tested: {c.unavailable()}")
    if getattr(config.option, "loadscopereorder", False):  # pytest-xdist's own order: files with many tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


def pytest_collection_finish():
    """What is loaded by now stays: collections of garbage, which some libraries ask for again and again, pass over it."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol():
    """What a program in a test leaves behind in this process ends with it: handlers of the log, each of which would take
    part in what all later ones write, and variables that would start later commands cold (see warm.py)."""
    handlers, environment = list(logging.root.handlers), warm.starting(os.environ)
    yield
    logging.root.handlers[:] = handlers
    for name in warm.starting(os.environ):
        if name not in environment:
            del os.environ[name]
    os.environ.update(environment)


def pytest_unconfigure():
    """At the end of the process it is taken apart as ever."""
    gc.unfreeze()
    gc.enable()


@pytest.fixture(scope="session")
def root():
    """The repository's root directory."""
    return ROOT


def _shared(part):
    base = os.environ.get("PN_SHARED")
    if not base:
        pytest.skip(f"PN_SHARED is not set: the {part} are not at hand")
    return pathlib.Path(base)


@pytest.fixture(scope="session")
def oracle():
    """Directory of the golden traces of the authors' code."""
    return _shared("golden traces") / "oracle"


@pytest.fixture(scope="session")
def corpora():
    """Directory of real corpora."""
    return _shared("real corpora") / "data"


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A binarized toy corpus: the target is the source reversed, in other words. 61 test sentences, not a multiple of 8."""
    folder = tmp_path_factory.mktemp("toy")
    draw = random.Random(1)
    for split, size in (("train", 200), ("valid", 29), ("test", 61)):
        sentences = [[draw.randrange(20) for _ in range(draw.randrange(2, 9))] for _ in range(size)]
        for language, words in (("de", lambda s: s), ("en", lambda s: s[::-1])):
            prefix = {"de": "d", "en": "e"}[language]
            lines = "".join(" ".join(f"{prefix}{w}" for w in words(s)) + "\n" for s in sentences)
            (folder / f"{split}.{language}").write_text(lines)
    toy.preprocess(
        "--source-lang", "de", "--target-lang", "en", "--joined-dictionary", "--destdir",
        folder / "bin", *(w for s in ("train", "valid", "test") for w in (f"--{s}pref", folder / s)),
    )
    return folder / "bin"
