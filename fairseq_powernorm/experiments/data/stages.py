"""The stages from text to binarized data, each of which leaves directories that are whole or absent."""

import functools
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, TextIO, Tuple

from ..errors import UserError
from ..tools import cpus, tied, tool
from . import bpe, cleaning, corpora, moses, texts
from .recipe import Settings
from .sources import Source
from .workers import Process, Workers, transform

#: of a sentence: models take 1,024 with the end of the sentence, and fairseq refuses longer ones when it validates
LONGEST_PIECES = 1022
#: of a language model with an ordinary softmax
MANY_TYPES = 100_000


class Stage(NamedTuple):
    """A step of the preparation."""

    title: str
    directories: Sequence[str]  # the names of those that it fills
    fill: Callable[..., None]  # given their paths


class Preparation(ABC):
    """What is made of a benchmark's text in a directory."""

    #: the directories that stay in the end
    results: Sequence[str]

    def __init__(self, directory: Path, source: Source, benchmark: str, lock: TextIO) -> None:
        self.directory, self.source, self.benchmark, self.lock = directory, source, benchmark, lock

    @abstractmethod
    def stages(self) -> List[Stage]:
        """The stages, in order."""

    @abstractmethod
    def facts(self) -> Tuple[Dict[str, Any], Dict[str, int]]:
        """What prepared.json says of the data, and the size of each split; after the last stage."""

    def run(self) -> None:
        """Runs the stages one after another, beginning after the last one that is whole."""
        stages = self.stages()
        whole = [
            number
            for number, stage in enumerate(stages, 1)
            if all((self.directory / name).is_dir() for name in stage.directories)
        ]
        for number, stage in enumerate(stages, 1):
            heading = f"[{number}/{len(stages)}] {stage.title}"
            if whole and number <= whole[-1]:
                print(f"{heading}: done already", flush=True)
                continue
            print(heading, flush=True)
            making = [self.directory / f".{name}" for name in stage.directories]
            try:
                for path in making:
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir()
                stage.fill(*making)
            except BaseException:
                for path in making:
                    shutil.rmtree(path, ignore_errors=True)
                raise
            for path, name in zip(making, stage.directories):
                shutil.rmtree(self.directory / name, ignore_errors=True)
                path.rename(self.directory / name)


class Translation(Preparation):
    """corpus/ -> tokens/ -> raw/ and tok/, the same sentences line for line -> codes/ -> bpe/ -> data-bin/."""

    results = ("raw", "tok", "bpe", "data-bin")

    def __init__(
        self,
        directory: Path,
        source: Source,
        benchmark: str,
        lock: TextIO,
        *,
        settings: Settings,
        perl: Optional[moses.Perl],
        workers: Workers,
    ) -> None:
        super().__init__(directory, source, benchmark, lock)
        self.settings, self.perl, self.workers = settings, perl, workers
        self.languages: List[str] = settings["languages"]

    def stages(self) -> List[Stage]:
        tokenizer = "Moses, Perl" if self.perl else "none" if self.settings.get("tokenizer") == "none" else "Moses"
        return [
            Stage("text", ["corpus"], self.text),
            Stage(f"tokenization ({tokenizer})", ["tokens"], self.tokenize),
            Stage("cleaning", ["raw", "tok"], self.clean),
            Stage(f"learning BPE ({self.settings['bpe']}, {self.settings['bpe_size']})", ["codes"], self.learn),
            Stage("applying BPE", ["bpe"], self.apply),
            Stage("binarization", ["data-bin"], self.binarize),
        ]

    def names(self, folder: Path) -> List[str]:
        """The texts in a folder: SPLIT.LANGUAGE."""
        names = [f"{split}.{language}" for split in corpora.SPLITS for language in self.languages]
        return [name for name in names if (folder / name).exists()]

    def text(self, corpus: Path) -> None:
        self.source.write(corpus)
        texts.check_parallel(corpus, self.names(corpus))

    def tokenize(self, tokens: Path) -> None:
        corpus = self.directory / "corpus"
        for name in self.names(corpus):
            split, _, language = name.partition(".")
            transform(corpus / name, tokens / name, self.tokenizer(moses.steps(self.settings, split), language))

    def tokenizer(self, steps: Sequence[str], language: str) -> Process:
        if self.perl:
            return functools.partial(self.perl.process, names=steps, language=language, lock=self.lock)
        return self.workers.map(functools.partial(moses.process, names=steps, language=language))

    def clean(self, raw: Path, tok: Path) -> None:
        corpus, tokens = self.directory / "corpus", self.directory / "tokens"
        every = None if (corpus / f"valid.{self.languages[0]}").exists() else self.settings.get("valid_every")
        for name in self.names(corpus):
            if not name.startswith("train."):
                shutil.copyfile(corpus / name, raw / name)
                shutil.copyfile(tokens / name, tok / name)
        cleaning.select(
            [folder / f"train.{language}" for folder in (tokens, corpus) for language in self.languages],
            [(folder, language) for folder in (tok, raw) for language in self.languages],
            None if self.settings.get("clean_pieces") else self.settings,
            every,
        )

    def learn(self, codes: Path) -> None:
        train = [self.directory / "tok" / f"train.{language}" for language in self.languages]
        bpe.LEARN[self.settings["bpe"]](train, codes, self.settings["bpe_size"])

    def apply(self, folder: Path) -> None:
        codes, tok = self.directory / "codes", self.directory / "tok"
        for path in codes.iterdir():
            shutil.copyfile(path, folder / path.name)
        pieces = self.workers.map(functools.partial(bpe.APPLY[self.settings["bpe"]], codes))
        for name in self.names(tok):
            transform(tok / name, folder / name, pieces)
            if "tokenizer" in self.settings and not name.startswith("train."):  # of training text, fairseq leaves such out
                texts.check_length(folder / name, LONGEST_PIECES)
        if self.settings.get("clean_pieces"):
            whole = [folder / f"all.{language}" for language in self.languages]
            for path, language in zip(whole, self.languages):
                (folder / f"train.{language}").rename(path)
            cleaning.select(whole, [(folder, language) for language in self.languages], self.settings)
            for path in whole:
                path.unlink()

    def binarize(self, data_bin: Path) -> None:
        source, target = self.languages
        command = [tool("fairseq-preprocess"), "--source-lang", source, "--target-lang", target]
        command += ["--joined-dictionary"] if self.settings.get("joined_dictionary", True) else []
        command += ["--workers", str(cpus())]
        binarize(self.directory, data_bin, command, {split: Path("bpe", split) for split in self.splits}, self.lock)

    @property
    def splits(self) -> List[str]:
        """Those that there are; the user's own text need not have `test`."""
        return [split for split in corpora.SPLITS if (self.directory / "bpe" / f"{split}.{self.languages[0]}").exists()]

    def facts(self) -> Tuple[Dict[str, Any], Dict[str, int]]:
        counts = {}
        for split in self.splits:
            with open(self.directory / "bpe" / f"{split}.{self.languages[0]}", "rb") as lines:
                counts[split] = sum(1 for _ in lines)
        differing = corpora.differing_sentences(self.benchmark, counts)
        if differing:
            print(
                f"NOT the published {self.benchmark}, whose numbers of sentences are given in parentheses: "
                f"{', '.join(differing)}",
                flush=True,
            )
        return {"sentences": counts}, counts


