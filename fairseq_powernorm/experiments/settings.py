"""Where things lie, what a benchmark's YAML says, and how a script refuses bad input."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..norm_names import NORM_CLASSES

PLUGIN = Path(__file__).resolve().parents[1]
ROOT = PLUGIN.parent
CONFIGS = ROOT / "configs"
NORMS = tuple(NORM_CLASSES)
#: The authors' BN, of which the paper's values are; plain "batch" has true statistics of the tokens that are not padding.
BATCH_REFERENCE = "batch:variant=reference"
BPE_TYPES = ("subword_nmt", "sentencepiece")
LARGEST_SEED = 2**32 - 1  # numpy's
# The four options that carry a norm's name, and the placements: placement -> does NORM stand there (else LayerNorm)? A
# language model has the decoder's two options and one placement.
NORM_OPTIONS = ("encoder_norm_self", "encoder_norm_ff", "decoder_norm_self", "decoder_norm_ff")
PLACEMENTS = {"encoder": (True, True, False, False), "all": (True, True, True, True)}


# What a disk says that is full, read-only or broken, and a path that leads nowhere.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR)


class UserError(Exception):
    """Input that a script refuses; the message names the option, the value and what is valid."""


def main(function, *arguments):
    """Runs a script's main function; a refusal, the disk's too, is one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal need not know every character
    try:
        status = function(*arguments)
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        refuse(error)
    except BrokenPipeError:  # "| head" has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK:
            raise
        refuse(f"{error.filename or 'cannot write'}: {error.strerror}")
    except KeyboardInterrupt:
        refuse("interrupted", 128 + signal.SIGINT)


def refuse(reason, status=2):
    with contextlib.suppress(OSError):  # the disk that is full
        sys.stdout.flush()
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(status)


def data_root():
    return Path(os.path.abspath(os.environ.get("PN_DATA_ROOT") or ROOT / "data"))


def runs_root():
    return Path(os.path.abspath(os.environ.get("PN_RUNS_ROOT") or ROOT / "runs"))


def choose(option, value, valid):
    """value if it is one of valid, else a refusal that lists them."""
    if value not in valid:
        raise UserError(f"{option} {value!r} is unknown; valid: {', '.join(valid)}")
    return value


def listed(option, text, valid, default):
    """The words of a comma-separated option, each one of valid (None: any) and none twice."""
    words = list(default) if text is None else text.split(",")
    for word in words:
        if valid is not None:
            choose(option, word, valid)
        elif not word:
            raise UserError(f"{option} {text!r}: must be words separated by commas")
    if len(set(words)) < len(words):
        raise UserError(f"{option} {text!r} names something twice")
    return words


def number(option, text, smallest, largest=None):
    if not text.isascii() or not text.isdigit() or not smallest <= int(text) <= (largest or int(text)):
        raise UserError(f"{option} {text!r}: must be a number, {smallest} {f'to {largest}' if largest else 'or more'}")
    return int(text)


def seeds(option, text):
    """The numbers of a comma-separated option."""
    return [number(option, seed, 0, LARGEST_SEED) for seed in listed(option, text, None, ())]


def norm_name(norm):
    """The name of a norm that may have options: NAME[:OPTION=VALUE[,...]]."""
    return norm.partition(":")[0]


def norm_in_names(norm):
    """A norm with its options as a part of names of files and rows, such as batch-reference."""
    return re.sub("[:,=]", "-", norm.replace(":variant=", "-"))


def is_lm(config):
    """Is this the configuration of a language model (else: of translation)?"""
    return config.task._name == "language_modeling_pn"


def placements(model):
    """The placements that a model's configuration can have, the default first."""
    return tuple(PLACEMENTS) if NORM_OPTIONS[0] in model else ("all",)


@functools.lru_cache(maxsize=None)
def architectures(benchmark):
    """The architectures with settings for a benchmark, the default first; the others have configs/BENCH/ARCH.yaml."""
    return (load(benchmark).model._name, *sorted(path.stem for path in (CONFIGS / benchmark).glob("*.yaml")))


def benchmarks():
    if not CONFIGS.is_dir():
        raise UserError(
            f"{CONFIGS} does not exist: the experiments need a checkout of the repository, from which {PLUGIN} is used"
        )
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(benchmark, arch=None):
    """configs/BENCH.yaml, configs/BENCH/ARCH.yaml over it, as they stand there (interpolations resolve on access)."""
    from omegaconf import OmegaConf

    choose("benchmark", benchmark, benchmarks())
    config = OmegaConf.load(CONFIGS / f"{benchmark}.yaml")
    if arch not in (None, config.model._name):
        config = OmegaConf.merge(config, OmegaConf.load(CONFIGS / benchmark / f"{arch}.yaml"))
    return config


def data_settings(benchmark):
    """configs/data/BENCH.yaml, how a benchmark's text is prepared and scored; empty for a language model's text."""
    from omegaconf import OmegaConf

    if is_lm(load(benchmark)):
        return {}
    path = CONFIGS / "data" / f"{benchmark}.yaml"
    if not path.is_file():
        raise UserError(f"benchmark {benchmark!r}: {path}, which says how its text is prepared, does not exist")
    return OmegaConf.to_container(OmegaConf.load(path)) or {}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, content):
    write_text(path, json_text(content) + "\n")


