"""Evaluates a run: averages its checkpoints, scores a subset, and writes the record."""

import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from .. import trust
from ..directories import check_writable, locked, put_back, whole_directory
from ..errors import UserError
from ..files import sha256, write_json
from ..overrides import by_key, quiet
from ..paths import PLUGIN, ROOT, data_root, for_fairseq
from ..recipes import is_lm, prepared
from ..reports import schema
from ..runs import checkpoints, compose, records, trainlog
from ..tools import TOOLS, versions
from . import perplexity, translation
from .job import Job

SCHEMA = 2
SUBSETS = ("test", "valid")
LONGEST_NAME = 240  # bytes of a file's name: of file systems' 255, some are for temporary files beside it
#: what a run directory holds, as far as an evaluation needs it
FILES = ("run.json", "train.log", "config.yaml")
#: beginnings of the settings by which a run is evaluated, which may be changed when it is gone on with
HEEDED = ("generation.", "eval_lm.", "task.tokens_per_sample", "task.sample_break_mode")
#: settings of a model that follow optimization.max_update, with which a run may be gone on with that is to be longer
LENGTHS = ("norm_total_updates",)

Record = Dict[str, Any]


def evaluate(
    run: Path,
    *,
    benchmark: Optional[str] = None,
    subset: Optional[str] = None,
    average: Optional[int] = None,
    available: bool = False,
    unfinished: bool = False,
    record: Optional[Path] = None,
    force: bool = False,
) -> Record:
    """The record of a run, which is evaluated first if it has none; the arguments are the options of scripts/evaluate.sh.

    benchmark: what the run must be one of, if somebody says so

    Whatever the evaluation needs is checked before anything is computed or written.

    Raises:
        UserError: the run is not one of this benchmark, not finished, trained on other data, or has no checkpoints that can
            be averaged; or there is another evaluation already
    """
    run, copy = Path(os.path.abspath(run)), record
    facts = started(run, benchmark, unfinished=unfinished)
    data, stamp = prepared(records.data_of(facts))
    for_fairseq("run directory", run)
    for_fairseq("data directory (PN_DATA_ROOT)", data)
    if facts["prepared_sha256"] != sha256(data / "prepared.json"):
        raise UserError(
            f"{run} was trained on other data than {data} holds now: settings or text differ; "
            f"prepare the data as it was, or train again"
        )
    subset = available_subset(data, subset)
    target = run / ("evaluation" if subset == available_subset(data, None) else f"evaluation-{subset}")
    if copy:
        check_copy(copy, target / "record.json", force=force)
    config = load_config(run)
    records.check_stamp(stamp, data / "prepared.json", lm=is_lm(config))
    if not is_lm(config):
        pair, text = [config.task.source_lang, config.task.target_lang], stamp["settings"]["languages"]
        if pair != text:
            raise UserError(f"{run / 'config.yaml'}: a model from {pair[0]} to {pair[1]}, but {data} holds text from "
                            f"{text[0]} to {text[1]}")
    with locked(run) as lock:
        directory = run / "checkpoints"
        if is_lm(config) and average is None:
            inputs = checkpoints.best(directory)
        else:
            inputs = checkpoints.last(config, directory, average, available=available)
        request = {"subset": subset, "checkpoints": {path.name: sha256(path) for path in inputs}}
        put_back(target)
        if target.exists() and not force:
            try:
                found: Record = schema.read_record(target / "record.json")
            except UserError as error:
                raise UserError(f"{error}; --force evaluates again") from None
            if {key: found.get(key) for key in request} != request:
                raise UserError(f"{target} holds an evaluation of other checkpoints; --force replaces it")
            there, now = heeded(found["overrides"]), heeded(facts["overrides"])
            for key in {**there, **now}:
                if there.get(key) != now.get(key):
                    raise UserError(f"{target} holds an evaluation with {there.get(key, f'no override {key}')}, now "
                                    f"{now.get(key, 'none')}; --force replaces it")
            print(f"{target} is there already; nothing to do (--force evaluates again)")
        else:
            job = Job(config, inputs, subset, data, stamp, lock)
            found = {"schema": SCHEMA, **about(run, facts, config), **request}
            found = carry_out(job, run, target, found, [session["command"] for session in facts["sessions"]])
    if copy:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_json(copy, found)
    print((perplexity if "perplexity" in found else translation).describe(found))
    print(f"record: {target / 'record.json'}" + (f"\ncopied to {copy}" if copy else ""))
    return found


