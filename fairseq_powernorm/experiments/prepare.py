"""``python -m fairseq_powernorm.experiments.prepare``, or ``scripts/prepare.sh``:
makes text, a benchmark's or the user's own, ready for training.
"""

import os
from typing import List

from .commands import Parser, main, number_from, one_of
from .data.corpora import NEWS_COMMENTARY
from .errors import UserError
from .recipes import CONFIGS, benchmarks
from .settings import BPE_TYPES

#: more pieces than any dictionary of words in the field has
LARGEST_BPE = 1_000_000


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Prepares text for training, a benchmark's or your own. The text of a benchmark is downloaded and verified. Text for
        translation is tokenized and split by a BPE that is learned from it. Text for a language model is used as it is, word
        by word; for ptb and wikitext103 its tokens are counted and compared with the published counts.
        """,
        """
        your own text:
          scripts/prepare.sh talks --source de --target en --text-dir DIR     train.de, train.en, valid.de, valid.en
          scripts/prepare.sh novels --lm --text-dir DIR                       train.txt, valid.txt

        The files at the end of each line must be in DIR, in UTF-8, with lines that end in \\n. test.de and test.en, or
        test.txt, are optional; without them scripts/evaluate.sh scores valid. For translation each line is a sentence, and
        lines of the same number belong together. The text may be raw: it is tokenized by the rules of Moses (languages
        that Moses does not know, by those of English) and split by a BPE of both languages. Every line is checked before
        anything is made.
        """,
        """
        environment:
          DATA_MIRROR=URL       look for the files of the corpus at URL/ before their public addresses
          MOSES=DIR             tokenize with the Perl scripts in DIR, a checkout of mosesdecoder; the tokens are the same
          PN_DATA_ROOT=DIR      where the prepared data go; default: data/

        The result is data/NAME/ ($PN_DATA_ROOT/NAME): raw/, tok/ and bpe/ (not for a language model), data-bin/, and
        prepared.json, which records what it was made from and how. It appears only when it is complete. An interrupted
        command leaves its finished stages in data/.NAME.partial/: run again with the same options, it continues after
        them; with other options, it removes them. Interrupted downloads are continued, too. If the result exists already,
        the command says so and does nothing.
        """,
    )
    made.add("benchmark", metavar="NAME",
             help=f"a benchmark ({', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}), or a name for your own "
             "text")
    made.add("--bpe", metavar="TYPE", read=one_of(*BPE_TYPES),
             help=f"{' or '.join(BPE_TYPES)}; default: bpe in configs/data/NAME.yaml; for your own text subword_nmt")
    made.add("--bpe-size", metavar="N", read=number_from(1, LARGEST_BPE),
             help="merges (subword_nmt) or pieces (sentencepiece); default: bpe_size in configs/data/NAME.yaml; for your "
             "own text 10000")
    made.add("--text-dir", metavar="DIR",
             help="the directory of your own text; for a benchmark, use train|valid|test.SOURCE and .TARGET in DIR (for a "
             "language model train|valid|test.txt, or the files of the published archive) instead of the corpus")
    group = "your own text"
    made.add("--source", metavar="LANG", group=group,
             help="the language to translate from, such as de: the ending of its files' names")
    made.add("--target", metavar="LANG", group=group, help="the language to translate into, such as en")
    made.add("--lm", flag=True, group=group, help="the text is for a language model: DIR/train.txt, valid.txt and test.txt")
    made.add("--tokenizer", metavar="NAME", read=one_of("moses", "none"), group=group,
             help="moses (default), or none: for text with blanks between its tokens, or to use sentencepiece alone; scores "
             "are then those of the text as it is")
    made.add("--uncased", flag=True, group=group, help="convert the text to lower case; scores then ignore case")
    made.add("--normalize-punctuation", flag=True, group=group,
             help="bring quotes, dashes and blanks to one form each, as Moses does")
    made.add("--clean", flag=True, group=group,
             help="leave out training pairs with an empty side, with more than 250 tokens on a side, or with more than 9 "
             "times as many on one side as on the other, instead of refusing empty and huge lines")
    made.add("--separate-dictionaries", flag=True, group=group,
             help="one dictionary for each language instead of a joined one; embeddings are then shared in the decoder only")
    group = "benchmarks"
    made.add("--news-commentary", metavar="V", read=one_of(*NEWS_COMMENTARY), group=group,
             help="wmt14: v12, or v9 as in WMT 2014; default: news_commentary in configs/data/wmt14.yaml")
    made.add("--cleaning", metavar="NAME", group=group,
             help="wmt14: which training pairs to keep: authors (1 to 80 words a side, at most 9 times as many on one "
             "side) or fairseq (1 to 250 pieces a side, at most 1.5 times as many); default: cleaning in "
             "configs/data/wmt14.yaml")
    made.add("--archive-dir", metavar="DIR", group=group,
             help="take the corpus files from DIR/NAME/ or DIR/ instead of downloading them; default: $DATA_ARCHIVES")
    made.add("--archive", metavar="FILE", group=group,
             help="iwslt14, ptb, wikitext103: take the text from FILE, which is laid out as the published archive "
             "(de-en.tgz or 2014-01.tgz, simple-examples.tgz, wikitext-103-v1.zip) but need not have its SHA-256")
    made.add("--allow-unverified", flag=True, group=group,
             help="download files over plain http or ftp even if no checksum of them is published")
    made.add("--force")
    return made


def command(arguments: List[str]) -> None:
    """Prepares the data that a command line asks for."""
    options = vars(parser().parse(arguments))
    from .data.prepare import prepare

    if options["archive_dir"] and (options["archive"] or options["text_dir"]):  # either goes before $DATA_ARCHIVES
        other = "--archive" if options["archive"] else "--text-dir"
        raise UserError(f"{other} and --archive-dir exclude each other; give the text in one of them")
    if options["benchmark"] in benchmarks():
        options["archive_dir"] = options["archive_dir"] or os.environ.get("DATA_ARCHIVES") or None
    options.pop("help", None)
    prepare(options.pop("benchmark"), **options)


if __name__ == "__main__":
    main(command)
