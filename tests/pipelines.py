"""What the tests of the scripts share: the scripts with directories of their own, and a corpus of a few sentences."""

import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import warm
from toy import ROOT

BIN = pathlib.Path(sys.executable).parent
for module in ("fairseq", "sacrebleu", "sacremoses", "subword_nmt", "sentencepiece"):
    pytest.importorskip(module)

# A mini run: 30 updates of a small model. They shrink what configs/demo.yaml says; the mechanics stay the same.
SMALL = ["dataset.max_tokens=400", "optimization.max_update=30", "checkpoint.save_interval_updates=5",
         "dataset.validate_interval_updates=5", "checkpoint.keep_interval_updates=3", "common.log_interval=5",
         "lr_scheduler.warmup_updates=10", "generation.max_len_b=20", "generation.beam=2",
         "+model.encoder_layers=1", "+model.decoder_layers=1"]


def here(name, *arguments, environment=os.environ):
    """A command of the experiments in this process, where all is loaded: (exit status, stdout, stderr). What it starts
    is warm."""
    from fairseq_powernorm.experiments.commands import main

    command = importlib.import_module(f"fairseq_powernorm.experiments.{name}").command
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    started = mock.patch.object(sys, "executable", warm.program("python"))
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors, \
            mock.patch.dict(os.environ, dict(environment), clear=True), started:
        try:
            main(command, [str(word) for word in arguments])
        except SystemExit as end:
            status = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status, output.getvalue(), errors.getvalue()


NOUNS = [("Hund", "dog"), ("Mann", "man"), ("Baum", "tree"), ("Ball", "ball"), ("Tisch", "table")]
VERBS = [("sieht", "sees"), ("hat", "has"), ("mag", "likes"), ("kennt", "knows")]


def sentences(number):
    """Pairs of German and English sentences, punctuation and an apostrophe included."""
    for i in range(number):
        subject, verb, thing = NOUNS[i % 5], VERBS[i // 5 % 4], NOUNS[(i // 20 + i) % 5]
        end = ".!?"[i % 3]
        yield f"Der {subject[0]} {verb[0]} den {thing[0]}, ja{end}", f"The {subject[1]} {verb[1]} the man's {thing[1]}{end}"


def write_text(directory, *, train=80, valid=15, test=16):
    directory.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", train), ("valid", valid), ("test", test)):
        for language, side in zip(("de", "en"), zip(*sentences(number))):
            (directory / f"{split}.{language}").write_text("".join(line + "\n" for line in side), encoding="utf-8")
    return directory


class Scripts:
    """The scripts with their roots in a temporary directory."""

    def __init__(self, home):
        self.data, self.runs = home / "data", home / "runs"
        # One thread: a test machine is shared, and OpenMP's threads wait for each other busily.
        self.environment = {**os.environ, "PN_DATA_ROOT": str(self.data), "PN_RUNS_ROOT": str(self.runs),
                            "PYTHON": warm.program("python"), "OMP_NUM_THREADS": "1"}
        self.environment.pop("DATA_ARCHIVES", None)

    def start(self, script, *arguments, cold=False, **environment):
        """A script in a process group of its own, for signals. cold: so are the processes that it starts, see warm.py."""
        environment = {"PYTHON": sys.executable, **environment} if cold else environment
        return subprocess.Popen(["bash", str(ROOT / "scripts" / f"{script}.sh"), *map(str, arguments)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                env={**self.environment, **environment})

    def __call__(self, script, *arguments, **environment):
        process = self.start(script, *arguments, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def ok(self, script, *arguments, **environment):
        status, output = self(script, *arguments, **environment)
        assert status == 0, output
        return output

    def here(self, command, *arguments, **environment):
        """What a command prints that ends well; in this process, for one that has little to do."""
        status, output, errors = here(command, *arguments, environment={**self.environment, **environment})
        assert status == 0, output + errors
        return output

    def refuses(self, command, *arguments, **environment):
        """The message of a refusal: one line after "error:", exit status 2; in this process. test_commands.py has it that a
        script is its command."""
        status, output, errors = here(command, *arguments, environment={**self.environment, **environment})
        assert status == 2, output + errors
        assert errors.count("error: ") == 1 and "error: " not in output, output + errors
        return errors.split("error: ")[1]


def shared(tmp_path_factory, name, make):
    """A directory that is made once, by make(directory), for all processes that take part in the tests; to be read only."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder


def demo(tmp_path_factory, name):
    """Scripts of a test file with the demo prepared from a few sentences, the directory ``text``."""

    def make(home):
        write_text(home / "text")
        Scripts(home).ok("prepare", "demo", "--text-dir", home / "text")

    prepared = shared(tmp_path_factory, "demo", make)
    scripts = Scripts(tmp_path_factory.mktemp(name))
    scripts.text = prepared / "text"
    shutil.copytree(prepared / "data", scripts.data)
    return scripts


#: see fake_wandb()
WANDB = '''
import json, os

class Config(dict):
    def update(self, settings, allow_val_change=False):
        assert allow_val_change or not any(key in self and self[key] != value for key, value in settings.items())
        super().update(settings)

config = Config(max_update="that of the session before")

def note(**facts):
    with open(os.environ["NOTES"], "a") as stream:
        stream.write(json.dumps(facts) + "\\n")

def init(**words):
    told = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    note(init=words, told=told, folder=os.getcwd())

def log(values, step):
    note(log=sorted(values), step=step)
'''


def fake_wandb(folder):
    """A package wandb, which notes in the file $NOTES what is asked of it, and like wandb refuses settings that change."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(WANDB)


def contents(directory):
    """relative path -> SHA-256 of every file below."""
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}


def program(folder, name, text):
    """Write a program in bash."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