def json_text(content, indent=0, width=160):
    """JSON, indented. What fits into a line of `width` characters is one, and so is a list of numbers of any length; the
    numbers, texts and lists of numbers of an object share lines."""
    text = json.dumps(content, ensure_ascii=False)
    if indent + len(text) <= width or is_plain(content):
        return text
    margin, lines, shares = "\n" + " " * indent, [], False
    is_object = isinstance(content, dict)
    for key, value in content.items() if is_object else ((None, value) for value in content):
        line = (f"{json.dumps(key, ensure_ascii=False)}: " if is_object else "") + json_text(value, indent + 2, width)
        if shares and is_plain(value) and indent + len(lines[-1]) + len(line) + 4 <= width:
            lines[-1] += f", {line}"
        else:
            lines.append(line)
        shares = is_plain(value)
    return text[0] + ",".join(f"{margin}  {line}" for line in lines) + margin + text[-1]


def is_plain(value):
    """Is it a number, a text, true, false or null, or a list of numbers?"""
    if isinstance(value, list):
        return not any(isinstance(inner, (dict, list, str)) for inner in value)
    return not isinstance(value, dict)


def write_text(path, text):
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def prepared(benchmark):
    """The directory of a prepared benchmark and its stamp; refuses if it is not prepared."""
    directory = data_root() / benchmark
    if not (directory / "prepared.json").is_file():
        raise UserError(f"{directory} is not prepared; run: scripts/prepare.sh {benchmark}")
    return directory, read_json(directory / "prepared.json")


def call(command, lock):
    """Runs a command, which holds the lock, too; gives its output, or shows it and refuses to go on."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                   "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                          env=environment, pass_fds=(lock.fileno(),))
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def cpus():
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lock_path(directory):
    return directory.with_name(f".{directory.name}.lock")


@contextlib.contextmanager
def locked(directory, patience=1.0):
    """Holds the lock of a directory that need not exist yet; refuses if another process holds it for `patience` seconds.

    The lock is a file beside the directory. It opens when the process ends, however it ends, and the children that were
    given the file have ended, too. in_use() holds it for an instant, hence the patience.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock_path(directory), "a")
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {error.filename}: {error.strerror}") from None
    with stream:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"{stream.name} cannot be locked: {error.strerror}; runs need a file system with "
                                    f"flock (on Lustre the mount option flock)") from None
            if time.monotonic() > end:
                raise UserError(f"another process is at work in {directory} (it holds {stream.name})")
            time.sleep(0.1)
        yield stream


def in_use(directory):
    """Is a process at work in the directory? Leaves no file."""
    try:
        with open(lock_path(directory)) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def whole_directory(target):
    """Yields a temporary sibling that takes the place of target when the block ends well, and vanishes when it does not.

    What an earlier process left when it was killed is removed, and a target that it had set aside is put back. The caller
    holds a lock.
    """
    partial = put_back(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replace(target, partial)


def put_back(target):
    """Puts back a target that a killed process had set aside; gives the path of its temporary sibling."""
    aside = target.with_name(f".{target.name}.old")
    if aside.exists():
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)
    return target.with_name(f".{target.name}.partial")


def replace(target, partial):
    """The temporary sibling takes the place of target."""
    aside = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def resumable_directory(target, request):
    """As whole_directory, but what an earlier process left after the same request is kept, to be gone on with.

    The request stands in prepared.json from the beginning; the block adds to it. When the block fails, the sibling
    stays if it holds a directory that is whole, that is, whose name begins with no dot.
    """
    partial = put_back(target)
    stamp = partial / "prepared.json"
    if partial.exists():
        there = read_json(stamp) if stamp.is_file() and stamp.stat().st_size else {}
        if same({key: there.get(key) for key in request}, request) and there:
            print(f"going on with what an interrupted run left in {partial}", flush=True)
        else:
            print(f"removing {partial}, which an interrupted run with other settings left", flush=True)
            shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        write_json(stamp, request)
    try:
        yield partial
    except BaseException:
        if not any(path.is_dir() and not path.name.startswith(".") for path in partial.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    replace(target, partial)


def same(one, other):
    """Are two requests the same? A value of None is not known yet, and the same as any other."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other or one is None or other is None


def tool(name):
    """The path of a console script that belongs to this interpreter."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise UserError(f"{name} is not installed beside {sys.executable}")
    return found


# Distributions on which the prepared data depend, and those on which the results depend as well.
DATA_TOOLS = ("regex", "sacremoses", "subword-nmt", "sentencepiece", "fairseq", "ve-fairseq", "fairseq-fixed")
TOOLS = (*DATA_TOOLS, "torch", "numpy", "hydra-core", "omegaconf", "sacrebleu", "fairseq_powernorm")


def versions(distributions):
    """The versions of those of the distributions that are installed."""
    from importlib import metadata

    found = {}
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
