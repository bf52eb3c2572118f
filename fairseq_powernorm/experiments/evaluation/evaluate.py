"""Evaluates one run: see scripts/evaluate.sh."""

import argparse
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ..data.moses_python import detokenize
from ..directories import locked, whole_directory
from ..errors import UserError, choose
from ..files import read_json, sha256, write_json
from ..paths import PLUGIN, ROOT, data_root
from ..runs import checkpoints, compose, trainlog
from ..settings import benchmarks, data_settings, is_lm, prepared
from ..tools import TOOLS, call, tool, versions
from . import perplexity
from .score import lines_of, sacrebleu_scores, tokenized_bleu

SCHEMA = 2
SUBSETS = ("test", "valid")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/evaluate.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    parser.add_argument("run_dir")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--average", type=int)
    parser.add_argument("--available", action="store_true")
    parser.add_argument("--unfinished", action="store_true")
    parser.add_argument("--record")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args(arguments)
    choose("benchmark", options.benchmark, benchmarks())
    choose("--subset", options.subset, SUBSETS)
    if options.average is not None and options.average < 1:
        raise UserError(f"--average {options.average} is not a number of checkpoints; valid: 1 or more")
    return options


def evaluate(arguments):
    from omegaconf import OmegaConf

    options = parse(arguments)
    run = Path(os.path.abspath(options.run_dir))
    facts = started(run, options)
    data, stamp = prepared(options.benchmark)
    if facts["prepared_sha256"] != sha256(data / "prepared.json"):
        raise UserError(f"{run} was trained on other data than {data} holds now: settings or text differ; "
                        f"prepare the data as it was, or train again")
    target = run / ("evaluation" if options.subset == "test" else f"evaluation-{options.subset}")
    copy = Path(options.record) if options.record else None
    if copy and copy.exists() and not options.force and not same(copy, target / "record.json"):
        raise UserError(f"--record {options.record} exists already; --force overwrites it")
    config = OmegaConf.load(run / "config.yaml")
    with locked(run) as lock:
        if is_lm(config) and options.average is None:
            inputs = checkpoints.best(run / "checkpoints")
        else:
            inputs = checkpoints.last(config, run / "checkpoints", options.average, options.available)
        score = perplexity.evaluate if is_lm(config) else translate_and_score
        request = {"subset": options.subset, "checkpoints": {path.name: sha256(path) for path in inputs}}
        if target.exists() and not options.force:
            record = read_json(target / "record.json")
            if {key: record.get(key) for key in request} != request:
                raise UserError(f"{target} holds an evaluation of other checkpoints; --force replaces it")
            print(f"{target} is there already; nothing to do (--force evaluates again)")
        else:
            refuse_other_models(inputs, config)
            with whole_directory(target) as directory:
                record = {"schema": SCHEMA, **about(run, facts, config), **request,
                          **score(directory, data, stamp, config, inputs, options.subset, lock),
                          "versions": {"python": platform.python_version(), **versions(TOOLS)}, "git_commit": commit()}
                commands = [*(session["command"] for session in facts["sessions"]), *record.pop("evaluation_commands")]
                record["commands"] = [anonymous(shlex.join(command).replace(str(directory), str(target)), run)
                                      for command in commands]
                write_json(directory / "record.json", record)
    show(record)
    print(f"record: {target / 'record.json'}")
    if copy:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_json(copy, record)
        print(f"copied to {copy}")


def same(first, second):
    return second.is_file() and first.read_bytes() == second.read_bytes()


def refuse_other_models(inputs, config):
    """Refuses checkpoints of which the model's settings are not the run's."""
    from omegaconf import OmegaConf

    with compose.quiet():
        from ...checkpoint import load
    wanted = OmegaConf.to_container(config.model)
    for path in inputs:
        try:
            found = load(str(path)).get("cfg")
        except ValueError as error:
            raise UserError(str(error)) from None
        model = OmegaConf.to_container(OmegaConf.create(found["model"])) if found else {}
        for key in wanted:
            if model.get(key) != wanted[key]:
                raise UserError(f"{path} does not belong to this run: its model.{key} is {model.get(key)!r}, "
                                f"the run's is {wanted[key]!r} (config.yaml)")


def started(run, options):
    """run.json of a run of this benchmark that has finished (or need not have)."""
    if not (run / "run.json").is_file():
        raise UserError(f"run directory {str(run)!r} was not made by scripts/train.sh: it has no run.json")
    facts = read_json(run / "run.json")
    if facts["benchmark"] != options.benchmark:
        raise UserError(f"{run} is a run of benchmark {facts['benchmark']!r}, not {options.benchmark!r}")
    if not (run / "finished.json").is_file() and not options.unfinished:
        raise UserError(f"{run} has not finished training; go on with it (scripts/train.sh {options.benchmark} "
                        f"{facts['norm']} --resume ...) or evaluate what is there with --unfinished")
    return facts


