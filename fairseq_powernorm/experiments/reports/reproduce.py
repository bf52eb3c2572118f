"""Runs the rows of a table or of the figures, here or on a cluster, and writes the report."""

import argparse
import collections
import contextlib
import itertools
import os
import sys
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .. import own, trust
from ..cluster import slurm, submission
from ..directories import check_writable, in_use
from ..errors import UserError, choose, listed
from ..overrides import by_key
from ..paths import data_root, for_fairseq, go_to_root, runs_root
from ..recipes import benchmarks, is_lm
from ..runs import batch, claims, compose, watch
from ..settings import architectures, load, recipe
from . import matrix, report, workers

LONGEST_STEM = 120  # bytes of the name of a report's files, whose ends name an architecture and more
#: settings by which the rows of a table are made
VARIED = ("model.norm_groups", "model.norm_variant", "task.norm_record", "task.norm_record_interval")


def check(options: argparse.Namespace) -> None:
    """Refuses options that do not fit each other; fills in what they are by default."""
    paper, others, seeds = matrix.SUBJECTS[options.subject]
    options.benchmarks = [named(options.subject, word) for word in listed("--benchmark", options.benchmark, None, paper)]
    names = [recipe(benchmark).name for benchmark in options.benchmarks]
    if len(set(names)) < len(names):
        raise UserError(f"--benchmark {options.benchmark!r}: two of them have the name of their results in common")
    options.seeds = options.seeds or list(seeds)
    trust.check_overrides(options.overrides, trust.OURS)
    watch.check(options)
    for several in (("jobs", "slurm"), ("report_only", "slurm"), ("report_only", "dry_run"), ("gpu_ids", "jobs"),
                    ("gpu_ids", "slurm")):
        if all(getattr(options, name) for name in several):
            raise UserError(" and ".join("--" + name.replace("_", "-") for name in several) + " exclude each other")
    if options.slurm:
        submission.check_options(options)
    else:
        for name in submission.OPTIONS:
            if getattr(options, name.replace("-", "_")):
                which = f"; which GPUs of this machine: --gpu-ids {options.gpus}" if name == "gpus" else ""
                raise UserError(f"--{name} goes with --slurm only{which}")


def named(subject: str, word: str) -> str:
    """A word of --benchmark as BENCH; refuses what the table is not about."""
    paper, others, _ = matrix.SUBJECTS[subject]
    if word in (*paper, *others):
        return choose("--benchmark", word, benchmarks())  # those that have a YAML file
    if word in benchmarks() or not (own.is_path(word) or word in own.names()):
        more = ("text of your own, " + ", ".join(own.names()) if own.names() else "the name of text of your own",)
        choose("--benchmark", word, (*paper, *others, *more, "a YAML file"))
    found = own.subject("--benchmark", word)
    if subject != "figures" and is_lm(load(found)) != (subject == "table2"):
        kind, other = ("a language model", "table2") if subject == "table1" else ("translation", "table1")
        raise UserError(f"--benchmark {word!r}: {recipe(found).name} is {kind}; its table is scripts/reproduce_{other}.sh")
    for key in VARIED:
        if key in by_key(recipe(found).overrides):
            raise UserError(f"--benchmark {word!r}: {recipe(found).where} sets {key}, which tells rows of a table apart; "
                            f"leave it out, --rows chooses it")
    return found


def chosen(options: argparse.Namespace) -> List[matrix.Run]:
    """The runs that are asked for."""
    valid = {benchmark: architectures(benchmark) for benchmark in options.benchmarks}
    pairs = [(benchmark, archs[0]) for benchmark, archs in valid.items()]
    if options.archs is not None:
        archs = listed("--archs", options.archs, list(itertools.chain(*valid.values())), ())
        pairs = [(benchmark, arch) for arch in archs for benchmark in valid if arch in valid[benchmark]]
    missing = [benchmark for benchmark in valid if benchmark not in dict(pairs)]
    if missing:
        raise UserError(
            f"--archs {options.archs!r} names no architecture of {missing[0]}; valid: {', '.join(valid[missing[0]])}"
        )
    found = [run for pair in pairs for run in matrix.runs(*pair, options.seeds, options.updates, options.overrides)]
    names = dict.fromkeys(run.row_name for run in found)
    norms = listed("--norms", options.norms, matrix.NORMS, list(matrix.NORMS))
    usual = [run for run in found if run.row.norm in (norms if options.norms else matrix.PAPER_NORMS)]
    if options.subject == "figures":
        usual = [run for run in usual if run.is_pictured]
    default = dict.fromkeys(run.row_name for run in usual)
    rows = list(names) if options.rows == "all" else listed("--rows", options.rows, names, list(default))
    found = [run for run in found if run.row_name in rows and run.row.norm in norms]
    if not found:
        raise UserError(f"no row is of --norms {','.join(norms)} and of --rows {','.join(rows)}")
    return found