def carry_out(job: Job, run: Path, target: Path, record: Record, commands: Sequence[Sequence[str]]) -> Record:
    """Evaluates, and makes the directory `target` with the record.

    Args:
        record: what it says of the training
        commands: those of the training
    """
    kind = perplexity if is_lm(job.config) else translation
    kind.check_job(job)
    refuse_wrong_weights(job.checkpoints, job.config)
    environment = {"versions": {"python": platform.python_version(), **versions(TOOLS)}, "git_commit": commit()}
    with whole_directory(target) as directory:
        scores = kind.evaluate(job, directory)
        record = {**record, **scores.facts, **environment}
        record["commands"] = [
            shlex.join(anonymous(word.replace(str(directory), str(target)), run) for word in command)
            for command in (*commands, *scores.commands)
        ]
        write_json(directory / "record.json", record)
    return record


# ---- what is checked first -------------------------------------------------------------------------------------------


def heeded(overrides: Sequence[str]) -> Dict[str, str]:
    """Those of a run's overrides that an evaluation heeds, by key: with others, the same checkpoints have other scores."""
    return {key: each for key, each in by_key(overrides).items() if key.startswith(HEEDED)}


def available_subset(data: Path, subset: Optional[str]) -> str:
    """A subset of prepared data; by default that of the first name, which one's own text need not have."""
    there = [name for name in SUBSETS if any((data / "data-bin").glob(f"{name}.*"))] or list(SUBSETS)
    if subset not in (None, *there):
        raise UserError(f"--subset {subset!r}: {data} was prepared without that text; valid: {', '.join(there)}")
    return subset or there[0]


def started(run: Path, benchmark: Optional[str], *, unfinished: bool) -> Dict[str, Any]:
    """run.json of a run, of this benchmark if one is given, that has finished (or need not have)."""
    for name in FILES:
        if not (run / name).is_file():
            raise UserError(f"run directory {str(run)!r} was not made by scripts/train.sh: it has no {name}")
    facts = records.read_run(run)
    if not facts["sessions"]:
        raise UserError(f"{run / 'run.json'} was not written by scripts/train.sh: it has no sessions")
    if "parameters" not in facts:
        raise UserError(f"{run / 'run.json'} was not written by scripts/train.sh: it does not say how many parameters there "
                        f"are")
    if benchmark not in (None, facts["benchmark"]):
        raise UserError(
            f"{run} is a run of benchmark {facts['benchmark']!r}, not {benchmark!r}; evaluate.sh RUN_DIR needs no name"
        )
    if records.read_finished(run) is None and not unfinished:
        reason = records.diverged(facts)
        if reason:
            raise UserError(f"{run}: training diverged: {reason}; --unfinished evaluates what was saved before")
        raise UserError(
            f"{run} has not finished training; go on with it (scripts/train.sh {facts['benchmark']} {facts['norm']} "
            f"--resume ...) or evaluate what is there with --unfinished"
        )
    return facts


def check_copy(copy: Path, own: Path, *, force: bool) -> None:
    """Refuses to write a copy of the record over something else, or where it cannot be written."""
    if copy.is_dir():
        raise UserError(f"--record {str(copy)!r} is a directory; give the name of a file")
    if os.path.lexists(copy) and not copy.is_file():
        raise UserError(f"--record {str(copy)!r} is there, and not a file; choose another name")
    if len(os.fsencode(copy.name)) > LONGEST_NAME:
        raise UserError(f"--record {str(copy)!r}: a name has {LONGEST_NAME} bytes at most")
    if copy.exists() and not force and not (own.is_file() and copy.read_bytes() == own.read_bytes()):
        raise UserError(f"--record {str(copy)!r} exists already; --force overwrites it")
    check_writable(f"--record {str(copy)!r} cannot be written: directory", Path(os.path.abspath(copy)).parent)