def about(run, facts, config):
    """What the record says of the training."""
    norm, placement = compose.norms_of(config.model)
    curve = finite(trainlog.curve(run / "train.log"))
    sessions = facts["sessions"]

    def total(key):
        values = [session[key] for session in sessions]
        return None if None in values else round(sum(values), 1)

    return {
        "benchmark": facts["benchmark"], "norm": norm, "placement": placement,
        "variant": config.model.get("norm_variant"), "seed": config.common.seed, "parameters": facts["parameters"],
        "updates": trainlog.updates(curve),
        "finished": (run / "finished.json").is_file(),
        "training": {"wall_s": total("wall_s"), "cpu_s": total("cpu_s"), "sessions": len(sessions),
                     "threads": sessions[-1]["threads"]},
        "curve": curve, "overrides": facts["overrides"], "config": compose.differences(config),
    }


def finite(curve):
    """A curve with null for what is not finite, for which JSON has no number."""
    def number(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {subset: [{key: number(value) for key, value in entry.items()} for entry in entries]
            for subset, entries in curve.items()}


def translate_and_score(directory, data, stamp, config, inputs, subset, lock):
    """Averages, translates and scores; leaves its files in directory."""
    averaged, log = directory / "averaged.pt", directory / "generate.log"
    average = [sys.executable, "-m", "fairseq_powernorm.checkpoint", "average", "--inputs", *map(str, inputs),
               "--output", str(averaged)]
    print(f"averaging {len(inputs)} checkpoints: {inputs[0].name} ... {inputs[-1].name}", flush=True)
    call(average, lock)
    generation, task, bpe = config.generation, config.task, stamp["settings"]["bpe"]
    generate = [tool("fairseq-generate"), str(data / "data-bin"), "--user-dir", str(PLUGIN), "--task", task._name,
                "--source-lang", task.source_lang, "--target-lang", task.target_lang, "--path", str(averaged),
                "--gen-subset", subset, "--beam", str(generation.beam), "--lenpen", str(generation.lenpen),
                "--max-len-a", str(generation.max_len_a), "--max-len-b", str(generation.max_len_b),
                # With a multiple, fairseq 0.12.3 drops the last sentences if they do not fill one.
                "--max-tokens", str(config.dataset.max_tokens), "--required-batch-size-multiple", "1",
                "--post-process", bpe, "--num-workers", "0", "--data-buffer-size", "0", "--no-progress-bar"]
    print(f"translating {subset} with beam {generation.beam}", flush=True)
    output = call(generate, lock)
    log.write_text(output, encoding="utf-8")

    languages = stamp["settings"]["languages"]
    lowercase = stamp["settings"]["lowercase"]
    hypotheses = hypotheses_of(output, stamp["sentences"][subset])
    texts = {
        "hyp.tok": hypotheses,
        "ref.tok": lines_of(data / "tok" / f"{subset}.{languages[1]}"),
        "hyp.detok": [detokenize(line, languages[1]) for line in hypotheses],
        "ref.detok": lines_of(data / "raw" / f"{subset}.{languages[1]}"),
    }
    for name, lines in texts.items():
        (directory / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    speed = re.search(r"Translated [\d,]+ sentences \(([\d,]+) tokens\) in ([\d.]+)s .* ([\d.]+) tokens/s", output)
    return {
        "bleu_tokenized": tokenized_bleu(
            texts["hyp.tok"], texts["ref.tok"],
            languages[1] if data_settings(stamp["benchmark"]).get("split_compounds", False) else None),
        **sacrebleu_scores(texts["hyp.detok"], texts["ref.detok"], lowercase),
        "sentences": len(hypotheses), "beam": generation.beam, "lenpen": generation.lenpen, "averaged": len(inputs),
        "tokens_per_s": float(speed[3]) if speed else None,
        "evaluation_commands": [average, generate],
    }


def hypotheses_of(output, sentences):
    """The best hypotheses in fairseq-generate's output, BPE undone, in the order of the text."""
    found = {int(number): text for number, text in re.findall(r"^H-(\d+)\t[^\t\n]*\t(.*)$", output, re.MULTILINE)}
    if sorted(found) != list(range(sentences)):
        raise UserError(
            f"fairseq-generate translated {len(found)} of {sentences} sentences; a score of a part of the subset "
            f"would be compared with scores of the whole"
        )
    return [found[number] for number in range(sentences)]


def commit():
    """The checkout's commit, with "+changes" if files other than records differ from it; None outside of git."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    head = git("rev-parse", "HEAD")
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--", ".", ":!results").stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def anonymous(text, run):
    """Text without this machine's paths: RUN_DIR and data/ stand for where they lie, programs for themselves."""
    for path, name in ((f"{run}", "RUN_DIR"), (f"{data_root()}/", "data/"), (f"{Path(sys.executable).parent}/", ""),
                       (f"{ROOT}/", "")):
        text = text.replace(path, name)
    return text


def show(record):
    if "perplexity" in record:
        print(perplexity.describe(record))
        return
    print(f"{record['benchmark']} {record['norm']} ({record['placement']}), {record['subset']}: "
          f"{record['bleu_tokenized']['text']}")
    print(f"sacreBLEU {record['sacrebleu']['score']:.2f} ({record['sacrebleu']['signature']}), "
          f"chrF {record['chrf']['score']:.2f}")
