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
        Makes text ready for training, that of a benchmark or your own. A benchmark's is fetched and verified; text for
        translation is tokenized, BPE learned and applied. The text of a language model is used as it is, word by word; its
        tokens are counted and, of ptb and wikitext103, the counts compared with the published ones.
        """,
        """
        your own text:
          scripts/prepare.sh talks --source de --target en --text-dir DIR     train.de, train.en, valid.de, valid.en
          scripts/prepare.sh novels --lm --text-dir DIR                       train.txt, valid.txt

        are expected in DIR, in UTF-8, lines ending in \\n; test.de and test.en, or test.txt, may be missing, and
        scripts/evaluate.sh then scores valid. For translation a line is a sentence, the same in both files; raw text, which
        is tokenized (by the rules of Moses, for languages that they do not know by those of English) and split by a BPE of
        both languages. Every line is looked at before anything is made.
        """,
        """
        environment:
          DATA_MIRROR=URL       look for the files of the corpus at URL/ before their public addresses
          MOSES=DIR             tokenize with the Perl scripts of DIR, a checkout of mosesdecoder; the tokens are the same
          PN_DATA_ROOT=DIR      where the prepared data lie; default: data/

        The result is data/NAME/ ($PN_DATA_ROOT/NAME): raw/, tok/ and bpe/ (not for a language model), data-bin/,
        and prepared.json, which says from what and how it was made. It appears when it is whole. A run that was cut
        off leaves the stages that it had finished in data/.NAME.partial/: the next run with the same options goes on
        after them, one with other options removes them. A download that was cut off is completed, too.
        Run again, it has nothing to do and says so.
        """,
    )
    made.add("benchmark", metavar="NAME",
             help=f"a benchmark, {', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}, or a name for text of "
             "your own")
    made.add("--bpe", metavar="TYPE", read=one_of(*BPE_TYPES),
             help=f"{' or '.join(BPE_TYPES)}; default: bpe in configs/data/NAME.yaml, of your own text subword_nmt")
    made.add("--bpe-size", metavar="N", read=number_from(1, LARGEST_BPE),
             help="merges (subword_nmt) or pieces (sentencepiece); default: bpe_size in configs/data/NAME.yaml, of your own "
             "text 10000")
    made.add("--text-dir", metavar="DIR",
             help="where your own text lies; for a benchmark, use train|valid|test.SOURCE and .TARGET there (for a language "
             "model train|valid|test.txt, or the files of the published archive) instead of the corpus")
    group = "your own text"
    made.add("--source", metavar="LANG", group=group,
             help="the language to translate, such as de: the end of its files' names")
    made.add("--target", metavar="LANG", group=group, help="the language to translate into, such as en")
    made.add("--lm", flag=True, group=group, help="the text is for a language model: DIR/train.txt, valid.txt, test.txt")
    made.add("--tokenizer", metavar="NAME", read=one_of("moses", "none"), group=group,
             help="moses (default), or none for text that has blanks between its tokens, and for sentencepiece by itself; "
             "scores are then of the text as it is")
    made.add("--uncased", flag=True, group=group, help="in lower case; scores ignore case, too")
    made.add("--normalize-punctuation", flag=True, group=group,
             help="quotes, dashes and blanks in one form, as Moses has them")
    made.add("--clean", flag=True, group=group,
             help="leave out training pairs with an empty side, more than 250 tokens on a side or 9 for one on the other, "
             "instead of refusing empty and huge lines")
    made.add("--separate-dictionaries", flag=True, group=group,
             help="a dictionary for each language instead of a joined one; embeddings are then shared in the decoder only")
    group = "benchmarks"
    made.add("--news-commentary", metavar="V", read=one_of(*NEWS_COMMENTARY), group=group,
             help="wmt14: v12, or v9, that of WMT 2014; default: news_commentary in configs/data/wmt14.yaml")
    made.add("--cleaning", metavar="NAME", group=group,
             help="wmt14: which training pairs stay: authors (1 to 80 words, at most 9 for one) or fairseq (1 to 250 "
             "pieces, at most 1.5 for one); default: cleaning in configs/data/wmt14.yaml")
    made.add("--archive-dir", metavar="DIR", group=group,
             help="take the corpus files from DIR/NAME/ or DIR/ instead of downloading them; default: $DATA_ARCHIVES")
    made.add("--archive", metavar="FILE", group=group,
             help="iwslt14, ptb, wikitext103: take the text from FILE, laid out as the published archive (de-en.tgz or "
             "2014-01.tgz, simple-examples.tgz, wikitext-103-v1.zip) but not held to its SHA-256")
    made.add("--allow-unverified", flag=True, group=group,
             help="also download what has no published checksum over plain http")
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