def reproduce(options: argparse.Namespace) -> Optional[int]:
    """Makes what the options of a command line ask for; gives the exit status."""
    check(options)
    runs = chosen(options)
    go_to_root()  # the commands' paths are relative to it
    if options.report_only:
        return finish(options, runs, {})  # from the records that there are
    for_fairseq("runs directory (PN_RUNS_ROOT)", runs_root())
    for_fairseq("data directory (PN_DATA_ROOT)", data_root())
    check_writable("--results", options.results)
    check_writable("runs directory (PN_RUNS_ROOT)", runs_root())
    if len(os.fsencode(stem(options).name)) > LONGEST_STEM:
        raise UserError(f"--benchmark {options.benchmark!r}: the report's files are called after all of these, which is too "
                        f"long a name; give fewer")
    for group in report.grouped(runs):
        check_run(options, group[0])
    if options.slurm:
        return submit(options, runs)
    if options.dry_run:
        dry_run(options, runs)
        return None
    state = workers.carry_out_all(
        runs, options.results, workers.environments(options.jobs or 1, options.gpu_ids or ()), watch.words(options)
    )
    if state.stopped:
        print("interrupted; run again to go on where it was", file=sys.stderr)
        return 128 + state.stopped
    return finish(options, runs, state.failed)


def check_run(options: argparse.Namespace, run: matrix.Run) -> None:
    """Says what an update of a run takes; refuses overrides that its configuration does not take."""
    model = load(run.subject).model
    config = compose.compose(
        run.subject,
        [
            *compose.arch_overrides(run.subject, run.arch),
            *compose.norm_overrides(model, run.row.norm, run.row.placement or "all"),
            *run.overrides,
        ],
    )
    compose.check_values(config)
    compose.check_languages(run.subject, config)
    try:
        told = batch.described(config, options.gpus if options.slurm else 1)
    except UserError as error:
        raise UserError(f"--gpus {options.gpus}: {run.benchmark}: {error}") from None
    print(f"# each run of {run.benchmark}, {run.arch}: {told}", flush=True)


def dry_run(options: argparse.Namespace, runs: Sequence[matrix.Run]) -> None:
    """Prints every command that would run, with the estimated cost of the training."""
    for benchmark in unprepared(options):
        print(f"bash scripts/prepare.sh {benchmark}")
    for run in runs:
        print(matrix.plan_line(run, options.results, watch.words(options)))
    print_cost(runs)


def unprepared(options: argparse.Namespace) -> List[str]:
    """The benchmarks whose data is not there."""
    data = dict.fromkeys(recipe(benchmark).data for benchmark in options.benchmarks)
    return [name for name in data if not (data_root() / name / "prepared.json").is_file()]


def print_cost(runs: Sequence[matrix.Run]) -> None:
    """Prints what the training of runs costs, by benchmark, and from what that is estimated."""
    total: Dict[str, float] = collections.defaultdict(float)
    assumed: Dict[str, str] = {}
    for run in runs:
        if run.gpu_hours is None:
            continue
        total[run.benchmark] += run.gpu_hours
        if run.updates is None:
            typical = matrix.TYPICAL_UPDATES[recipe(run.subject).base]
            assumed[run.benchmark] = f"{typical:,} updates of {run.benchmark} until it stops early, "
    if not total:
        print(f"# {len(runs)} runs, of an architecture without an estimate")
        return
    each = ", ".join(f"{benchmark} {matrix.hours(hours)}" for benchmark, hours in total.items())
    print(
        f"# {len(runs)} runs, about {matrix.hours(sum(total.values()))} GPU hours for training ({each}), an estimate: "
        f"{''.join(assumed.values())}{matrix.UPDATE_S} s an update, and 6 operations per parameter and token at "
        f"{matrix.OPERATIONS_PER_S / 1e12:.0f} * 10^12 a second"
    )


