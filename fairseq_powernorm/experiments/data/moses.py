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
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, TextIO, cast

from ..errors import UserError
from ..files import sha256
from ..tools import cpus
from . import moses_python


def steps(settings: Mapping[str, Any], split: str) -> List[str]:
    """The names of the steps that the text of a split takes, in order."""
    test, chosen = split == "test", settings.get
    plain = chosen("tokenizer") == "none"
    return [step for step, wanted in (
        ("apostrophes", chosen("map_apostrophes") and test),
        ("lowercase", chosen("lowercase") and not chosen("lowercase_last")),
        ("normalize", chosen("normalize_punctuation") or chosen("normalize_train") and not test),
        ("printable", chosen("normalize_train") and not test),
        ("words" if plain else "tokenize_dashes" if chosen("split_dashes") else "tokenize", True),
        ("lowercase", chosen("lowercase") and chosen("lowercase_last")),
    ) if wanted]


# ---- in Python -------------------------------------------------------------------------------------------------------


#: step -> what makes a line of a line in a language
PYTHON: Dict[str, Callable[[str, str], str]] = {
    "lowercase": lambda line, language: moses_python.lowercase(line),
    "normalize": moses_python.normalize_punctuation,
    "printable": lambda line, language: moses_python.replace_unprintable(line),
    "apostrophes": lambda line, language: line.replace("\u2019", "'"),
    "words": lambda line, language: " ".join(line.split()),  # of text that is tokenized already
    "tokenize": moses_python.tokenize,
    "tokenize_dashes": functools.partial(moses_python.tokenize, split_dashes=True),
}


def process(lines: List[str], names: Sequence[str], language: str) -> List[str]:
    """The lines after the named steps."""
    for name in names:
        step = PYTHON[name]
        lines = [step(line, language) for line in lines]
    return lines


# ---- in Perl ---------------------------------------------------------------------------------------------------------


#: step -> what makes the script and its options for a language; None where Python takes the step all the same
SCRIPTS: Dict[str, Optional[Callable[[str], List[str]]]] = {
    "lowercase": lambda language: ["lowercase.perl"],
    "normalize": lambda language: ["normalize-punctuation.perl", language],
    "printable": lambda language: ["remove-non-printing-char.perl"],
    "apostrophes": None,
    "words": None,
    "tokenize": lambda language: ["tokenizer.perl", "-threads", str(cpus()), "-l", language],
    "tokenize_dashes": lambda language: ["tokenizer.perl", "-threads", str(cpus()), "-a", "-l", language],
}


def scripts(names: Iterable[str], language: str) -> List[List[str]]:
    """[script, option, ...] of those of the steps that have a script."""
    makers = (SCRIPTS[name] for name in names)
    return [maker(language) for maker in makers if maker is not None]


class Perl:
    """The scripts of a Moses checkout, $MOSES.

    Raises:
        UserError: perl, or a script that the settings need, is not there
    """

    def __init__(self, directory: str, settings: Mapping[str, Any]) -> None:
        perl, self.directory = shutil.which("perl"), Path(directory) / "scripts" / "tokenizer"
        if perl is None:
            raise UserError(f"MOSES={directory}: its scripts need perl, which is not installed; unset MOSES")
        self.perl = perl
        names = {command[0] for split in ("train", "test") for language in settings["languages"]
                 for command in scripts(steps(settings, split), language)}
        self.files = [self.directory / name for name in sorted(names)]
        missing = [str(path) for path in self.files if not path.is_file()]
        if missing:
            raise UserError(f"MOSES={directory} lacks {', '.join(missing)}; valid is the directory of a checkout of "
                            f"mosesdecoder")
        prefixes = Path(directory) / "scripts" / "share" / "nonbreaking_prefixes"
        found = [prefixes / f"nonbreaking_prefix.{language}" for language in settings["languages"]]
        self.files += [path for path in found if path.is_file()]

    def digests(self) -> Dict[str, str]:
        """script -> SHA-256, of all that the result depends on."""
        return {path.name: sha256(path) for path in self.files}

    def process(self, lines: Iterable[str], names: Sequence[str], language: str, lock: TextIO) -> Iterator[str]:
        """The lines after the named steps, one for each; the processes hold the lock, too.

        Raises:
            UserError: a script fails, or does not give a line for each
        """
        commands = [[self.perl, str(self.directory / script), *options] for script, *options in scripts(names, language)]
        if "apostrophes" in names:  # the first step
            lines = (PYTHON["apostrophes"](line, language) for line in lines)
        # which would change what the scripts that read bytes see
        environment = {name: value for name, value in os.environ.items() if name != "PERL_UNICODE"}
        given = 0
        failed: List[BaseException] = []
        with tempfile.TemporaryFile() as errors:
            running: List[subprocess.Popen[bytes]] = []
            for command in commands:
                source = running[-1].stdout if running else subprocess.PIPE
                running.append(subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=errors,
                                                pass_fds=(lock.fileno(),), env=environment))
                if len(running) > 1:
                    cast(IO[bytes], source).close()
            begin, end = cast(IO[bytes], running[0].stdin), cast(IO[bytes], running[-1].stdout)

            def feed() -> None:
                nonlocal given
                try:
                    with begin:
                        for line in lines:
                            # \r and the like inside a line are spaces to Perl, too
                            begin.write(line.encode("utf-8") + b"\n")
                            given += 1
                except BrokenPipeError:
                    pass  # the script has failed; its status says so
                except BaseException as error:  # reading the text
                    failed.append(error)

            feeder = threading.Thread(target=feed, daemon=True)
            feeder.start()
            taken = 0
            try:
                for taken, made in enumerate(end, 1):  # noqa: B007  (used below)
                    yield made.decode("utf-8").rstrip("\n")
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


def perl(settings: Mapping[str, Any]) -> Optional[Perl]:
    """The Perl scripts that $MOSES names, None if it names none."""
    directory = os.environ.get("MOSES")
    return Perl(directory, settings) if directory else None
