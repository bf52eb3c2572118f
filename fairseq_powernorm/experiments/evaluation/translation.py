"""The translation of a subset by fairseq-generate, and its BLEU and chrF."""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional

from ..data.moses_python import detokenize
from ..errors import UserError
from ..paths import PLUGIN
from ..progress import Progress
from ..settings import data_settings
from ..tools import call, tool
from .job import Command, Job, Matches, Scores, words_of
from .score import lines_of, sacrebleu_scores, tokenized_bleu


def check_job(job: Job) -> None:
    """Refuses before any work what would be found missing in the middle of it: a reference, a program.

    One sentence is scored, which needs the packages that the translations will need.
    """
    tool("fairseq-generate")
    if job.subset not in job.stamp["sentences"]:
        raise UserError(f"{job.data / 'prepared.json'} does not say how many sentences {job.subset} has; prepare the data "
                        f"again")
    job.check_data(f"tok/{job.subset}.", f"raw/{job.subset}.")
    references = {name: lines_of(path) for name, path in reference_paths(job).items()}
    _scored(job, {"hyp.tok": ["x"], "ref.tok": references["ref.tok"][:1], "ref.detok": references["ref.detok"][:1]})


def reference_paths(job: Job) -> Dict[str, Path]:
    """The prepared reference, tokenized and not."""
    name = f"{job.subset}.{job.stamp['settings']['languages'][1]}"
    return {"ref.tok": job.data / "tok" / name, "ref.detok": job.data / "raw" / name}


def evaluate(job: Job, directory: Path) -> Scores:
    """Averages, translates and scores; leaves averaged.pt, generate.log and the texts in a directory."""
    averaged = job.averaged(directory)
    generate = _generate(job, averaged.path)
    print(f"translating {job.subset} with beam {job.config.generation.beam}", flush=True)
    sentences = job.stamp["sentences"][job.subset]
    with Progress(f"translating {job.subset}", sentences, "sentences") as progress:
        output = call(generate, job.lock, Matches(r"H-\d+\t", progress).count)
    (directory / "generate.log").write_text(output, encoding="utf-8")

    texts = {"hyp.tok": hypotheses_of(output, sentences)}
    texts.update((name, lines_of(path)) for name, path in reference_paths(job).items())
    scores = _scored(job, texts)
    for name, lines in texts.items():
        (directory / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    speed = re.search(r"Translated [\d,]+ sentences \(([\d,]+) tokens\) in ([\d.]+)s .* ([\d.]+) tokens/s", output)
    facts = {
        **scores,
        "sentences": len(texts["hyp.tok"]),
        "beam": job.config.generation.beam,
        "lenpen": job.config.generation.lenpen,
        "averaged": len(job.checkpoints),
        "tokens_per_s": float(speed[3]) if speed else None,
    }
    return Scores(facts, [averaged.command, generate])


def _generate(job: Job, path: Path) -> Command:
    """The fairseq-generate command that translates the subset."""
    generation, task = job.config.generation, job.config.task
    options = {
        "--user-dir": PLUGIN,
        "--task": task._name,
        "--source-lang": task.source_lang,
        "--target-lang": task.target_lang,
        "--path": path,
        "--gen-subset": job.subset,
        "--beam": generation.beam,
        "--lenpen": generation.lenpen,
        "--max-len-a": generation.max_len_a,
        "--max-len-b": generation.max_len_b,
        "--max-tokens": job.config.dataset.max_tokens,
        # With a multiple, fairseq 0.12.3 drops the last sentences if they do not fill one.
        "--required-batch-size-multiple": 1,
        "--post-process": job.stamp["settings"]["bpe"],
        "--num-workers": 0,
        "--data-buffer-size": 0,
        "--no-progress-bar": True,
    }
    return [tool("fairseq-generate"), str(job.data / "data-bin"), *words_of(options)]


def _scored(job: Job, texts: Dict[str, List[str]]) -> Dict[str, Any]:
    """The scores of texts["hyp.tok"], whose detokenized text becomes texts["hyp.detok"]."""
    settings = job.stamp["settings"]
    language: str = settings["languages"][1]
    split_compounds = data_settings(job.stamp["benchmark"]).get("split_compounds", False)
    compounds: Optional[str] = language if split_compounds else None
    plain = settings.get("tokenizer") == "none"
    texts["hyp.detok"] = [line if plain else detokenize(line, language) for line in texts["hyp.tok"]]
    return {
        "bleu_tokenized": tokenized_bleu(texts["hyp.tok"], texts["ref.tok"], compounds),
        **sacrebleu_scores(texts["hyp.detok"], texts["ref.detok"], lowercase=settings["lowercase"]),
    }


def hypotheses_of(output: str, sentences: int) -> List[str]:
    """The best hypotheses in fairseq-generate's output, BPE undone, in the order of the text."""
    found = {int(number): text for number, text in re.findall(r"^H-(\d+)\t[^\t\n]*\t(.*)$", output, re.MULTILINE)}
    if sorted(found) != list(range(sentences)):
        raise UserError(
            f"fairseq-generate translated {len(found)} of {sentences} sentences; a score of a part of the subset "
            f"would be compared with scores of the whole"
        )
    return [found[number] for number in range(sentences)]


def describe(record: Dict[str, Any]) -> str:
    """The lines that evaluate.sh prints of a record."""
    bleu, chrf = record["sacrebleu"], record["chrf"]
    return (
        f"{record['benchmark']} {record['norm']} ({record['placement']}), {record['subset']}: "
        f"{record['bleu_tokenized']['text']}\n"
        f"sacreBLEU {bleu['score']:.2f} ({bleu['signature']}), chrF {chrf['score']:.2f}"
    )
