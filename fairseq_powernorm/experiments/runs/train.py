"""Trains one run, in one process or in those that a launcher starts."""

import contextlib
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .. import own, trust
from ..directories import locked
from ..errors import LARGEST_SEED, UserError, choose
from ..evaluation import perplexity
from ..files import sha256
from ..overrides import by_key, quote
from ..paths import for_fairseq, runs_root
from ..recipes import LARGEST_COMPARED, check_outputs, is_lm, prepared
from ..settings import architectures, load, norm_in_names, placements, recipe
from ..tools import threads, tool
from . import batch, checkpoints, compose, records, watch
from .launchers import PLACES, WORLD_SIZE, Launcher
from .session import Watched, patience, session

#: how a training starts, and what it leaves of the checkpoint behind -> the value with which a run goes on from its own
STARTS = {"checkpoint.restore_file": "checkpoint_last.pt", **dict.fromkeys(
    (f"checkpoint.reset_{what}" for what in ("optimizer", "lr_scheduler", "dataloader", "meters")), False)}


def checked(options: Namespace) -> Any:
    """The configuration of the benchmark; fills in architecture and placement, and refuses what does not fit it."""
    valid = architectures(options.benchmark)
    options.arch = choose("--arch", options.arch or valid[0], valid)
    config = load(options.benchmark)
    valid = placements(config.model)
    if is_lm(config) and options.placement == "encoder":
        raise UserError(f"--placement 'encoder': {recipe(options.benchmark).name} trains a language model, which has no "
                        f"encoder; valid: {', '.join(valid)}")
    options.placement = choose("--placement", options.placement or valid[0], valid)
    check_norm(options.norm)
    watch.check(options)
    trust.check_overrides(options.overrides, trust.OURS)
    seed_of(options.overrides, config.common.seed)
    return config


def check_norm(text: str) -> None:
    """Refuses a norm with options that it has not; they are a part of the run directory's name."""
    from ...norms import parse_norm

    try:
        parse_norm(text)
    except ValueError as error:
        raise UserError(str(error)) from None


def train(options: Namespace, config: Any, launcher: Optional[Launcher] = None) -> int:
    """Trains with options that :func:`checked` has seen; gives the exit status.

    launcher: what starts the ranks; without one they are one, or the GPUs of this machine that an override asks for
    """
    threads(os.environ)  # both refuse what cannot be
    patience()
    if launcher is None:
        refuse_several_processes()
    else:
        launcher.check_overrides(options.overrides)
    found = recipe(options.benchmark)
    data, stamp = prepared(found.data)
    run = for_fairseq("run directory", run_directory(options, config))
    for_fairseq("data directory (PN_DATA_ROOT)", data)
    leads = launcher is None or launcher.leads
    if leads and begun(run) and not options.resume:
        raise UserError(f"{run} exists already; --resume goes on with it, --run-dir DIR chooses another")
    from omegaconf import OmegaConf

    with contextlib.ExitStack() as stack:
        lock = None
        if leads:
            lock = stack.enter_context(locked(run, *([launcher.patience] if launcher else [])))
        if launcher:
            launcher.check_claim(run)
        facts = started(options, data, run, launcher)
        if is_finished(run, facts["overrides"]):
            return 0
        if leads:
            check_outputs(data, stamp, "data-bin/", largest=LARGEST_COMPARED)
        complete, resolved, facts["parameters"] = composed(options, config, facts, data, run)
        trust.check_places(run, (OmegaConf.select(resolved, key) for key in trust.FILES))
        world = check_world(resolved, by_key(facts["overrides"]), launcher)
        complete += [] if launcher else [f"{WORLD_SIZE}={world}"]
        complete += batch.overrides(resolved, world)
        complete += going_on(run, resolved)
        if is_lm(resolved):
            perplexity.check(resolved)
        command = [tool("fairseq-hydra-train"), "--config-dir", str(found.folder), "--config-name", found.base,
                   f"hydra.run.dir={quote(run)}", "hydra.output_subdir=hydra", "hydra/job_logging=stdout", *complete]
        if leads:
            print(f"{found.name}: {batch.described(resolved, world)}", flush=True)
        watched = Watched(watch.overrides(options, run), watch.environment(options, run, facts) if leads else {})
        return session(run, facts, command, resolved, lock, launcher, watched)


