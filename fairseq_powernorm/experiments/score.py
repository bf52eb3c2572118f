"""``python -m fairseq_powernorm.experiments.score``: scores translations against a reference."""

import json
from typing import List

from .commands import Parser, main


def parser() -> Parser:
    """The options of the command."""
    made = Parser(
        """
        Scores translations against a reference, line by line, and prints JSON. Tokenized text gets BLEU as fairseq-score
        computes it, or with --split-compounds as multi-bleu.perl does; with --detokenized the text gets sacreBLEU and
        chrF.
        """
    )
    made.add("hyp", metavar="HYP", help="the translations, one per line")
    made.add("ref", metavar="REF", help="the reference, line by line")
    made.add("--split-compounds", metavar="LANGUAGE",
             help="split the compounds of the text, whose language this is, such as de")
    made.add("--detokenized", flag=True, help="the text is not tokenized")
    made.add("--lowercase", flag=True, help="ignore case; with --detokenized only")
    return made


def command(arguments: List[str]) -> None:
    """Prints the scores that a command line asks for."""
    options = parser().parse(arguments)
    from .evaluation.score import score

    found = score(
        options.hyp,
        options.ref,
        split_compounds=options.split_compounds,
        detokenized=options.detokenized,
        lowercase=options.lowercase,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(command)
