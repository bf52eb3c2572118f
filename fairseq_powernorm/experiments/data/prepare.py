"""Makes data/BENCH/: see scripts/prepare.sh."""

import argparse
import collections
import concurrent.futures.process
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

from ..directories import locked, put_back, resumable_directory, same
from ..errors import UserError, choose
from ..files import read_json, sha256, write_json
from ..paths import data_root
from ..settings import BPE_TYPES, data_settings, is_lm, load
from ..tools import DATA_TOOLS, cpus, tool, versions
from . import bpe, corpora, moses

# Raised when the same settings make other data.
SCHEMA = 2
# Settings of configs/data/BENCH.yaml: setting -> type. Each file has the first ones.
REQUIRED = {"bpe": str, "bpe_size": int, "lowercase": bool, "normalize_punctuation": bool}
OPTIONAL = {
    "lowercase_last": bool,   # lower-case after tokenization, not before it
    "normalize_train": bool,  # training and validation text: normalize punctuation, blanks for what is not printable
    "map_apostrophes": bool,  # test text: U+2019 becomes '
    "split_dashes": bool,     # aggressive dash splitting: a-b becomes a @-@ b
    "clean_ratio": float,     # training pairs with more than so many tokens on a side for one on the other are dropped
    "clean_max": int,         # and those with more tokens on a side
    "clean_pieces": bool,     # they are counted after BPE, not before it
    "cleaning": str,          # these three by name: a key of CLEANING
    "valid_every": int,       # every such training pair that is left is one of the validation text
    "news_commentary": str,
}
# Those of scripts/evaluate.sh, on which the prepared data do not depend.
SCORING = {
    "split_compounds": bool,  # tokenized BLEU counts a ##AT##-##AT## b for a-b
}
# Which training pairs of WMT14 stay. The authors call Moses' clean-corpus-n for 1 to 80 words without a ratio, for which
# its own is 9; fairseq's prepare-wmt14en2de.sh counts pieces.
CLEANING = {
    "authors": {"clean_max": 80, "clean_ratio": 9.0, "clean_pieces": False},
    "fairseq": {"clean_max": 250, "clean_ratio": 1.5, "clean_pieces": True},
}
# Moses' clean-corpus-n drops pairs with a longer word, too.
LONGEST_WORD = 1000
BATCH = 500


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/prepare.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    parser.add_argument("--bpe")
    parser.add_argument("--bpe-size")
    parser.add_argument("--news-commentary")
    parser.add_argument("--cleaning")
    parser.add_argument("--archive-dir", default=os.environ.get("DATA_ARCHIVES") or None)
    parser.add_argument("--archive")
    parser.add_argument("--text-dir")
    parser.add_argument("--allow-unverified", action="store_true")
    parser.add_argument("--force", action="store_true")
    return parser.parse_args(arguments)


def settings_of(config, options):
    """How the text is to be prepared: the settings of configs/data/BENCH.yaml and the options over them."""
    own = {} if is_lm(config) else checked(options.benchmark, data_settings(options.benchmark))
    for option, value in (("--bpe", options.bpe), ("--bpe-size", options.bpe_size)):
        if is_lm(config) and value is not None:
            raise UserError(f"{option} {value!r}: the text of {options.benchmark} is used word by word, as it is")
    for option, value, setting in (("--news-commentary", options.news_commentary, "news_commentary"),
                                   ("--cleaning", options.cleaning, "cleaning")):
        if value is not None and setting not in own:
            raise UserError(f"{option} {value!r}: {options.benchmark} has no such part; valid with: wmt14")
    if is_lm(config):
        return {}
    size = own["bpe_size"] if options.bpe_size is None else options.bpe_size
    if not re.fullmatch(r"[1-9]\d*", str(size)):
        raise UserError(f"--bpe-size {size!r} is no number of merges or pieces; valid: 1 or more")
    settings = {
        "languages": [config.task.source_lang, config.task.target_lang],
        **{name: value for name, value in own.items() if name not in SCORING},
        "bpe": choose("--bpe", options.bpe or own["bpe"], BPE_TYPES),
        "bpe_size": int(size),
    }
    if "news_commentary" in settings:
        settings["news_commentary"] = choose(
            "--news-commentary", options.news_commentary or settings["news_commentary"], corpora.NEWS_COMMENTARY)
    if "cleaning" in settings:
        settings["cleaning"] = choose("--cleaning", options.cleaning or settings["cleaning"], CLEANING)
        settings.update(CLEANING[settings["cleaning"]])
    return settings


