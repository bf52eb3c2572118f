"""BLEU and chrF of translations, by the arithmetic of fairseq, of Moses and of sacreBLEU."""

import collections
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

from ..data.moses_python import detokenize, languages, tokenize
from ..errors import UserError, choose

# \S of bytes, as Perl sees them: white space is ASCII's.
COMPOUND = re.compile(r"(\S)-(\S)", re.ASCII)


#: a score, its parts, and the line that the original programs print
Bleu = Dict[str, Any]


def lines_of(path: Union[str, Path]) -> List[str]:
    """The lines of a text; raises UserError if it cannot be read, is empty, or is not UTF-8."""
    try:
        with open(path, encoding="utf-8", newline="\n") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not text:
        raise UserError(f"{path} is empty")
    return [line.rstrip("\r") for line in (text[:-1] if text.endswith("\n") else text).split("\n")]


def check_equal_length(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses):,} hypotheses for {len(references):,} references; a score of a part of the "
                        f"text would be compared with scores of the whole")


def split_compounds(line: str, language: str) -> str:
    """A tokenized line as it is scored for WMT14 En-De: detokenized, tokenized again without splitting dashes, and
    a-b -> a ##AT##-##AT## b (Vaswani et al., 2017). Matches do not overlap: of a-b-c the second dash stays."""
    return COMPOUND.sub(r"\1 ##AT##-##AT## \2", tokenize(detokenize(line, language), language))


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str], compounds: Optional[str] = None) -> Bleu:
    """BLEU of tokenized text by the arithmetic of the paper's scores, unrounded.

    That of IWSLT14 is fairseq_bleu's; that of WMT14, whose compounds are split, is multi_bleu's.

    Args:
        compounds: the language of the text, whose compounds are split on both sides first, which the result then says
    """
    check_equal_length(hypotheses, references)
    if compounds is None:
        return fairseq_bleu(hypotheses, references)
    first, second = ([split_compounds(line, compounds) for line in text] for text in (hypotheses, references))
    return {**multi_bleu(first, second), "split_compounds": True}


def fairseq_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU as fairseq-score and fairseq-generate compute it.

    It differs from multi_bleu in three things: a line without words counts as one word, the end of the sentence, on either
    side; <unk> in a hypothesis matches nothing; <pad> at either end of a line and </s> at its end are not words.
    """
    from fairseq.data import Dictionary
    from fairseq.scoring.bleu import BleuConfig, Scorer

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
            "text": scorer.result_string()}


def multi_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """BLEU as Moses' multi-bleu.perl computes it with one reference: exp(mean of log p_n, n = 1 to 4) x brevity penalty.

    p_n is the share of the hypotheses' n-grams that match, each at most as often as its reference has it. Where nothing
    matches for some n, BLEU is 0. Words are separated by the white space of ASCII, for Perl reads bytes.
    """
    matches, totals, lengths = [0] * 4, [0] * 4, [0, 0]  # lengths: of the hypotheses and of the references
    for pair in zip(hypotheses, references):
        words = [re.findall(r"[^ \t\n\r\f\v]+", line) for line in pair]
        lengths = [length + len(side) for length, side in zip(lengths, words)]
        for n in range(4):
            found, wanted = (collections.Counter(zip(*(side[i:] for i in range(n + 1)))) for side in words)
            matches[n] += sum((found & wanted).values())
            totals[n] += sum(found.values())
    precisions = [100 * match / total if total else 0.0 for match, total in zip(matches, totals)]
    hypothesis, reference = lengths
    brevity = 1.0 if hypothesis >= reference else math.exp(1 - reference / hypothesis) if hypothesis else 0.0
    ratio = hypothesis / reference if reference else 0.0
    score = brevity * math.exp(sum(map(math.log, precisions)) / 4) if min(precisions) > 0 else 0.0
    return {"score": score, "precisions": precisions, "brevity_penalty": brevity, "ratio": ratio,
            "hypothesis_length": hypothesis, "reference_length": reference,
            "text": f"BLEU = {score:.2f}, {'/'.join(f'{precision:.1f}' for precision in precisions)} (BP={brevity:.3f}, "
                    f"ratio={ratio:.3f}, hyp_len={hypothesis}, ref_len={reference})"}


def sacrebleu_scores(hypotheses: Sequence[str], references: Sequence[str], *, lowercase: bool) -> Dict[str, Any]:
    """sacreBLEU and chrF of detokenized text, with their signatures."""
    from sacrebleu.metrics import BLEU, CHRF

    check_equal_length(hypotheses, references)
    scores = {}
    for name, metric in (("sacrebleu", BLEU(lowercase=lowercase)), ("chrf", CHRF(lowercase=lowercase))):
        score = metric.corpus_score(hypotheses, [references])
        scores[name] = {"score": score.score, "signature": str(metric.get_signature())}
    return scores


def paired_bootstrap(
    baseline: Sequence[str], systems: Mapping[str, Sequence[str]], references: Sequence[str], *, lowercase: bool
) -> Dict[str, Dict[str, Any]]:
    """Significance of each system's difference from the baseline, by sacreBLEU's paired bootstrap test of BLEU.

    Args:
        systems: name -> hypotheses

    Returns:
        name -> {"baseline", "score", "p_value", "signature"}; the p-value is None where the two scores are equal, for which
        sacreBLEU's arithmetic would give the smallest p-value there is
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    for hypotheses in (baseline, *systems.values()):
        check_equal_length(hypotheses, references)
    test = PairedTest([("", baseline), *systems.items()], {"BLEU": BLEU(lowercase=lowercase, references=[references])},
                      references=None, test_type="bs")
    signatures, scores = test()
    results: List[Any] = scores["BLEU"]  # that of the baseline first
    own = float(results[0].score)
    return {name: {"baseline": own, "score": float(found.score), "signature": str(signatures["BLEU"]),
                   "p_value": None if found.score == own else float(found.p_value)}
            for name, found in zip(systems, results[1:])}


def score(
    hypotheses: Union[str, Path],
    references: Union[str, Path],
    *,
    split_compounds: Optional[str] = None,
    detokenized: bool = False,
    lowercase: bool = False,
) -> Dict[str, Any]:
    """The scores of a text of translations, line by line; the arguments are those of the command `score`.

    Raises:
        UserError: the options exclude each other, or a text cannot be read or is of another length
    """
    if detokenized and split_compounds is not None:
        raise UserError("--split-compounds is for tokenized text; valid with --detokenized: --lowercase")
    if lowercase and not detokenized:
        raise UserError("--lowercase is for --detokenized text; tokenized text is scored as it is")
    if split_compounds is not None:
        choose("--split-compounds", split_compounds, languages())
    texts = lines_of(hypotheses), lines_of(references)
    if detokenized:
        found = sacrebleu_scores(*texts, lowercase=lowercase)
    else:
        found = {"bleu_tokenized": tokenized_bleu(*texts, split_compounds)}
    return {**found, "sentences": len(texts[0])}