def submit(options: argparse.Namespace, runs: Sequence[matrix.Run]) -> Optional[int]:
    """Queues the runs that are neither done nor queued already, an evaluation of each and, behind all, the report."""
    for benchmark in options.benchmarks:
        if "," in benchmark:  # see report_command()
            raise UserError(f"--benchmark: {benchmark} has a comma in its path, which the report's job would take for the "
                            f"border between two; move it, or give the path of a link to it")
    queue: slurm.Queue = {}
    with contextlib.suppress(*((UserError,) if options.dry_run else ())):
        slurm.check_installed()
        queue = slurm.tasks()
    new: List[matrix.Run] = []
    after: List[Optional[str]] = []
    for run in runs:
        jobs, record = claims.jobs_of(run.directory, queue), run.record(options.results)
        if jobs:
            print(f"{run.key}: job {jobs[0].job} is {jobs[0].state}")
            after.append(jobs[-1].job)
        elif any(map(in_use, (run.directory, workers.row_place(run)))):
            print(f"{run.key}: another process is at work on it")
            after.append(None)
        elif workers.done(run, record):
            print(f"{matrix.relative(record)} is there already")
        elif record.is_file():
            raise UserError(
                f"{matrix.relative(record)} is there already, but {matrix.relative(run.directory)} holds no evaluation that "
                f"it comes from; move one of them away"
            )
        else:
            new.append(run)
    if not new:
        print("nothing to queue")
        return None if options.dry_run or after else finish(options, runs, {})
    queued = submission.Submission(
        options.subject,
        options,
        [
            submission.Run(
                workers.training(run, watch.words(options))[2:],
                run.evaluate_command(options.results)[2:],
                run.record(options.results),
            )
            for run in new
        ],
        lambda _: report_command(options),
        resume=True,
        after=list(filter(None, after)),
    )
    missing = unprepared(options)
    if not options.dry_run:
        queued.check()
        queued.queue(f"the report, {matrix.relative(stem(options))}.html")
        return None
    for benchmark in missing:
        print(f"bash scripts/prepare.sh {benchmark}    # before --slurm can check and queue its runs")
    if not missing:
        queued.check(dry_run=True)
    queued.show()
    print_cost(new)
    return None


def report_command(options: argparse.Namespace) -> List[str]:
    """The command that makes the report of the same runs."""
    words = ["bash", f"scripts/reproduce_{options.subject}.sh", "--report-only"]
    given = {
        "benchmark": ",".join(options.benchmarks),
        "archs": options.archs,
        "norms": options.norms,
        "rows": options.rows,
        "seeds": ",".join(map(str, options.seeds)),
        "updates": options.updates,
        "results": matrix.relative(options.results),
    }
    for name, value in given.items():
        words += [f"--{name}", str(value)] if value is not None else []
    return [*words, *options.overrides]


def stem(options: argparse.Namespace) -> Any:
    """What the files of the report are called, without their ends."""
    names = [recipe(benchmark).name for benchmark in options.benchmarks]
    return report.stem(options.subject, names, options.updates, options.results)


def finish(options: argparse.Namespace, runs: Sequence[matrix.Run], failed: Mapping[str, str]) -> int:
    """Writes the report of the records that there are; exit status 1 if a run failed or has no record."""
    problems = dict(failed)
    for run in runs:
        if not run.record(options.results).is_file():
            problems.setdefault(run.key, "no record")
    if len(problems) < len(runs):
        there = [run for run in runs if run.key not in problems]
        report.write(options.subject, stem(options), there, list(problems), options.results)
    if problems:
        print(f"{len(problems)} of {len(runs)} runs are not in the report:", file=sys.stderr)
        for name, reason in problems.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if problems else 0