def load_config(run: Path) -> Any:
    """The run's resolved configuration. Its plugin is this one, whatever the file says: a foreign run executes no code."""
    from omegaconf import OmegaConf

    path = run / "config.yaml"
    try:
        trust.check_yaml(path)
        config = OmegaConf.load(path)
        content: Any = OmegaConf.to_container(config)
    except UserError:
        raise
    except Exception as error:  # the errors of YAML share no base class with those of files
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    trust.check_config(content, str(path))
    records.check_settings(content, path)
    config.common.user_dir = str(PLUGIN)
    return config


def refuse_wrong_weights(inputs: Sequence[Path], config: Any) -> None:
    """Refuses checkpoints whose model has other settings than the run's, or weights that are not finite."""
    from omegaconf import OmegaConf

    with quiet():
        from ...checkpoint import check_finite, load
    wanted: Any = OmegaConf.to_container(config.model)
    for path in inputs:
        try:
            state = load(str(path))
            check_finite(state["model"], str(path))
        except ValueError as error:
            raise UserError(str(error)) from None
        found = state.get("cfg")
        if found:
            trust.check_config(OmegaConf.to_container(OmegaConf.create(found)), str(path))
        model: Any = OmegaConf.to_container(OmegaConf.create(found["model"])) if found else {}
        for key in wanted:
            if key not in LENGTHS and model.get(key) != wanted[key]:
                raise UserError(
                    f"{path} does not belong to this run: its model.{key} is {model.get(key)!r}, "
                    f"the run's is {wanted[key]!r} (config.yaml)"
                )


# ---- what the record says --------------------------------------------------------------------------------------------


def about(run: Path, facts: Dict[str, Any], config: Any) -> Record:
    """What the record says of the training."""
    norm, placement = compose.norms_of(config.model)
    curve = finite(trainlog.curve(run / "train.log", checkpoints.validations(run / "checkpoints", config)))
    sessions = facts["sessions"]

    def total(key: str) -> Optional[float]:
        values = [session[key] for session in sessions]
        return None if None in values else round(sum(values), 1)

    return {
        "benchmark": facts["benchmark"],
        "norm": norm,
        "placement": placement,
        "variant": config.model.get("norm_variant"),
        "seed": config.common.seed,
        "parameters": facts["parameters"],
        "updates": max([trainlog.updates(curve), *(each.updates for each in checkpoints.accounts(run / "checkpoints"))]),
        "finished": (run / "finished.json").is_file(),
        "training": {
            "wall_s": total("wall_s"),
            "cpu_s": total("cpu_s"),
            "sessions": len(sessions),
            "threads": sessions[-1]["threads"],
        },
        "curve": curve,
        "overrides": facts["overrides"],
        **({"recipe": facts["recipe"]} if "recipe" in facts else {}),
        "config": compose.differences(config),
    }


def finite(curve: Dict[str, Any]) -> Dict[str, Any]:
    """A curve with null for what is not finite, for which JSON has no number."""

    def number(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        subset: [{key: number(value) for key, value in entry.items()} for entry in entries]
        for subset, entries in curve.items()
    }


def commit() -> Optional[str]:
    """The checkout's commit, with "+changes" if files other than records differ; None without git or a repository of its own
    (a copy may lie in somebody else's).
    """

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        own = [f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]  # whatever GIT_DIR says
        return subprocess.run(["git", "-C", str(ROOT), *own, *arguments], capture_output=True, text=True, errors="replace")

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":!results")
    except OSError:  # git is not installed
        return None
    if head.returncode or changed.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def anonymous(text: str, run: Path) -> str:
    """A word of a command without this machine's paths: RUN_DIR and data/ stand for theirs, programs for themselves."""
    for path, name in (
        (f"{run}", "RUN_DIR"),
        (f"{data_root()}/", "data/"),
        (f"{Path(sys.executable).parent}/", ""),
        (f"{ROOT}/", ""),
    ):
        end = "" if path.endswith("/") else r"(?![\w.-])"  # of /a/run, /a/run2 is no part
        for each in (path, path.replace("'", "\\'")):  # as hydra's overrides have quotes
            text = re.sub(rf"(?<![\w./-]){re.escape(each)}{end}", name, text)
    return text
