"""Scores hypotheses against references, line by line, and prints JSON:

python -m fairseq_powernorm.experiments score HYP REF [--split-compounds LANGUAGE]
    tokenized text: BLEU as fairseq-score computes it
python -m fairseq_powernorm.experiments score HYP REF --detokenized [--lowercase]
    detokenized text: sacreBLEU and chrF
"""

import argparse
import json
import re

from ..data.moses_python import detokenize, languages, tokenize
from ..settings import UserError, choose

# \S of bytes, as perl sees them: blanks are ASCII's.
COMPOUND = re.compile(r"(\S)-(\S)", re.ASCII)


def lines_of(path):
    """The lines of a text; raises UserError if there is none or it is not UTF-8."""
    try:
        with open(path, encoding="utf-8", newline="\n") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not text:
        raise UserError(f"{path} is empty")
    return [line.rstrip("\r") for line in (text[:-1] if text.endswith("\n") else text).split("\n")]


def check_equal_length(hypotheses, references):
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses):,} hypotheses for {len(references):,} references; a score of a part of the "
                        f"text would be compared with scores of the whole")


def split_compounds(line: str, language: str) -> str:
    """A tokenized line as it is scored for WMT14 En-De: detokenized, tokenized again without splitting dashes, and
    a-b -> a ##AT##-##AT## b (Vaswani et al., 2017). Matches do not overlap: of a-b-c the second dash stays."""
    return COMPOUND.sub(r"\1 ##AT##-##AT## \2", tokenize(detokenize(line, language), language))


def tokenized_bleu(hypotheses, references, compounds=None):
    """BLEU of tokenized text as in the paper: the arithmetic of fairseq-score (which is that of multi-bleu), unrounded.

    compounds: the language of the text, whose compounds are split on both sides first, which the result then says
    """
    from fairseq.data import Dictionary
    from fairseq.scoring.bleu import BleuConfig, Scorer

    check_equal_length(hypotheses, references)
    if compounds:
        hypotheses, references = ([split_compounds(line, compounds) for line in text] for text in (hypotheses, references))
    dictionary = Dictionary()
    scorer = Scorer(BleuConfig(pad=dictionary.pad(), eos=dictionary.eos(), unk=dictionary.unk()))
    for hypothesis, reference in zip(hypotheses, references):
        # Hypothesis first, as there: the dictionary grows along the way.
        encoded = dictionary.encode_line(hypothesis)
        scorer.add(dictionary.encode_line(reference), encoded)
    return {"score": scorer.score() if scorer.stat.predlen else 0.0,
            "precisions": [100 * precision for precision in scorer.precision()],
            "brevity_penalty": scorer.brevity(), "ratio": scorer.stat.predlen / scorer.stat.reflen,
            "hypothesis_length": scorer.stat.predlen, "reference_length": scorer.stat.reflen,
            "text": scorer.result_string(), **({"split_compounds": True} if compounds else {})}


def sacrebleu_scores(hypotheses, references, lowercase):
    """sacreBLEU and chrF of detokenized text, with their signatures."""
    from sacrebleu.metrics import BLEU, CHRF

    check_equal_length(hypotheses, references)
    scores = {}
    for name, metric in (("sacrebleu", BLEU(lowercase=lowercase)), ("chrf", CHRF(lowercase=lowercase))):
        score = metric.corpus_score(hypotheses, [references])
        scores[name] = {"score": score.score, "signature": str(metric.get_signature())}
    return scores


def paired_bootstrap(baseline, systems, references, lowercase):
    """Significance of each system's difference from the baseline, by sacreBLEU's paired bootstrap test of BLEU.

    systems: name -> hypotheses. Returns name -> {"baseline", "score", "p_value", "signature"}. The p-value is None
    where the two scores are equal, for which sacreBLEU's arithmetic gives the smallest one there is.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    for hypotheses in (baseline, *systems.values()):
        check_equal_length(hypotheses, references)
    test = PairedTest([("", baseline), *systems.items()], {"BLEU": BLEU(lowercase=lowercase, references=[references])},
                      references=None, test_type="bs")
    signatures, scores = test()
    own = float(scores["BLEU"][0].score)
    return {name: {"baseline": own, "score": float(found.score), "signature": str(signatures["BLEU"]),
                   "p_value": None if found.score == own else float(found.p_value)}
            for name, found in zip(systems, scores["BLEU"][1:])}


def score(arguments):
    parser = argparse.ArgumentParser(prog="python -m fairseq_powernorm.experiments score", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hyp", metavar="HYP")
    parser.add_argument("ref", metavar="REF")
    parser.add_argument("--split-compounds", metavar="LANGUAGE")
    parser.add_argument("--detokenized", action="store_true")
    parser.add_argument("--lowercase", action="store_true")
    options = parser.parse_args(arguments)
    if options.detokenized and options.split_compounds:
        raise UserError("--split-compounds is for tokenized text; valid with --detokenized: --lowercase")
    if options.lowercase and not options.detokenized:
        raise UserError("--lowercase is for --detokenized text; tokenized text is scored as it is")
    if options.split_compounds:
        choose("--split-compounds", options.split_compounds, languages())
    hypotheses, references = lines_of(options.hyp), lines_of(options.ref)
    if options.detokenized:
        found = sacrebleu_scores(hypotheses, references, options.lowercase)
    else:
        found = {"bleu_tokenized": tokenized_bleu(hypotheses, references, options.split_compounds)}
    print(json.dumps({**found, "sentences": len(hypotheses)}, indent=2))
