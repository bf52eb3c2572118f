"""The steps from raw to tokenized text: in Python (moses_python.py), or with $MOSES by Moses' own Perl scripts.

Both give the same bytes, with the scripts as they are since November 2019 and a perl of the Unicode version of `regex`.
"""

import functools
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from ..errors import UserError
from ..files import sha256
from ..tools import cpus
from . import moses_python


def steps(settings, split):
    """The names of the steps that the text of a split takes, in order."""
    test, chosen = split == "test", settings.get
    return [step for step, wanted in (
        ("apostrophes", chosen("map_apostrophes") and test),
        ("lowercase", chosen("lowercase") and not chosen("lowercase_last")),
        ("normalize", chosen("normalize_punctuation") or chosen("normalize_train") and not test),
        ("printable", chosen("normalize_train") and not test),
        ("tokenize_dashes" if chosen("split_dashes") else "tokenize", True),
        ("lowercase", chosen("lowercase") and chosen("lowercase_last")),
    ) if wanted]


# ---- in Python -------------------------------------------------------------------------------------------------------


PYTHON = {
    "lowercase": lambda line, language: moses_python.lowercase(line),
    "normalize": moses_python.normalize_punctuation,
    "printable": lambda line, language: moses_python.replace_unprintable(line),
    "apostrophes": lambda line, language: line.replace("\u2019", "'"),
    "tokenize": moses_python.tokenize,
    "tokenize_dashes": functools.partial(moses_python.tokenize, split_dashes=True),
}


def process(lines, names, language):
    """The lines after the named steps."""
    for name in names:
        step = PYTHON[name]
        lines = [step(line, language) for line in lines]
    return lines


# ---- in Perl ---------------------------------------------------------------------------------------------------------


SCRIPTS = {
    "lowercase": lambda language: ["lowercase.perl"],
    "normalize": lambda language: ["normalize-punctuation.perl", language],
    "printable": lambda language: ["remove-non-printing-char.perl"],
    "apostrophes": None,
    "tokenize": lambda language: ["tokenizer.perl", "-threads", str(cpus()), "-l", language],
    "tokenize_dashes": lambda language: ["tokenizer.perl", "-threads", str(cpus()), "-a", "-l", language],
}


class Perl:
    """The scripts of a Moses checkout, $MOSES.

    Raises:
        UserError: perl, or a script that the settings need, is not there
    """

    def __init__(self, directory, settings):
        self.perl, self.directory = shutil.which("perl"), Path(directory) / "scripts" / "tokenizer"
        if self.perl is None:
            raise UserError(f"MOSES={directory}: its scripts need perl, which is not installed; unset MOSES")
        names = {SCRIPTS[step](language)[0] for split in ("train", "test") for step in steps(settings, split)
                 for language in settings["languages"] if SCRIPTS[step]}
        self.files = [self.directory / name for name in sorted(names)]
        missing = [str(path) for path in self.files if not path.is_file()]
        if missing:
            raise UserError(f"MOSES={directory} lacks {', '.join(missing)}; valid is the directory of a checkout of "
                            f"mosesdecoder")
        prefixes = Path(directory) / "scripts" / "share" / "nonbreaking_prefixes"
        found = [prefixes / f"nonbreaking_prefix.{language}" for language in settings["languages"]]
        self.files += [path for path in found if path.is_file()]

    def digests(self):
        """script -> SHA-256, of all that the result depends on."""
        return {path.name: sha256(path) for path in self.files}

    def process(self, lines, names, language, lock):
        """The lines after the named steps, one for each; the processes hold the lock, too.

        Raises:
            UserError: a script fails, or does not give a line for each
        """
        commands = [[self.perl, str(self.directory / script), *options]
                    for script, *options in (SCRIPTS[name](language) for name in names if SCRIPTS[name])]
        if "apostrophes" in names:  # the first step
            lines = (PYTHON["apostrophes"](line, language) for line in lines)
        given, failed = 0, []
        with tempfile.TemporaryFile() as errors:
            running, source = [], subprocess.PIPE
            for command in commands:
                running.append(subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=errors,
                                                pass_fds=(lock.fileno(),)))
                if len(running) > 1:
                    source.close()
                source = running[-1].stdout

            def feed():
                nonlocal given
                try:
                    with running[0].stdin as stream:
                        for line in lines:
                            # \r and the like inside of a line are spaces to Perl, too
                            stream.write(line.encode("utf-8") + b"\n")
                            given += 1
                except BrokenPipeError:
                    pass  # the script has failed; its status says so
                except BaseException as error:  # reading the text
                    failed.append(error)

            feeder = threading.Thread(target=feed, daemon=True)
            feeder.start()
            taken = 0
            try:
                for taken, line in enumerate(source, 1):  # noqa: B007  (used below)
                    yield line.decode("utf-8").rstrip("\n")
                feeder.join()
                statuses = [process.wait() for process in running]
            except BaseException:
                for process in running:
                    process.kill()
                    process.wait()
                raise
            if failed:
                raise failed[0]
            for command, status in zip(commands, statuses):
                if status:
                    errors.seek(0)
                    said = " ".join(errors.read()[-500:].decode("utf-8", "replace").split())
                    raise UserError(f"{' '.join(command[1:])} failed with exit status {status}: {said}")
            if taken != given:
                raise UserError(f"the scripts in {self.directory} (MOSES) made {taken:,} lines of {given:,}")


def perl(settings):
    """The Perl scripts that $MOSES names, None if it names none."""
    directory = os.environ.get("MOSES")
    return Perl(directory, settings) if directory else None
