"""What the JSON files in results/ hold, key by key, as results/README.md describes it."""

import math
from pathlib import Path
from typing import Any, Collection, Dict, List, Tuple, Union

from ..errors import UserError
from ..files import read_json
from ..settings import NORMS, norm_name

NUMBER = (int, float)
LARGEST = 2**63  # of whole numbers
SHA256 = str


#: A type or several, {key: kind} for exactly these keys ("key?" may be missing), [kind] for a list of any length, a set of
#: valid values, or one of the classes below.
Kind = Any


class OrNull:
    """A value of a kind, or null."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


class ObjectOf:
    """An object with any keys and values of one kind."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind


class Having:
    """An object with these keys at least."""

    def __init__(self, keys: Dict[str, Kind]) -> None:
        self.keys = keys


class Named:
    """A name, one of a set, and perhaps its options: NAME[:OPTION=VALUE[,...]]."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names


POINT = {"updates": int, "epoch": OrNull(int), "loss?": OrNull(NUMBER), "nll_loss?": OrNull(NUMBER),
         "ppl?": OrNull(NUMBER)}
SCORE = {"score": NUMBER, "signature": str}
PERPLEXITY = {"score": NUMBER, "nll": NUMBER, "context_window": int}
SERIES = [OrNull(NUMBER)]

#: what was trained, where it was not a benchmark: the settings that it builds on, the data, what the user's file changes
RECIPE = {"base": str, "data": str, "overrides": [str]}

RUN = {
    "schema": {2}, "benchmark": str, "norm": Named({*NORMS, "custom"}), "placement": {"encoder", "all", "custom"},
    "variant": OrNull({"reference", "algorithm2"}), "seed": int, "parameters": int, "updates": int, "finished": bool,
    "training": {"wall_s": OrNull(NUMBER), "cpu_s": OrNull(NUMBER), "sessions": int, "threads": int},
    "curve": {"train": [POINT], "valid": [POINT]}, "overrides": [str], "recipe?": RECIPE,
    "config": Having({"model": Having({"_name": str})}),
    "subset": {"test", "valid"}, "checkpoints": ObjectOf(SHA256), "averaged": int, "versions": ObjectOf(str),
    "git_commit": OrNull(str), "commands": [str],
}
TRANSLATION = {
    **RUN, "beam": int, "lenpen": NUMBER, "sentences": int, "tokens_per_s": OrNull(NUMBER),
    "bleu_tokenized": {"score": NUMBER, "precisions": [NUMBER], "brevity_penalty": NUMBER, "ratio": NUMBER,
                       "hypothesis_length": int, "reference_length": int, "text": str, "split_compounds?": {True}},
    "sacrebleu": SCORE, "chrf": SCORE,
}
LANGUAGE_MODEL = {
    **RUN, "arch": str, "causal": bool, "perplexity": PERPLEXITY, "perplexity_context": OrNull(PERPLEXITY),
    "tokens_per_sample": int,
    "tokens": {"scored": int, "words": int, "line_ends": int, "line_ends_counted": {True}, "unknown": int,
               "out_of_vocabulary": int, "types": int, "published_corpus": bool},
}
SIGNIFICANCE = {
    "schema": {1}, "kind": {"significance"},
    "tests": ObjectOf({"against": str, "baseline": NUMBER, "score": NUMBER, "p_value": OrNull(NUMBER),
                      "signature": str}),
}
FIGURES = {
    "schema": {1}, "kind": {"figures"},
    "statistics": ObjectOf({"norms": int, "updates": [int],
                           "quantities": ObjectOf({"mean": SERIES, "smallest": SERIES, "largest": SERIES})}),
    "singular_values": ObjectOf({"checkpoint": str, "values": [NUMBER]}),
}
QUARTILES = [NUMBER]
#: of a norm or a model in a measurement of speed: times, or errors at the level `accuracy`
CONTENDER = {
    "seconds?": NUMBER, "seconds_quartiles?": QUARTILES, "ratio?": NUMBER, "ratio_quartiles?": QUARTILES, "rounds?": int,
    "bandwidth_fraction?": NUMBER, "saved?": NUMBER, "peak?": NUMBER, "host_seconds?": NUMBER,
    "statistics?": NUMBER,
    "errors?": ObjectOf(NUMBER), "tolerances?": [NUMBER], "worst?": NUMBER,
}
BENCHMARK = {
    "schema": {1}, "kind": {"benchmark"}, "device": {"cpu", "cuda"}, "processor": str, "cores": int,
    "memory": str, "kernel": str, "quick": bool, "arguments": [str], "versions": ObjectOf(str),
    "git_commit": OrNull(str),
    "cells": [{"level": str, "pass": str, "rows": int, "channels": int, "dtype": str, "masked": bool,
               "device": {"cpu", "cuda"}, "threads": int, "memory?": str, "contenders": ObjectOf(CONTENDER)}],
    "checks": [{"target": str, "value": NUMBER, "bound": str, "met": bool}],
}


def kind_of(content: Any) -> Tuple[str, Kind]:
    """(name, keys) of what a JSON object is."""
    if not isinstance(content, dict):
        return "record", RUN
    named = {"significance": ("significance tests", SIGNIFICANCE), "figures": ("figures' data", FIGURES),
             "benchmark": ("measurement of speed", BENCHMARK)}
    if "kind" in content and str(content["kind"]) in named:
        return named[content["kind"]]
    return ("record of a language model", LANGUAGE_MODEL) if "perplexity" in content else ("record", TRANSLATION)


def problems(value: Any, kind: Kind, where: str = "") -> List[str]:
    """What is wrong with a value, a text for each fault; `where` is its place in the file."""
    if isinstance(kind, OrNull):
        return [] if value is None else problems(value, kind.kind, where)
    if isinstance(kind, Having):
        part = {key: value[key] for key in kind.keys if key in value} if isinstance(value, dict) else value
        return problems(part, kind.keys, where)
    if isinstance(kind, Named):
        return problems(norm_name(value) if isinstance(value, str) else value, set(kind.names), where)
    if isinstance(kind, set):
        valid = any(value == choice and type(value) is type(choice) for choice in kind)
        return [] if valid else [f"{where} is {value!r}; valid: {', '.join(sorted(map(repr, kind)))}"]
    if isinstance(kind, (dict, ObjectOf)):
        if not isinstance(value, dict):
            return [f"{where or 'it'} is {type(value).__name__}, not an object"]
        if isinstance(kind, ObjectOf):
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
    if isinstance(value, int) and abs(value) > LARGEST:
        return [f"{where} is a number of {len(str(value))} digits"]
    return [f"{where} is {value!r}"] if isinstance(value, float) and not math.isfinite(value) else []


def check(content: Any, path: Union[str, Path]) -> Dict[str, Any]:
    """The content of a file, if it is what results/README.md describes; else UserError with the first fault."""
    name, kind = kind_of(content)
    found = problems(content, kind)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{path} is not a valid {name}: {found[0]}{more}; results/README.md describes the keys")
    valid: Dict[str, Any] = content
    return valid


def read_record(path: Union[str, Path]) -> Dict[str, Any]:
    """The record of a run in a file; raises UserError if it is something else."""
    content = read_json(path)
    if isinstance(content, dict) and "kind" in content:
        raise UserError(f"{path} is not a record of a run: its kind is {content['kind']!r}")
    return check(content, path)

