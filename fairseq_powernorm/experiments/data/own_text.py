"""Text of the user's own, looked through line by line before anything is made of it."""

import re
import shutil
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..errors import UserError
from ..files import sha256
from .corpora import SPLITS
from .texts import check_equal

#: of a line, in any text: a file without line ends would be one that no memory holds
LONGEST_LINE = 1_000_000  # bytes
#: of a sentence of a text for translation: models take 1,024 pieces
LONGEST_SENTENCE, MOST_CHARACTERS = 1000, 10_000  # words, characters
BOM = b"\xef\xbb\xbf"
#: fairseq's own symbols, which would not be words; a tokenizer takes them apart
SYMBOLS = {b"<s>", b"<pad>", b"</s>"}
#: by which a BPE marks its pieces; what translations have of them is taken out, and the reference would keep its own
MARKS = {"subword_nmt": ("@@ at the end of a word", re.compile(rb"@@(?=\s|$)")),
         "sentencepiece": ("the character ▁ (U+2581)", re.compile("▁".encode()))}


class UserText:
    """SPLIT.LANGUAGE (or SPLIT.txt for a language model) in one directory; `test` need not be there.

    clean: pairs of the training text that have an empty or a huge side are not refused, because the recipe drops them;
    plain: the text is used as it is, without a tokenizer; bpe: what splits such words, a key of MARKS, if anything does
    """

    def __init__(
        self,
        directory: Path,
        languages: Sequence[str],
        *,
        clean: bool = False,
        plain: bool = False,
        bpe: Optional[str] = None,
    ) -> None:
        self.directory, self.languages, self.clean, self.plain = directory, languages, clean, plain
        self.bpe = bpe if plain else None
        self.is_translation = len(languages) > 1

    @property
    def names(self) -> List[str]:
        """The files that there are; refuses if one is missing that must be there."""
        shown, wanted = str(self.directory), [f"{split}.{language}" for split in SPLITS for language in self.languages]
        if not self.directory.is_dir():
            raise UserError(f"--text-dir {shown!r} is not a directory")
        missing = [name for name in wanted if not (self.directory / name).is_file()]
        if all(f"test.{language}" in missing for language in self.languages):
            missing = [name for name in missing if not name.startswith("test.")]
        if missing:
            packed = [f"{name}.gz" for name in missing if (self.directory / f"{name}.gz").is_file()]
            raise UserError(f"--text-dir {shown!r} lacks {', '.join(missing)}; it must hold {', '.join(wanted)}, but for "
                            f"test, which may be missing" + (f"; unpack {', '.join(packed)}" if packed else ""))
        return [name for name in wanted if (self.directory / name).is_file()]

    def identity(self) -> Dict[str, Optional[str]]:
        """name -> SHA-256; looks through every line first."""
        lines: Dict[str, int] = {}
        digests: Dict[str, Optional[str]] = {}
        for name in self.names:
            path, split = self.directory / name, name.partition(".")[0]
            forgiving = self.clean and split == "train"
            lines[name] = check_text(path, sentences=self.is_translation, forgiving=forgiving, plain=self.plain,
                                     bpe=self.bpe)
            digests[name] = sha256(path)
        if self.is_translation:
            for source, target in pairs(lines, self.languages):
                check_equal({str(self.directory / name): lines[name] for name in (source, target)})
                if digests[source] == digests[target]:
                    raise UserError(f"{self.directory / source} and {self.directory / target} are the same text")
        return digests

    def write(self, directory: Path) -> None:
        """Copies the texts; says which of them are the same, of which scores say little."""
        first: Dict[str, str] = {}
        for name in self.names:
            shutil.copyfile(self.directory / name, directory / name)
            same = first.setdefault(sha256(directory / name), name)
            if same != name:
                print(f"  NOTE: {same} and {name} are the same text", flush=True)


def pairs(names: Mapping[str, int], languages: Sequence[str]) -> Iterator[Tuple[str, str]]:
    """The two sides of each split that is there."""
    for split in SPLITS:
        if f"{split}.{languages[0]}" in names:
            yield f"{split}.{languages[0]}", f"{split}.{languages[1]}"


def check_text(
    path: Path, *, sentences: bool, forgiving: bool = False, plain: bool = False, bpe: Optional[str] = None
) -> int:
    """The number of lines of a text.

    Args:
        sentences: each line is one, not empty and not huge, of a text for translation
        forgiving: but for these two, which are dropped later
        plain: no tokenizer takes words apart that are fairseq's symbols
        bpe: what splits the words, whose marks none of them has

    Raises:
        UserError: the text is empty, not UTF-8, has CR or null characters, or a line that cannot be
    """
    number = words = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(lines_of(stream, path), 1):
                found = check_line(line, f"{path}, line {number}")
                words += found
                symbols = SYMBOLS.intersection(line.split()) if plain and b"<" in line else ()
                if symbols:
                    symbol = next(iter(symbols)).decode()
                    raise UserError(f"{path}, line {number}: the word {symbol!r} is fairseq's own; replace it in the text")
                if bpe and MARKS[bpe][1].search(line):
                    raise UserError(f"{path}, line {number}: has {MARKS[bpe][0]}, the mark of a BPE, as which it would be "
                                    f"taken out of translations; undo the BPE of the text, which --bpe replaces")
                if sentences and not forgiving:
                    check_sentence(line, found, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if words == 0:
        raise UserError(f"{path} is empty" if number == 0 else f"{path} has no words")
    return number


def lines_of(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a text, none of them longer than memory bears."""
    number = 0
    while True:
        number += 1
        line = stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: more than {LONGEST_LINE:,} bytes; break the text into lines")
        yield line


def check_line(line: bytes, where: str) -> int:
    """The number of words of a line; refuses what is no line of a text in UTF-8."""
    if line.startswith(BOM):
        raise UserError(f"{where}: begins with a byte order mark, which would be a part of its first word; save the text "
                        f"as UTF-8 without BOM")
    if line.endswith(b"\r\n"):
        raise UserError(f"{where}: ends in CR LF, as on Windows; remove the CR, with dos2unix or sed -i 's/\\r$//'")
    for byte, name in ((b"\r", "CR (\\r)"), (b"\0", "null")):
        if byte in line:
            raise UserError(f"{where}: has a {name} character; a text for training has lines that end in \\n, and words")
    try:
        return len(line.decode("utf-8").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start})") from None


def check_sentence(line: bytes, words: int, where: str) -> None:
    """Refuses a line that is no sentence: without words, or too long for a model."""
    if words == 0:
        raise UserError(f"{where}: empty; a sentence has words. --clean drops such pairs of the training text")
    characters = len(line.decode("utf-8"))
    if words > LONGEST_SENTENCE or characters > MOST_CHARACTERS:
        raise UserError(f"{where}: {words:,} words, {characters:,} characters; a sentence has {LONGEST_SENTENCE:,} and "
                        f"{MOST_CHARACTERS:,} at most. --clean drops such pairs of the training text")