def checked(benchmark, settings):
    """The settings of configs/data/BENCH.yaml, numbers as their types; refuses a name or a value that cannot be."""
    where, valid = f"configs/data/{benchmark}.yaml:", {**REQUIRED, **OPTIONAL, **SCORING}
    for name, value in settings.items():
        kind = valid[choose(where, name, valid)]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{where} {name}: {value!r} is {type(value).__name__}, not {kind.__name__}")
    for name in REQUIRED:
        if name not in settings:
            raise UserError(f"{where} {name} is missing")
    for name in settings.keys() & CLEANING["authors"] if "cleaning" in settings else ():
        raise UserError(f"{where} {name}: cleaning {settings['cleaning']!r} sets it; give one of the two")
    return {name: valid[name](value) for name, value in settings.items()}


def prepare(arguments):
    options = parse(arguments)
    config = load(options.benchmark)
    settings = settings_of(config, options)
    perl = moses.perl(settings) if settings else None
    if perl:
        settings["moses"] = perl.digests()
    root = data_root()
    target = root / options.benchmark
    source = corpora.source(options.benchmark, settings or {"languages": ["txt"]}, text_dir=options.text_dir,
                            archive_dir=options.archive_dir, archive=options.archive,
                            download_dir=root / "downloads" / options.benchmark,
                            allow_unverified=options.allow_unverified)
    request = {"schema": SCHEMA, "benchmark": options.benchmark, "settings": settings, "sources": source.identity()}
    with locked(target) as lock:
        put_back(target)
        if target.exists() and not options.force:
            refuse_other(target, request)
            print(f"{target} is prepared already; nothing to do (--force prepares it again)")
            return
        request["versions"] = versions(DATA_TOOLS)
        with Workers() as pool, resumable_directory(target, request) as directory:
            if is_lm(config):
                stages = LanguageModel(directory, source, options.benchmark, lock)
            else:
                stages = Translation(directory, source, options.benchmark, settings, perl, pool, lock)
            run(stages.list(), directory)
            for path in directory.iterdir():
                if path.is_dir() and path.name not in stages.results:
                    shutil.rmtree(path)
            facts, summary = stages.facts()
            outputs = {str(path.relative_to(directory)): sha256(path)
                       for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "prepared.json"}
            write_json(directory / "prepared.json",
                       {**request, "sources": source.identity(), **facts, "versions": request["versions"],
                        "outputs": outputs})
    print(f"prepared {target}: " + ", ".join(f"{split} {count:,}" for split, count in summary.items())
          + (" tokens" if is_lm(config) else ""))


