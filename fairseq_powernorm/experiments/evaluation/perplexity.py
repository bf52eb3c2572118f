"""The word-level perplexity of a language model: what its configuration must be like, fairseq-eval-lm, the exact sum."""

import collections
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from ..errors import UserError
from ..paths import PLUGIN
from ..progress import Progress
from ..tools import call, tool
from .job import Command, Job, Matches, Scores, words_of

NOT_LM = "NOT a language model's: each position sees the token that it is asked for"
# A line of fairseq-eval-lm --output-word-probs, in both formats of fairseq's log: BLOCK WORD [SCORE]<tab>...
SCORES = re.compile(r"fairseq_cli\.eval_lm(?: \| |:)(\d+) (\S.* \[\S+\])$")
SCORE = re.compile(r"(\S+) \[(\S+)\]")


def causal(model: Any) -> bool:
    """Does the model of this configuration predict without seeing its targets?"""
    return not model.get("tensorized_noncausal", False)


def remark(model: Any) -> str:
    """What is to be said of every perplexity of the model of this configuration; empty for a language model."""
    return "" if causal(model) else NOT_LM


def check(config: Any) -> None:
    """Refuses a resolved configuration of a training whose result could not be evaluated."""
    length, context = config.task.tokens_per_sample, config.eval_lm.context_window
    window = config.model.get("tensorized_window")
    if window is not None and not 1 <= length <= window:
        raise UserError(f"task.tokens_per_sample={length} does not fit the model's window; valid: 1 to {window} "
                        f"(model.tensorized_window)")
    if not 0 <= context < length:
        raise UserError(f"eval_lm.context_window={context} leaves a block no tokens of its own; valid: 0 to "
                        f"{length - 1} (less than task.tokens_per_sample)")
    if config.task.add_bos_token:
        raise UserError("task.add_bos_token=true changes what is counted; valid: false")


def check_job(job: Job) -> None:
    """Refuses before any work what would be found missing in the middle of it: the text, a program."""
    tool("fairseq-eval-lm")
    job.check_data(f"raw/{job.subset}.")


def evaluate(job: Job, directory: Path) -> Scores:
    """Scores every word of the subset; leaves eval-lm*.log and, if it averages, averaged.pt in a directory."""
    path = job.checkpoints[0]
    commands: List[Command] = []
    if len(job.checkpoints) > 1:
        path, average = job.averaged(directory)
        commands.append(average)
    text, oov = targets(job.data, job.subset)
    found: List[Dict[str, Any]] = []
    for context in dict.fromkeys((0, job.config.eval_lm.context_window)):
        command = eval_lm(job, path, context)
        print(f"scoring {job.subset}, {f'with {context} tokens of context' if context else 'block by block'}", flush=True)
        with Progress(f"scoring {job.subset}", len(text), "tokens") as progress:
            output = call(command, job.lock, Matches(r"\S+ \[-?\d", progress).count)
        (directory / f"eval-lm{f'-context{context}' if context else ''}.log").write_text(output, encoding="utf-8")
        commands.append(command)
        nll = negative_log_likelihood(output, text)
        found.append({"score": math.exp(nll / len(text)), "nll": nll, "context_window": context})
    kinds = collections.Counter(text)
    facts = {
        "arch": job.config.model._name,
        "causal": causal(job.config.model),
        "perplexity": found[0],
        "perplexity_context": found[1] if found[1:] else None,
        "tokens": {
            "scored": len(text),
            "words": len(text) - kinds["</s>"],
            "line_ends": kinds["</s>"],
            "line_ends_counted": True,
            "unknown": kinds["<unk>"],
            "out_of_vocabulary": oov,
            "types": job.stamp["types"],
            "published_corpus": job.stamp["published"],
        },
        "tokens_per_sample": job.config.task.tokens_per_sample,
        "averaged": len(job.checkpoints),
    }
    return Scores(facts, commands)


def eval_lm(job: Job, path: Path, context: int) -> Command:
    """The fairseq-eval-lm command that scores each word of the subset, with so many tokens of context."""
    task, dataset = job.config.task, job.config.dataset
    options = {
        "--user-dir": PLUGIN,
        "--task": task._name,
        "--path": path,
        "--gen-subset": job.subset,
        "--tokens-per-sample": task.tokens_per_sample,
        "--sample-break-mode": task.sample_break_mode,
        "--context-window": context,
        "--softmax-batch": job.config.eval_lm.softmax_batch,
        "--output-word-probs": True,
        "--num-workers": 0,
        "--data-buffer-size": 0,
        "--no-progress-bar": True,
        "--batch-size": dataset.batch_size_valid,
        "--max-tokens": dataset.max_tokens_valid,
    }
    return [tool("fairseq-eval-lm"), str(job.data / "data-bin"), *words_of(options)]


def targets(data: Path, subset: str) -> Tuple[List[str], int]:
    """(the tokens that a model is asked for, number of words in the text that the dictionary lacks)."""
    with open(data / "data-bin" / "dict.txt", encoding="utf-8", newline="\n") as lines:
        known = {"<unk>", "<s>", "</s>", *(line.rpartition(" ")[0] for line in lines)}
    text, oov = [], 0
    with open(data / "raw" / f"{subset}.txt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            for word in line.split():
                oov += word not in known
                text.append(word if word in known else "<unk>")
            text.append("</s>")
    return text, oov


def negative_log_likelihood(output: str, text: Sequence[str]) -> float:
    """The sum over all tokens of the text, in nats, from fairseq-eval-lm's score of each (six decimals).

    fairseq's own figure is the average of a float32 sum, rounded to two decimals, of whatever was scored. Here the
    words that were scored must be the text.
    """
    blocks: Dict[int, List[Tuple[str, str]]] = {}
    for line in output.split("\n"):
        match = SCORES.search(line)
        if match:
            items = (SCORE.fullmatch(item) for item in match[2].split("\t"))
            blocks[int(match[1])] = [(item[1], item[2]) for item in items if item]
    scored = [item for number in sorted(blocks) for item in blocks[number]]
    if [word for word, _ in scored] != list(text):
        raise UserError(f"fairseq-eval-lm scored {len(scored):,} tokens that are not the {len(text):,} of the text; a "
                        f"perplexity of other tokens would be compared with that of the text. Its last lines:",
                        output[-1000:])
    total = -math.fsum(float(score) for _, score in scored)
    if not math.isfinite(total) or total / len(text) > 700:
        raise UserError(f"the negative log-likelihood of {len(text):,} tokens is {total} nats: training has diverged")
    return total


def describe(record: Dict[str, Any]) -> str:
    """The lines that evaluate.sh prints of a language model's record."""
    tokens = record["tokens"]
    label = "" if record["causal"] else f" ({NOT_LM})"
    scores = f"perplexity {record['perplexity']['score']:.2f}{label}"
    if record["perplexity_context"]:
        window = record["perplexity_context"]["context_window"]
        scores += f"; with a context of {window} tokens, perplexity {record['perplexity_context']['score']:.2f}{label}"
    corpus = "" if tokens["published_corpus"] or "recipe" in record else "; NOT the published corpus"
    return (f"{record['benchmark']} {record['norm']} ({record['arch']}), {record['subset']}: {scores}\n"
            f"{tokens['scored']:,} tokens in blocks of {record['tokens_per_sample']}: {tokens['words']:,} words "
            f"({tokens['unknown']:,} unknown) and {tokens['line_ends']:,} line ends, which count{corpus}")
