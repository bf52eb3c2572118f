"""Trains one run: see scripts/train.sh."""

import argparse
import collections
import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import compose
import trainlog
import perplexity
from settings import (CONFIGS, NORMS, UserError, architectures, benchmarks, choose, cpus, is_lm, load, locked, main,
                      placements, prepared, read_json, runs_root, sha256, tool, write_json)

SCHEMA = 1
# Given by train.sh itself; another value would take the run's files away from its directory.
OURS = {"checkpoint.save_dir": "--run-dir DIR", "task.data": "PN_DATA_ROOT", "common.user_dir": "another checkout"}


def parse(arguments):
    parser = argparse.ArgumentParser(prog="scripts/train.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("benchmark")
    parser.add_argument("norm")
    parser.add_argument("--arch")
    parser.add_argument("--placement")
    parser.add_argument("--run-dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    choose("benchmark", options.benchmark, benchmarks())
    choose("norm", options.norm, NORMS)
    valid = architectures(options.benchmark)
    options.arch = choose("--arch", options.arch or valid[0], valid)
    config = load(options.benchmark)
    valid = placements(config.model)
    if is_lm(config) and options.placement == "encoder":
        raise UserError(f"--placement 'encoder': {options.benchmark} trains a language model, which has no encoder; "
                        f"valid: {', '.join(valid)}")
    options.placement = choose("--placement", options.placement or valid[0], valid)
    for override in options.overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(f"{override!r} is no hydra override; an override reads KEY=VALUE, such as common.seed=2")
    for key, instead in OURS.items():
        if key in compose.by_key(options.overrides):
            raise UserError(f"override {key} is train.sh's own; use {instead}")
    return options, config


def train(arguments):
    options, config = parse(arguments)
    data, _ = prepared(options.benchmark)
    run = run_directory(options, config)
    if run.exists() and not options.resume:
        raise UserError(f"{run} exists already; --resume goes on with it, --run-dir DIR chooses another")
    facts = {"schema": SCHEMA, "benchmark": options.benchmark, "arch": options.arch, "norm": options.norm,
             "placement": options.placement,
             "prepared_sha256": sha256(data / "prepared.json"), "overrides": options.overrides, "sessions": []}
    with locked(run) as lock:
        if run.exists() and any(run.iterdir()):
            facts = resumed(run, facts)
            finished = run / "finished.json"
            if finished.is_file() and read_json(finished)["overrides"] == facts["overrides"]:
                print(f"{run} has finished ({read_json(finished)['updates']:,} updates); nothing to do")
                return 0
        complete, resolved, facts["parameters"] = compose.resolved(
            options.benchmark,
            [*compose.arch_overrides(options.benchmark, options.arch),
             *compose.norm_overrides(config.model, options.norm, options.placement), *facts["overrides"]],
            data / "data-bin", run / "checkpoints")
        if is_lm(resolved):
            perplexity.check(resolved)
        command = [tool("fairseq-hydra-train"), "--config-dir", str(CONFIGS), "--config-name", options.benchmark,
                   f"hydra.run.dir={compose.quote(run)}", "hydra.output_subdir=hydra", "hydra/job_logging=stdout", *complete]
        return session(run, facts, command, resolved, lock)


def run_directory(options, config):
    """RUN: --run-dir, or NORM[-PLACEMENT][-ARCH]-seedS under the runs' root; defaults are not named."""
    if options.run_dir:
        return Path(os.path.abspath(options.run_dir))
    seed = compose.by_key(options.overrides).get("common.seed", f"={config.common.seed}").split("=", 1)[1]
    chosen = [options.norm]
    for value, default in ((options.placement, placements(config.model)[0]),
                           (options.arch, architectures(options.benchmark)[0])):
        chosen += [value] if value != default else []
    return runs_root() / options.benchmark / f"{'-'.join(chosen)}-seed{seed}"


def resumed(run, wanted):
    """run.json of the run to go on with, new overrides added; refuses if it was started as something else."""
    if not (run / "run.json").is_file():
        raise UserError(f"cannot go on with {run}: it was not made by scripts/train.sh (it has no run.json)")
    facts = read_json(run / "run.json")
    facts.setdefault("arch", architectures(wanted["benchmark"])[0])  # older runs have the default
    for key in ("schema", "benchmark", "arch", "norm", "placement"):
        if facts.get(key) != wanted[key]:
            raise UserError(f"cannot go on with {run}: it was started with {key} {facts.get(key)!r}, not {wanted[key]!r}")
    if facts["prepared_sha256"] != wanted["prepared_sha256"]:
        raise UserError(f"cannot go on with {run}: the prepared data has changed since it was started")
    merged = {**compose.by_key(facts["overrides"]), **compose.by_key(wanted["overrides"])}
    return {**facts, "overrides": list(merged.values())}


def session(run, facts, command, config, lock):
    """Trains until the end, an error or a signal; shows progress in short and logs everything. Gives the exit status."""
    from omegaconf import OmegaConf

    run.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (run / "finished.json").unlink()
    this = {"command": command, "threads": int(os.environ.get("OMP_NUM_THREADS") or cpus()),
            "wall_s": None, "cpu_s": None, "exit_status": None}  # null to the end of a session that is killed
    facts["sessions"].append(this)
    write_json(run / "run.json", facts)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")
    with open(run / "command.txt", "a", encoding="utf-8") as stream:
        stream.write(shlex.join(command) + "\n")
    max_update = config.optimization.max_update
    remark = perplexity.remark(config.model) if is_lm(config) else ""
    if remark:
        print(f"these perplexities are {remark}", flush=True)
    print(f"training {run}: {facts['parameters']:,} parameters; everything is logged in {run / 'train.log'}", flush=True)

    begin, cpu = time.time(), children_cpu()
    # The child holds the lock as well: should this process be killed, nobody else can train there until it ends, too.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               pass_fds=(lock.fileno(),))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, lambda *_: process.terminate())
    tail = collections.deque(maxlen=20)
    with open(run / "train.log", "a", encoding="utf-8") as log:
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail.append(line)
            short = trainlog.brief(line.rstrip("\n"), max_update, remark)
            if short is not None:
                print(short, flush=True)
    status = process.wait()
    this.update(wall_s=round(time.time() - begin, 1), cpu_s=round(children_cpu() - cpu, 1), exit_status=status)
    write_json(run / "run.json", facts)
    if status:
        print(f"the last lines of {run / 'train.log'}:\n{''.join(tail)}", file=sys.stderr)
        print(f"error: training stopped with exit status {status}; --resume goes on with it", file=sys.stderr)
        return status if status > 0 else 128 - status
    updates = trainlog.updates(trainlog.curve(run / "train.log"))
    write_json(run / "finished.json", {"updates": updates, "overrides": facts["overrides"]})
    print(f"finished {run}: {updates:,} updates in {this['wall_s'] / 60:.1f} min")
    return 0


def children_cpu():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(train, sys.argv[1:])