def run_directory(options: Namespace, config: Any) -> Path:
    """RUN: --run-dir, or NORM[-PLACEMENT][-ARCH]-seedS under the runs' root; defaults are not named."""
    if options.run_dir:
        return Path(os.path.abspath(options.run_dir))
    seed = seed_of(options.overrides, config.common.seed)
    chosen = [norm_in_names(options.norm)]
    for value, default in ((options.placement, placements(config.model)[0]),
                           (options.arch, architectures(options.benchmark)[0])):
        chosen += [value] if value != default else []
    return runs_root() / recipe(options.benchmark).name / f"{'-'.join(chosen)}-seed{seed}"


def seed_of(overrides: Sequence[str], default: int) -> int:
    """The seed that overrides choose, whatever its spelling (01, 1_0, '1'); refuses what is none."""
    override = by_key(overrides).get("common.seed")
    if override is None:
        return default
    value = None if override.startswith("~") else trust.value_of(override)
    if isinstance(value, bool) or not re.fullmatch("-?[0-9]{1,18}", str(value)):
        raise UserError(f"override {override}: a run has a seed, 0 to {LARGEST_SEED}")
    if not 0 <= int(str(value)) <= LARGEST_SEED:
        raise UserError(f"common.seed={value}: must be from 0 to {LARGEST_SEED}")
    return int(str(value))


def begun(run: Path) -> bool:
    """Does the run's directory hold anything but what is there before run.json: other ranks' logs, a part of it?"""
    return run.exists() and any(path.name not in ("logs", "run.json.partial") for path in run.iterdir())


def is_finished(run: Path, overrides: List[str]) -> bool:
    """Has the run finished with these overrides? Says so, and refuses one whose checkpoints are gone."""
    finished = records.read_finished(run)
    if finished is None or finished["overrides"] != overrides:
        return False
    saved = max((each.updates for each in checkpoints.accounts(run / "checkpoints")), default=0)
    if saved < finished["updates"]:
        raise UserError(f"{run} has finished with {finished['updates']:,} updates, but its newest checkpoint is of "
                        f"{saved:,}; remove {run / 'finished.json'} to train on from that")
    print(f"{run} has finished ({finished['updates']:,} updates); nothing to do")
    return True


def started(options: Namespace, data: Path, run: Path, launcher: Optional[Launcher] = None) -> Dict[str, Any]:
    """run.json of a run that begins, or of that to go on with."""
    found = recipe(options.benchmark)
    told = own.told(found)
    facts = {"schema": records.SCHEMA, "benchmark": found.name, "arch": options.arch, "norm": options.norm,
             "placement": options.placement, "prepared_sha256": sha256(data / "prepared.json"),
             "overrides": list(by_key(options.overrides).values()), **({"recipe": told} if told else {}), "sessions": []}
    keys = {**trust.OURS, **(dict.fromkeys(PLACES, "--ranks, --nodes, --node-rank and --master") if launcher else {})}
    trust.check_places(run)
    if not begun(run):
        return facts
    merged, before = resumed(run, facts, keys, found.architectures()[0]), records.read_run(run, keys)["overrides"]
    usual = load(options.benchmark).common.seed
    seed, now = seed_of(before, usual), seed_of(merged["overrides"], usual)
    if seed != now:
        raise UserError(f"cannot go on with {run}: it was started with common.seed={seed}, not {now}")
    new = [override for override in merged["overrides"] if override not in before and STARTS.keys() & by_key([override])]
    if new and checkpoints.accounts(run / "checkpoints"):
        raise UserError(f"cannot go on with {run} and {new[0]}: it has checkpoints, and goes on from the last one as that "
                        f"is; --run-dir DIR with checkpoint.restore_file=FILE starts another run from one of them")
    return merged


