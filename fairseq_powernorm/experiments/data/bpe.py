"""Joint BPE, learned from tokenized text and applied to it: subword-nmt or sentencepiece."""

import functools
import io
import itertools
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, TextIO

from ..errors import UserError
from ..progress import Progress

#: sentences from which sentencepiece learns, at most: it holds them in memory
SENTENCES = 4_000_000
#: words whose pieces a process remembers, at most
CACHE = 200_000


def lines_of(paths: Iterable[Path]) -> Iterator[str]:
    """The lines of several texts, with their line ends."""
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as lines:
            yield from lines


class Counted(io.StringIO):
    """A text file that says how many merges were written, a line each behind the first."""

    def __init__(self, stream: TextIO, progress: Progress) -> None:
        super().__init__()
        self.stream, self.progress, self.lines = stream, progress, 0

    def write(self, text: str) -> int:
        self.lines += text.count("\n")
        if text.endswith("\n"):
            self.progress.reach(max(0, self.lines - 1))
        return self.stream.write(text)


def learn_subword_nmt(train: Sequence[Path], directory: Path, size: int) -> None:
    """Makes directory/codes: `size` merges. subword-nmt holds the words of the text in memory, not the text."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # of its own bar, which goes to log files as well
    from subword_nmt.learn_bpe import learn_bpe

    print("  counting words", flush=True)
    with open(directory / "codes", "w", encoding="utf-8") as write, Progress("learning", size, "merges") as progress:
        try:
            learn_bpe(lines_of(train), Counted(write, progress), size)
        except ValueError as error:
            if "empty" not in str(error):  # that of max(): no word has two characters, and there is nothing to merge
                raise


def learn_sentencepiece(train: Sequence[Path], directory: Path, size: int) -> None:
    """Makes directory/sentencepiece.model: a BPE model with `size` pieces, from every line, or every second, third, ..."""
    import sentencepiece as spm

    step = -(-sum(1 for _ in lines_of(train)) // SENTENCES)
    model = io.BytesIO()  # given a file name, it writes that into the model
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(line.rstrip("\n") for line in itertools.islice(lines_of(train), 0, None, step)),
            model_writer=model, model_type="bpe", vocab_size=size, character_coverage=1.0,
            normalization_rule_name="identity", num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"sentencepiece cannot learn bpe_size {size} pieces from this text: {error}") from None
    (directory / "sentencepiece.model").write_bytes(model.getvalue())


@functools.lru_cache(maxsize=None)
def subword_nmt(directory: Path) -> Any:
    from subword_nmt.apply_bpe import BPE

    with open(directory / "codes", encoding="utf-8") as codes:
        is_empty = sum(1 for _ in codes) < 2  # of the version alone, subword-nmt would say that it is damaged
        return BPE(codes, merges=0 if is_empty else -1)


@functools.lru_cache(maxsize=None)
def sentencepiece(directory: Path) -> Any:
    import sentencepiece as spm

    return spm.SentencePieceProcessor(model_file=str(directory / "sentencepiece.model"))


def apply_subword_nmt(directory: Path, lines: List[str]) -> List[str]:
    bpe = subword_nmt(directory)
    if len(bpe.cache) > CACHE:
        bpe.cache.clear()
    return [bpe.process_line(line) for line in lines]


def apply_sentencepiece(directory: Path, lines: List[str]) -> List[str]:
    return [" ".join(pieces) for pieces in sentencepiece(directory).encode(lines, out_type=str)]


#: type -> learns from training text into a directory
LEARN: Dict[str, Callable[[Sequence[Path], Path, int], None]] = {
    "subword_nmt": learn_subword_nmt,
    "sentencepiece": learn_sentencepiece,
}
#: type -> applies what a directory holds to lines
APPLY: Dict[str, Callable[[Path, List[str]], List[str]]] = {
    "subword_nmt": apply_subword_nmt,
    "sentencepiece": apply_sentencepiece,
}
