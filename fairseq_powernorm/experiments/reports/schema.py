"""What the JSON files in results/ hold, key by key, as results/README.md describes it.

python -m fairseq_powernorm.experiments.schema FILE...
    checks files and says what is wrong with the first that is not valid
"""

import math

from ..errors import UserError
from ..files import read_json
from ..settings import NORMS, norm_name

NUMBER = (int, float)
SHA256 = str


class Optional:
    """A value of a kind, or null."""

    def __init__(self, kind):
        self.kind = kind


class Mapping:
    """An object with any keys and values of one kind."""

    def __init__(self, kind):
        self.kind = kind


class Named:
    """A name, one of a set, and perhaps its options: NAME[:OPTION=VALUE[,...]]."""

    def __init__(self, names):
        self.names = names


POINT = {"updates": int, "epoch": Optional(int), "loss?": Optional(NUMBER), "nll_loss?": Optional(NUMBER),
         "ppl?": Optional(NUMBER)}
SCORE = {"score": NUMBER, "signature": str}
PERPLEXITY = {"score": NUMBER, "nll": NUMBER, "context_window": int}
SERIES = [Optional(NUMBER)]

# A kind is a type or several, {key: kind} with exactly these keys ("key?" may be missing), [kind] for a list of any
# length, or a set of valid values.
RUN = {
    "schema": {2}, "benchmark": str, "norm": Named({*NORMS, "custom"}), "placement": {"encoder", "all", "custom"},
    "variant": Optional({"reference", "algorithm2"}), "seed": int, "parameters": int, "updates": int, "finished": bool,
    "training": {"wall_s": Optional(NUMBER), "cpu_s": Optional(NUMBER), "sessions": int, "threads": int},
    "curve": {"train": [POINT], "valid": [POINT]}, "overrides": [str], "config": dict, "subset": {"test", "valid"},
    "checkpoints": Mapping(SHA256), "averaged": int, "versions": Mapping(str), "git_commit": Optional(str),
    "commands": [str],
}
TRANSLATION = {
    **RUN, "beam": int, "lenpen": NUMBER, "sentences": int, "tokens_per_s": Optional(NUMBER),
    "bleu_tokenized": {"score": NUMBER, "precisions": [NUMBER], "brevity_penalty": NUMBER, "ratio": NUMBER,
                       "hypothesis_length": int, "reference_length": int, "text": str, "split_compounds?": {True}},
    "sacrebleu": SCORE, "chrf": SCORE,
}
LANGUAGE_MODEL = {
    **RUN, "arch": str, "causal": bool, "perplexity": PERPLEXITY, "perplexity_context": Optional(PERPLEXITY),
    "tokens_per_sample": int,
    "tokens": {"scored": int, "words": int, "line_ends": int, "line_ends_counted": {True}, "unknown": int,
               "out_of_vocabulary": int, "types": int, "published_corpus": bool},
}
SIGNIFICANCE = {
    "schema": {1}, "kind": {"significance"},
    "tests": Mapping({"against": str, "baseline": NUMBER, "score": NUMBER, "p_value": Optional(NUMBER),
                      "signature": str}),
}
FIGURES = {
    "schema": {1}, "kind": {"figures"},
    "statistics": Mapping({"norms": int, "updates": [int],
                           "quantities": Mapping({"mean": SERIES, "smallest": SERIES, "largest": SERIES})}),
    "singular_values": Mapping({"checkpoint": str, "values": [NUMBER]}),
}
QUARTILES = [NUMBER]
#: of a norm or a model in a measurement of speed: times, or errors at the level `accuracy`
CONTENDER = {
    "seconds?": NUMBER, "seconds_quartiles?": QUARTILES, "ratio?": NUMBER, "ratio_quartiles?": QUARTILES, "rounds?": int,
    "bandwidth_fraction?": NUMBER, "saved?": NUMBER, "peak?": NUMBER, "host_seconds?": NUMBER,
    "errors?": Mapping(NUMBER), "tolerances?": [NUMBER], "worst?": NUMBER,
}
BENCHMARK = {
    "schema": {1}, "kind": {"benchmark"}, "device": {"cpu", "cuda"}, "processor": str, "cores": int,
    "memory": {"recycled", "fresh"}, "kernel": str, "quick": bool, "arguments": [str], "versions": Mapping(str),
    "git_commit": Optional(str),
    "cells": [{"level": str, "pass": str, "rows": int, "channels": int, "dtype": str, "masked": bool,
               "device": {"cpu", "cuda"}, "threads": int, "contenders": Mapping(CONTENDER)}],
    "checks": [{"target": str, "value": NUMBER, "bound": str, "met": bool}],
}


def kind_of(content):
    """(name, keys) of what a JSON object is."""
    if not isinstance(content, dict):
        return "record", RUN
    named = {"significance": ("significance tests", SIGNIFICANCE), "figures": ("figures' data", FIGURES),
             "benchmark": ("measurement of speed", BENCHMARK)}
    if "kind" in content and str(content["kind"]) in named:
        return named[content["kind"]]
    return ("record of a language model", LANGUAGE_MODEL) if "perplexity" in content else ("record", TRANSLATION)


def problems(value, kind, where=""):
    """What is wrong with a value, one text each."""
    if isinstance(kind, Optional):
        return [] if value is None else problems(value, kind.kind, where)
    if isinstance(kind, Named):
        return problems(norm_name(value) if isinstance(value, str) else value, kind.names, where)
    if isinstance(kind, set):
        valid = any(value == choice and type(value) is type(choice) for choice in kind)
        return [] if valid else [f"{where} is {value!r}; valid: {', '.join(sorted(map(repr, kind)))}"]
    if isinstance(kind, (dict, Mapping)):
        if not isinstance(value, dict):
            return [f"{where or 'it'} is {type(value).__name__}, not an object"]
        if isinstance(kind, Mapping):
            return [text for key in value for text in problems(value[key], kind.kind, f"{where}[{key!r}]")]
        keys = {key.rstrip("?"): inner for key, inner in kind.items()}
        prefix = f"{where}." if where else ""
        found = [f"{prefix}{key} is missing" for key in kind if key not in value and key[-1] != "?"]
        for key in value:
            path = f"{prefix}{key}"
            found += problems(value[key], keys[key], path) if key in keys else [f"{path} is not a key of the schema"]
        return found
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{where} is {type(value).__name__}, not a list"]
        return [text for i, item in enumerate(value) for text in problems(item, kind[0], f"{where}[{i}]")]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        return [f"{where} is {value!r}, not {' or '.join(each.__name__ for each in kinds)}"]
    return [f"{where} is {value!r}"] if isinstance(value, float) and not math.isfinite(value) else []


def check(content, path):
    """content, if it is what results/README.md describes; else UserError with what is wrong first."""
    name, kind = kind_of(content)
    found = problems(content, kind)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{path} is not a valid {name}: {found[0]}{more}; results/README.md describes the keys")
    return content


def read_record(path):
    """The record of a run in a file; refuses what is none."""
    content = read_json(path)
    if isinstance(content, dict) and "kind" in content:
        raise UserError(f"{path} is not a record of a run: its kind is {content['kind']!r}")
    return check(content, path)


def check_files(arguments):
    if not arguments:
        raise UserError("no file is given; usage: python -m fairseq_powernorm.experiments.schema FILE...")
    for path in arguments:
        check(read_json(path), path)
    print(f"{len(arguments)} valid")