def going_on(run: Path, config: Any) -> List[str]:
    """The overrides by which a run that has checkpoints goes on from the last one, however its training has started; with
    those of its start it would start again, and lose what it has done.
    """
    from omegaconf import OmegaConf

    differing = {key: usual for key, usual in STARTS.items() if OmegaConf.select(config, key) != usual}
    if not differing or not checkpoints.accounts(run / "checkpoints"):
        return []
    return [f"{key}={str(usual).lower()}" for key, usual in differing.items()]


def resumed(run: Path, wanted: Dict[str, Any], keys: Mapping[str, Optional[str]], arch: str) -> Dict[str, Any]:
    """run.json of the run to go on with, new overrides added; refuses if it was started as something else.

    keys: those that overrides, stored ones too, cannot have; arch: that of an older run, which does not say so
    """
    if not (run / "run.json").is_file():
        raise UserError(f"cannot go on with {run}: it was not made by scripts/train.sh (it has no run.json)")
    trust.check_files(run, records.WRITTEN)
    facts = records.read_run(run, keys)
    facts.setdefault("arch", arch)
    for key in ("schema", "benchmark", "arch", "norm", "placement"):
        if facts.get(key) != wanted[key]:
            raise UserError(f"cannot go on with {run}: it was started with {key} {facts.get(key)!r}, not {wanted[key]!r}")
    changed = own.differing(facts.get("recipe"), wanted.get("recipe"))
    if changed:
        raise UserError(f"cannot go on with {run}: it was started with {changed}; overrides of the command line may change "
                        f"settings, the file may not")
    if facts["prepared_sha256"] != wanted["prepared_sha256"]:
        raise UserError(f"cannot go on with {run}: the prepared data has changed since it was started")
    merged = {**by_key(facts["overrides"]), **by_key(wanted["overrides"])}
    return {**facts, "overrides": list(merged.values())}


def composed(
    options: Namespace, config: Any, facts: Dict[str, Any], data: Path, run: Path
) -> Tuple[List[str], Any, int]:
    """(overrides, configuration, number of parameters) of a run: see compose.resolved()."""
    overrides = [*compose.arch_overrides(options.benchmark, options.arch),
                 *compose.norm_overrides(config.model, options.norm, options.placement), *facts["overrides"]]
    complete, resolved, parameters = compose.resolved(options.benchmark, overrides, data / "data-bin", run / "checkpoints")
    saving = resolved.checkpoint
    if saving.save_interval_updates > 0 and saving.keep_interval_updates < 1:
        raise UserError(f"checkpoint.save_interval_updates={saving.save_interval_updates} without "
                        f"checkpoint.keep_interval_updates fills the disk; give the number to keep, 1 or more")
    return complete, resolved, parameters


def refuse_several_processes() -> None:
    """train.sh is one process; several of it, started by torchrun or srun, would train apart."""
    for starter, variable in (("torchrun", "WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(variable, "1") not in ("", "1"):
            raise UserError(f"{starter} started {os.environ[variable]} processes ({variable}), and each would train a model "
                            f"of its own; scripts/launch.sh or scripts/slurm/submit.sh starts ranks that train one")


def check_world(config: Any, overrides: Mapping[str, str], launcher: Optional[Launcher]) -> int:
    """The number of ranks: the launcher's, or one unless an override asks for more; refuses what this machine has not."""
    import torch

    if launcher is not None:
        return launcher.check_devices(config)
    world = config.distributed_training.distributed_world_size if WORLD_SIZE in overrides else 1
    on_gpu = torch.cuda.is_available() and not config.common.cpu
    if world > 1 and (not on_gpu or world > torch.cuda.device_count()):
        raise UserError(f"{WORLD_SIZE}={world}: "
                        f"{f'{torch.cuda.device_count()} GPUs are visible' if on_gpu else 'this is a CPU run'}; "
                        f"use scripts/launch.sh --ranks {world}")
    return world


