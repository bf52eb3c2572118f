"""The word-level perplexity of a language model: conditions on the configuration, fairseq-eval-lm, the exact sum."""

import collections
import math
import re
import sys

from ..errors import UserError
from ..paths import PLUGIN
from ..tools import call, tool

NOT_LM = "NOT a language model's: each position sees the token that it is asked for"
# A line of fairseq-eval-lm --output-word-probs, in both formats of fairseq's log: BLOCK WORD [SCORE]<tab>...
SCORES = re.compile(r"fairseq_cli\.eval_lm(?: \| |:)(\d+) (\S.* \[\S+\])$")
SCORE = re.compile(r"(\S+) \[(\S+)\]")


def causal(model):
    """Does the model of this configuration predict without seeing its targets?"""
    return not model.get("tensorized_noncausal", False)


def remark(model):
    """What is to be said of every perplexity of the model of this configuration; empty for a language model."""
    return "" if causal(model) else NOT_LM


def check(config):
    """Refuses a resolved configuration that would train what cannot be evaluated."""
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


def evaluate(directory, data, stamp, config, inputs, subset, lock):
    """What a language model's record says of its scores; leaves eval-lm*.log and, if it averages, averaged.pt."""
    path, commands = inputs[0], []
    if len(inputs) > 1:
        path = directory / "averaged.pt"
        print(f"averaging {len(inputs)} checkpoints: {inputs[0].name} ... {inputs[-1].name}", flush=True)
        commands.append([sys.executable, "-m", "fairseq_powernorm.checkpoint", "average", "--inputs", *map(str, inputs),
                         "--output", str(path)])
        call(commands[-1], lock)
    text, oov = targets(data, subset)
    found = []
    for context in dict.fromkeys((0, config.eval_lm.context_window)):
        command = eval_lm(data, config, path, subset, context)
        print(f"scoring {subset}, {f'with {context} tokens of context' if context else 'block by block'}", flush=True)
        output = call(command, lock)
        (directory / f"eval-lm{f'-context{context}' if context else ''}.log").write_text(output, encoding="utf-8")
        commands.append(command)
        found.append({"score": None, "nll": negative_log_likelihood(output, text), "context_window": context})
        found[-1]["score"] = math.exp(found[-1]["nll"] / len(text))
    kinds = collections.Counter(text)
    return {
        "arch": config.model._name, "causal": causal(config.model),
        "perplexity": found[0], "perplexity_context": found[1] if found[1:] else None,
        "tokens": {"scored": len(text), "words": len(text) - kinds["</s>"], "line_ends": kinds["</s>"],
                   "line_ends_counted": True, "unknown": kinds["<unk>"], "out_of_vocabulary": oov,
                   "types": stamp["types"], "published_corpus": stamp["published"]},
        "tokens_per_sample": config.task.tokens_per_sample, "averaged": len(inputs), "evaluation_commands": commands,
    }


def eval_lm(data, config, path, subset, context):
    """The fairseq-eval-lm command that scores each word of a subset."""
    task, dataset = config.task, config.dataset
    command = [tool("fairseq-eval-lm"), str(data / "data-bin"), "--user-dir", str(PLUGIN), "--task", task._name,
               "--path", str(path), "--gen-subset", subset, "--tokens-per-sample", str(task.tokens_per_sample),
               "--sample-break-mode", str(task.sample_break_mode), "--context-window", str(context),
               "--softmax-batch", str(config.eval_lm.softmax_batch), "--output-word-probs", "--num-workers", "0",
               "--data-buffer-size", "0", "--no-progress-bar"]
    for option, value in (("--batch-size", dataset.batch_size_valid), ("--max-tokens", dataset.max_tokens_valid)):
        command += [] if value is None else [option, str(value)]
    return command


def targets(data, subset):
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


def negative_log_likelihood(output, text):
    """The sum over all tokens of the text, in nats, from fairseq-eval-lm's score of each (six decimals).

    fairseq's own figure is the average of a float32 sum, rounded to two decimals, of whatever was scored. Here the
    words that were scored must be the text.
    """
    blocks = {}
    for line in output.split("\n"):
        match = SCORES.search(line)
        if match:
            blocks[int(match[1])] = [SCORE.fullmatch(item).groups() for item in match[2].split("\t")]
    scored = [item for number in sorted(blocks) for item in blocks[number]]
    if [word for word, _ in scored] != text:
        raise UserError(f"fairseq-eval-lm scored {len(scored):,} tokens that are not the {len(text):,} of the text; a "
                        f"perplexity of other tokens would be compared with that of the text. Its last lines:\n"
                        f"{output[-1000:]}")
    total = -math.fsum(float(score) for _, score in scored)
    if not math.isfinite(total) or total / len(text) > 700:
        raise UserError(f"the negative log-likelihood of {len(text):,} tokens is {total} nats: training has diverged")
    return total


def describe(record):
    """The lines that evaluate.sh prints of a language model's record."""
    tokens = record["tokens"]
    label = "" if record["causal"] else f" ({NOT_LM})"
    scores = f"perplexity {record['perplexity']['score']:.2f}{label}"
    if record["perplexity_context"]:
        window = record["perplexity_context"]["context_window"]
        scores += f"; with a context of {window} tokens, perplexity {record['perplexity_context']['score']:.2f}{label}"
    corpus = "" if tokens["published_corpus"] else "; NOT the published corpus"
    return (f"{record['benchmark']} {record['norm']} ({record['arch']}), {record['subset']}: {scores}\n"
            f"{tokens['scored']:,} tokens in blocks of {record['tokens_per_sample']}: {tokens['words']:,} words "
            f"({tokens['unknown']:,} unknown) and {tokens['line_ends']:,} line ends, which count{corpus}")