def refuse_other(target, request):
    """Refuses if what lies in target was not made by the same request."""
    if not (target / "prepared.json").is_file():
        raise UserError(f"{target} exists and was not made by scripts/prepare.sh; move it away, or replace it with --force")
    stamp = read_json(target / "prepared.json")
    there, wanted = stamp.get("settings", {}), request["settings"]
    details = ["tokenized by other Moses scripts" if key == "moses" else
               f"{key} is {there.get(key)}, asked for {wanted.get(key)}"
               for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if not same(stamp.get("sources"), request["sources"]):
        details.append("other source text")
    if stamp.get("schema") != request["schema"]:
        details.append("by an earlier version of this program")
    if details:
        raise UserError(f"{target} was prepared otherwise ({'; '.join(details)}); --force replaces it")


# ---- stages ----------------------------------------------------------------------------------------------------------


def run(stages, directory):
    """Runs (title, names of directories, function) one after another, beginning after the last that is whole.

    A function is given the paths of the directories that it fills; they get their names when it has ended well.
    """
    whole = [number for number, (_, names, _) in enumerate(stages, 1)
             if all((directory / name).is_dir() for name in names)]
    for number, (title, names, function) in enumerate(stages, 1):
        heading = f"[{number}/{len(stages)}] {title}"
        if whole and number <= whole[-1]:
            print(f"{heading}: done already", flush=True)
            continue
        print(heading, flush=True)
        making = [directory / f".{name}" for name in names]
        try:
            for path in making:
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            function(*making)
        except BaseException:
            for path in making:
                shutil.rmtree(path, ignore_errors=True)
            raise
        for path, name in zip(making, names):
            shutil.rmtree(directory / name, ignore_errors=True)
            path.rename(directory / name)


class Translation:
    """corpus/ -> tokens/ -> raw/ and tok/, line for line the same sentences -> codes/ -> bpe/ -> data-bin/."""

    results = ("raw", "tok", "bpe", "data-bin")

    def __init__(self, directory, source, benchmark, settings, perl, pool, lock):
        self.directory, self.source, self.benchmark, self.settings = directory, source, benchmark, settings
        self.perl, self.pool, self.lock = perl, pool, lock
        self.languages = settings["languages"]

    def list(self):
        tokenizer = "Moses, Perl" if self.perl else "Moses"
        return [("text", ["corpus"], self.text),
                (f"tokenization ({tokenizer})", ["tokens"], self.tokenize),
                ("cleaning", ["raw", "tok"], self.clean),
                (f"learning BPE ({self.settings['bpe']}, {self.settings['bpe_size']})", ["codes"], self.learn),
                ("applying BPE", ["bpe"], self.apply),
                ("binarization", ["data-bin"], self.binarize)]

    def names(self, folder):
        """The texts in a folder: split.language."""
        names = [f"{split}.{language}" for split in corpora.SPLITS for language in self.languages]
        return [name for name in names if (folder / name).exists()]

    def text(self, corpus):
        self.source.write(corpus)
        corpora.check_parallel(corpus, self.names(corpus))

    def tokenize(self, tokens):
        corpus = self.directory / "corpus"
        for name in self.names(corpus):
            split, _, language = name.partition(".")
            steps = moses.steps(self.settings, split)
            if self.perl:
                function = functools.partial(self.perl.process, names=steps, language=language, lock=self.lock)
            else:
                function = self.pool.map(functools.partial(moses.process, names=steps, language=language))
            transform(corpus / name, tokens / name, function)

    def clean(self, raw, tok):
        corpus, tokens = self.directory / "corpus", self.directory / "tokens"
        every = None if (corpus / f"valid.{self.languages[0]}").exists() else self.settings.get("valid_every")
        for name in self.names(corpus):
            if not name.startswith("train."):
                shutil.copyfile(corpus / name, raw / name)
                shutil.copyfile(tokens / name, tok / name)
        limits = None if self.settings.get("clean_pieces") else self.settings
        counts = select([folder / f"train.{language}" for folder in (tokens, corpus) for language in self.languages],
                        [(folder, language) for folder in (tok, raw) for language in self.languages], limits, every)
        report(counts, every)

    def learn(self, codes):
        bpe.LEARN[self.settings["bpe"]]([self.directory / "tok" / f"train.{language}" for language in self.languages],
                                        codes, self.settings["bpe_size"])

    def apply(self, folder):
        codes, tok = self.directory / "codes", self.directory / "tok"
        for path in codes.iterdir():
            shutil.copyfile(path, folder / path.name)
        function = self.pool.map(functools.partial(bpe.APPLY[self.settings["bpe"]], directory=codes))
        for name in self.names(tok):
            transform(tok / name, folder / name, function)
        if self.settings.get("clean_pieces"):
            whole = [folder / f"all.{language}" for language in self.languages]
            for path, language in zip(whole, self.languages):
                (folder / f"train.{language}").rename(path)
            report(select(whole, [(folder, language) for language in self.languages], self.settings, None), None)
            for path in whole:
                path.unlink()

    def binarize(self, data_bin):
        command = [tool("fairseq-preprocess"), "--source-lang", self.languages[0], "--target-lang", self.languages[1],
                   "--joined-dictionary", "--workers", str(cpus())]
        binarize(self.directory, data_bin, command, {split: Path("bpe", split) for split in corpora.SPLITS}, self.lock)

    def facts(self):
        counts = {}
        for split in corpora.SPLITS:
            with open(self.directory / "bpe" / f"{split}.{self.languages[0]}", "rb") as lines:
                counts[split] = sum(1 for _ in lines)
        differing = corpora.differing_sentences(self.benchmark, counts)
        if differing:
            print(f"NOT the published {self.benchmark}, whose numbers of sentences stand in parentheses: "
                  f"{', '.join(differing)}", flush=True)
        return {"sentences": counts}, counts


class LanguageModel:
    """raw/, the text as it is -> data-bin/."""

    results = ("raw", "data-bin")

    def __init__(self, directory, source, benchmark, lock):
        self.directory, self.source, self.benchmark, self.lock = directory, source, benchmark, lock
        self.counted = None

    def list(self):
        return [("text", ["raw"], self.text), ("binarization", ["data-bin"], self.binarize)]

    def text(self, raw):
        self.source.write(raw)
        corpora.check_parallel(raw, [f"{split}.txt" for split in corpora.SPLITS])
        self.count(raw)

    def count(self, raw):
        """Counts what is in the text, and says so."""
        self.counted = corpora.count_words(raw)
        for split, count in self.counted["counts"].items():
            print(f"  {split}: {count['words']:,} words + {count['lines']:,} line ends = {count['tokens']:,} tokens; "
                  f"{count['unknown']:,} are <unk>, {count['out_of_vocabulary']:,} more are not in the training text",
                  flush=True)
        print(f"  {self.counted['types']:,} types, <unk> and the line end among them", flush=True)
        differing = corpora.differing_counts(self.benchmark, self.counted)
        if differing:
            print(f"  NOT the published {self.benchmark}, whose counts stand in parentheses: {', '.join(differing)}",
                  flush=True)
        self.counted["published"] = not differing

    def binarize(self, data_bin):
        binarize(self.directory, data_bin, [tool("fairseq-preprocess"), "--only-source", "--workers", str(cpus())],
                 {split: Path("raw", f"{split}.txt") for split in corpora.SPLITS}, self.lock)
        log = (data_bin / "preprocess.log").read_text(encoding="utf-8")
        theirs = {split: int(found) for split, found in re.findall(r"raw/(\w+)\.txt: \d+ sents, (\d+) tokens", log)}
        _, ours = self.facts()
        if theirs != ours:
            raise UserError(f"fairseq-preprocess counts other tokens, {theirs}, than stand in the text, {ours}")

    def facts(self):
        if self.counted is None:
            self.count(self.directory / "raw")
        return self.counted, {split: count["tokens"] for split, count in self.counted["counts"].items()}


# ---- what the stages do ----------------------------------------------------------------------------------------------


def transform(source, target, function):
    """Writes function(lines of source) to target, one line for each, with a sign of life every ten seconds."""
    with open(source, encoding="utf-8", newline="\n") as read, open(target, "w", encoding="utf-8", newline="\n") as write:
        count, told = 0, time.monotonic()
        for count, line in enumerate(function(line.rstrip("\r\n") for line in read), 1):
            write.write(line + "\n")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"  {source.parent.name}/{source.name}: {count:,} lines", flush=True)
    print(f"  {target.parent.name.lstrip('.')}/{target.name}: {count:,} lines", flush=True)


