"""Text as it lies in files: the layouts of published corpora, checks of sentences, and counts of words."""

import collections
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List

from ..errors import UserError
from .corpora import SPLITS


def all_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text without their line ends."""
    return (line[:-1] if line.endswith(b"\n") else line for line in lines)


def tagged_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The sentences of IWSLT's train.tags: lines about the talk are left out, and the tags of titles are removed."""
    for line in all_lines(lines):
        if not any(tag in line for tag in (b"<url>", b"<talkid>", b"<keywords>")):
            yield re.sub(rb"</?(?:title|description)>", b"", line)


def segments(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The sentences of an XML or SGML file, each of which is a <seg id="N"> on one line; entities are left as they are."""
    for line in all_lines(lines):
        if b"<seg id" in line:
            yield re.sub(rb"\s*</seg>\s*", b"", re.sub(rb'<seg id="[0-9]*">\s*', b"", line))


#: how the sentences lie in a file of a published corpus
LAYOUTS: Dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    "lines": all_lines,
    "tags": tagged_lines,
    "segments": segments,
}


def check_parallel(directory: Path, names: Iterable[str]) -> None:
    """Checks texts named SPLIT.LANGUAGE.

    Raises:
        UserError: one is missing, empty or not UTF-8, or those of a split differ in their number of lines
    """
    counts: Dict[str, Dict[Path, int]] = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        with open(path, "rb") as stream:
            lines = count_utf8(stream, path)
        if lines == 0:
            raise UserError(f"{path} is empty")
        counts.setdefault(name.rpartition(".")[0], {})[path] = lines
    for partners in counts.values():
        check_equal(partners)


def count_utf8(stream: BinaryIO, path: Path) -> int:
    """The number of lines of a text; raises UserError if it is not UTF-8."""
    number = 0
    for number, line in enumerate(stream, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    return number


def check_equal(counts: Dict[Any, int]) -> None:
    """Raises UserError unless the texts, text -> number of lines, have equally many lines."""
    if len(set(counts.values())) > 1:
        raise UserError("unequal line counts: " + ", ".join(f"{text} has {count}" for text, count in counts.items()))


def check_length(path: Path, longest: int) -> None:
    """Raises UserError if a line of a text in pieces has more than `longest` of them."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            pieces = len(line.split())
            if pieces > longest:
                raise UserError(f"{path.name}, line {number}: {pieces:,} pieces of BPE, of which models take {longest:,} at "
                                f"most; break the sentence up, or leave it out of both languages")


def splits_of(directory: Path) -> List[str]:
    """The splits of a language model's text: all, or all but `test`, which the user's own need not have."""
    return [split for split in SPLITS if split != "test" or (directory / "test.txt").exists()]


@dataclass
class Counts:
    """What the text of a language model holds."""

    splits: Dict[str, Dict[str, int]]  # split -> {"lines", "words", "unknown", "out_of_vocabulary", "tokens"}
    types: int  # different words of the training text, <unk> and the line end among them

    @property
    def tokens(self) -> Dict[str, int]:
        """Words and line ends by split."""
        return {split: counts["tokens"] for split, counts in self.splits.items()}


def count_words(directory: Path) -> Counts:
    """Counts the words of SPLIT.txt, which are separated by white space.

    Raises:
        UserError: a word is fairseq's padding symbol, which would not be counted
    """
    known, splits = {"<unk>"}, {}
    for split in splits_of(directory):
        found: Dict[str, int] = collections.Counter()
        with open(directory / f"{split}.txt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                words = line.split()
                if "<pad>" in words:
                    raise UserError(f"{split}.txt, line {number}: the word '<pad>' is reserved; replace it in the text")
                if split == "train":
                    known.update(words)
                found["lines"] += 1
                found["words"] += len(words)
                found["unknown"] += words.count("<unk>")
                found["out_of_vocabulary"] += sum(word not in known for word in words)
        splits[split] = {**found, "tokens": found["words"] + found["lines"]}
    return Counts(splits, types=len(known) + 1)
