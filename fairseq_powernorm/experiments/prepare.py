"""``python -m fairseq_powernorm.experiments.prepare``, or ``scripts/prepare.sh``:
makes a benchmark's data ready for training.
"""

import os
from typing import List

from .commands import Parser, add_benchmark, main, number_from, one_of
from .data.corpora import NEWS_COMMENTARY
from .settings import BPE_TYPES

#: more pieces than any dictionary of words in the field has
LARGEST_BPE = 1_000_000


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Makes a benchmark's data ready for training: fetches and verifies the text, tokenizes, learns and applies BPE,
        binarizes. The text of a language model (ptb, wikitext103) is used as it is, word by word; its tokens are
        counted, and the counts are compared with the published ones.
        """,
        """
        environment:
          DATA_MIRROR=URL       look for the files of the corpus at URL/ before their public addresses
          MOSES=DIR             tokenize with the Perl scripts of DIR, a checkout of mosesdecoder; the tokens are the same
          PN_DATA_ROOT=DIR      where the prepared data lie; default: data/

        The result is data/BENCH/ ($PN_DATA_ROOT/BENCH): raw/, tok/ and bpe/ (not for a language model), data-bin/,
        and prepared.json, which says from what and how it was made. It appears when it is whole. A run that was cut
        off leaves the stages that it had finished in data/.BENCH.partial/: the next run with the same options goes on
        after them, one with other options removes them. A download that was cut off is completed, too.
        Run again, it has nothing to do and says so.
        """,
    )
    add_benchmark(made)
    made.add("--bpe", metavar="TYPE", read=one_of(*BPE_TYPES),
             help=f"{' or '.join(BPE_TYPES)}; default: bpe in configs/data/BENCH.yaml")
    made.add("--bpe-size", metavar="N", read=number_from(1, LARGEST_BPE),
             help="merges (subword_nmt) or pieces (sentencepiece); default: bpe_size in configs/data/BENCH.yaml")
    made.add("--news-commentary", metavar="V", read=one_of(*NEWS_COMMENTARY),
             help="wmt14: v12, or v9, that of WMT 2014; default: news_commentary in configs/data/wmt14.yaml")
    made.add("--cleaning", metavar="NAME",
             help="wmt14: which training pairs stay: authors (1 to 80 words, at most 9 for one) or fairseq (1 to 250 "
             "pieces, at most 1.5 for one); default: cleaning in configs/data/wmt14.yaml")
    made.add("--archive-dir", metavar="DIR",
             help="take the corpus files from DIR/BENCH/ or DIR/ instead of downloading them; default: $DATA_ARCHIVES")
    made.add("--archive", metavar="FILE",
             help="iwslt14, ptb, wikitext103: take the text from FILE, laid out as the published archive (de-en.tgz or "
             "2014-01.tgz, simple-examples.tgz, wikitext-103-v1.zip) but not held to its SHA-256")
    made.add("--text-dir", metavar="DIR",
             help="use your own text, train|valid|test.SOURCE and .TARGET (raw, one sentence a line), instead of the "
             "corpus; for a language model train|valid|test.txt, or the files of the published archive")
    made.add("--allow-unverified", flag=True,
             help="also download what has no published checksum over plain http")
    made.add("--force")
    return made


def command(arguments: List[str]) -> None:
    """Prepares the data that a command line asks for."""
    options = vars(parser().parse(arguments))
    from .data.prepare import prepare

    options["archive_dir"] = options["archive_dir"] or os.environ.get("DATA_ARCHIVES") or None
    options.pop("help", None)
    prepare(options.pop("benchmark"), **options)


if __name__ == "__main__":
    main(command)