class LanguageModel(Preparation):
    """raw/, the text as it is -> data-bin/."""

    results = ("raw", "data-bin")

    def __init__(self, directory: Path, source: Source, benchmark: str, lock: TextIO) -> None:
        super().__init__(directory, source, benchmark, lock)
        self._counts: Optional[texts.Counts] = None

    def stages(self) -> List[Stage]:
        return [Stage("text", ["raw"], self.text), Stage("binarization", ["data-bin"], self.binarize)]

    def text(self, raw: Path) -> None:
        self.source.write(raw)
        texts.check_parallel(raw, [f"{split}.txt" for split in texts.splits_of(raw)])
        self._counts = self.count(raw)

    @property
    def counts(self) -> texts.Counts:
        """What the text holds; counted anew if the first stage was done by an earlier run."""
        if self._counts is None:
            self._counts = self.count(self.directory / "raw")
        return self._counts

    def count(self, raw: Path) -> texts.Counts:
        """Counts what the text holds, and says so."""
        counts = texts.count_words(raw)
        for split, count in counts.splits.items():
            print(
                f"  {split}: {count['words']:,} words + {count['lines']:,} line ends = {count['tokens']:,} tokens; "
                f"{count['unknown']:,} are <unk>, {count['out_of_vocabulary']:,} more are not in the training text",
                flush=True,
            )
        print(f"  {counts.types:,} types, <unk> and the line end among them", flush=True)
        if counts.types > MANY_TYPES and self.benchmark not in corpora.CORPORA:
            print("  NOTE: so many make a large and slow model; a BPE of the text has fewer, or build your settings on "
                  "wikitext103, whose softmax is adaptive", flush=True)
        differing = self.differing(counts)
        if differing:
            print(
                f"  NOT the published {self.benchmark}, whose counts are given in parentheses: {', '.join(differing)}",
                flush=True,
            )
        return counts

    def differing(self, counts: texts.Counts) -> Sequence[str]:
        return corpora.differing_counts(self.benchmark, {**counts.tokens, "types": counts.types})

    def binarize(self, data_bin: Path) -> None:
        ours = self.counts.tokens
        command = [tool("fairseq-preprocess"), "--only-source", "--workers", str(cpus())]
        binarize(self.directory, data_bin, command, {split: Path("raw", f"{split}.txt") for split in ours}, self.lock)
        log = (data_bin / "preprocess.log").read_text(encoding="utf-8")
        theirs = {split: int(found) for split, found in re.findall(r"raw/(\w+)\.txt: \d+ sents, (\d+) tokens", log)}
        if theirs != ours:
            raise UserError(f"fairseq-preprocess counts {theirs} tokens, but the text has {ours}")

    def facts(self) -> Tuple[Dict[str, Any], Dict[str, int]]:
        counts, is_known = self.counts, isinstance(corpora.CORPORA.get(self.benchmark), corpora.LanguageModelCorpus)
        published = is_known and not self.differing(counts)
        return {"counts": counts.splits, "types": counts.types, "published": published}, counts.tokens


def binarize(
    directory: Path, data_bin: Path, command: Sequence[str], splits: Mapping[str, Path], lock: TextIO
) -> None:
    """Fills data-bin/ by a fairseq-preprocess command; what it counts goes to preprocess.log there.

    The command holds the lock, too: should this process be killed, the next one must not start while it still writes.

    Args:
        directory: holds data-bin and the texts
        splits: split -> its text, from the directory
    """
    # Paths are relative to the directory: fairseq-preprocess takes a comma for the border between two.
    command = [*command, "--destdir", str(data_bin.relative_to(directory))]
    for split, path in splits.items():
        command += [f"--{split}pref", str(path)]
    done = subprocess.run(
        tied(command),
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock.fileno(),),
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise UserError(f"fairseq-preprocess failed with exit status {done.returncode}: {said[-1]}")
    # Its own log names the temporary directory; ours stays the same from run to run.
    counted = [line for line in done.stdout.splitlines() if "sents" in line and "tokens" in line]
    (data_bin / "preprocess.log").write_text("".join(line + "\n" for line in counted), encoding="utf-8")
