"""The steps from raw to tokenized text, in Python (sacremoses) or, with $MOSES, by Moses' own Perl scripts.

Where the two differ, seen on Multi30k and on odd lines:
- tokenize: a full stop that ends the line after a single capital, an abbreviation or a word with a full stop in it
  ("Linie A.", "usw.", "U.S.") stays with its word; the Perl script splits it off. 17 of the 58,000 training lines of
  Multi30k. The control characters 1C to 1F become spaces; the Perl script drops them. Signs of Indic scripts stay with
  their letters.
- normalize: ’ becomes ', with the Perl script ". At the end of a German line the Perl script puts the full stops
  behind a quotation mark that follows them. `normalize_train` does both as the Perl script does. Some versions of that
  script make " of ‘ and ‚, too.
- lowercase: a capital sigma that ends a word becomes ς, with the Perl script σ.
"""

import functools
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from ..settings import UserError, cpus, sha256


def steps(settings, split):
    """The names of the steps that the text of a split takes, in order."""
    training, chosen = split == "train", settings.get
    return [step for step, wanted in (
        ("lowercase", chosen("lowercase") and not chosen("lowercase_last")),
        ("normalize", chosen("normalize_punctuation")),
        ("normalize_train", training and chosen("normalize_train")),
        ("printable", training and chosen("normalize_train")),
        ("apostrophes", not training and chosen("map_apostrophes")),
        ("tokenize_dashes" if chosen("split_dashes") else "tokenize", True),
        ("lowercase", chosen("lowercase") and chosen("lowercase_last")),
    ) if wanted]


# ---- in Python -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def tokenizer(language):
    from sacremoses import MosesTokenizer

    return MosesTokenizer(lang=language)


@functools.lru_cache(maxsize=None)
def normalizer(language, perl):
    from sacremoses import MosesPunctNormalizer

    return MosesPunctNormalizer(lang=language, perl_parity=perl)


def printable(line):
    """Other characters (control, format, private, unassigned) become spaces."""
    import regex

    return regex.sub(r"\p{C}", " ", line)


PYTHON = {
    "lowercase": lambda line, language: line.lower(),
    "normalize": lambda line, language: normalizer(language, False).normalize(line),
    # Perl's rules see the end of the line.
    "normalize_train": lambda line, language: normalizer(language, True).normalize(line + "\n"),
    "printable": lambda line, language: printable(line),
    "apostrophes": lambda line, language: line.replace("\u2019", "'"),
    "tokenize": lambda line, language: tokenizer(language).tokenize(line, return_str=True),
    "tokenize_dashes": lambda line, language: tokenizer(language).tokenize(
        line, aggressive_dash_splits=True, return_str=True),
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
    "normalize_train": lambda language: ["normalize-punctuation.perl", language],
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
        if "apostrophes" in names:
            lines = map(lambda line: PYTHON["apostrophes"](line, language), lines)
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
                for taken, line in enumerate(source, 1):
                    yield line.decode("utf-8").rstrip("\n").strip(" ")
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