class Workers:
    """A process for each processor, which give lines back in order; only so many are held as keep them busy."""

    def __init__(self):
        # They inherit nothing, neither the lock nor files that are open.
        self.pool = concurrent.futures.ProcessPoolExecutor(
            cpus(), mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def map(self, function):
        """Given a function of a list of lines, the same of an iterator of lines, in parallel."""
        return functools.partial(self._map, function)

    def _map(self, function, lines):
        lines, running = iter(lines), collections.deque()
        try:
            for batch in iter(lambda: list(itertools.islice(lines, BATCH)), []):
                running.append(self.pool.submit(function, batch))
                if len(running) > 2 * cpus():
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory; run again to go on") from None


def start_worker():
    """Makes a worker end when its parent is gone (one that is killed cannot tell its workers), and leave ^C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def select(sources, targets, limits, every):
    """Writes line for line those training pairs that are within the limits; gives {split: pairs, "dropped": pairs}.

    Args:
        sources: the paths of the two sides, and of other texts that are line for line the same
        targets: for each of them, (folder, language): what is kept becomes folder/train.language
        limits: the settings `clean_ratio` and `clean_max`, within which a pair with an empty side never is; None: none
        every: each `every`-th pair that is kept becomes one of folder/valid.language; None: none does
    """
    counts = {"train": 0, "dropped": 0, **({"valid": 0} if every else {})}
    with contextlib.ExitStack() as stack:
        reads = [stack.enter_context(open(path, "rb")) for path in sources]
        writes = {split: [stack.enter_context(open(folder / f"{split}.{language}", "wb"))
                          for folder, language in targets]
                  for split in counts if split != "dropped"}
        for lines in zip(*reads):
            if limits is not None and not within(lines[:2], limits):
                counts["dropped"] += 1
                continue
            number = counts["train"] + counts.get("valid", 0) + 1
            split = "valid" if every and number % every == 0 else "train"
            counts[split] += 1
            for line, write in zip(lines, writes[split]):
                write.write(line)
    return counts


def within(pair, limits):
    """Is a pair of tokenized sentences one that Moses' clean-corpus-n keeps?"""
    sides = [side.decode("utf-8").split() for side in pair]
    few, many = sorted(len(words) for words in sides)
    if few == 0 or many > limits.get("clean_max", many):
        return False
    if "clean_ratio" in limits:
        return many / few <= limits["clean_ratio"] and all(len(word) <= LONGEST_WORD for words in sides for word in words)
    return True


def report(counts, every):
    """Says how many pairs were dropped; refuses if none is left."""
    if counts["dropped"]:
        print(f"  dropped {counts['dropped']:,} training pairs with an empty side, too long, or of unequal lengths",
              flush=True)
    if counts["train"] == 0:
        raise UserError("no sentence pair of the training text is left: each has a side that is empty, too long, or "
                        "much longer than the other")
    if counts.get("valid") == 0:
        raise UserError(f"too few training pairs, {counts['train']}, to take one in {every} for validation")


def binarize(directory, data_bin, command, texts, lock):
    """data-bin/ by a fairseq-preprocess command, given split -> its text; what it counts goes to preprocess.log there.

    It holds the lock, too: should this process be killed, the next one must not start while it still writes.
    """
    command = [*command, "--destdir", str(data_bin)]
    for split, text in texts.items():
        command += [f"--{split}pref", str(directory / text)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=(lock.fileno(),))
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"fairseq-preprocess failed with exit status {done.returncode}: {said[-1]}")
    # Its own log names the temporary directory; ours stays the same from run to run.
    (data_bin / "preprocess.log").write_text(
        "".join(line + "\n" for line in done.stdout.splitlines() if "sents" in line and "tokens" in line)
        .replace(str(directory) + os.sep, ""), encoding="utf-8")


def prepare_or_refuse(arguments):
    """As prepare; a disk that is full, a file that cannot be read, an interruption are one line, too."""
    try:
        prepare(arguments)
    except OSError as error:
        raise UserError(f"{error.filename or 'cannot write'}: {error.strerror or error}; stages that are whole are kept, "
                        f"and the next run goes on after them") from None
    except KeyboardInterrupt:
        raise UserError("interrupted; stages that are whole are kept, and the next run goes on after them") from None
