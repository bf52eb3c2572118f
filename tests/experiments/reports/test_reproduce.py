"""scripts/reproduce_*.sh: which runs they make, and that these survive kills, company and failures."""

import collections
import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import threading

import pytest
import torch
from pipelines import contents, demo, program
from toy import ROOT

README = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8") + (ROOT / "README.md").read_text(encoding="utf-8")
for module in ("fairseq", "sacrebleu", "sacremoses", "subword_nmt", "jinja2", "matplotlib"):
    pytest.importorskip(module)

from fairseq_powernorm.experiments import reproduce, settings  # noqa: E402
from fairseq_powernorm.experiments.directories import locked  # noqa: E402
from fairseq_powernorm.experiments.errors import UserError  # noqa: E402
from fairseq_powernorm.experiments.evaluate import parse as parse_evaluation  # noqa: E402
from fairseq_powernorm.experiments.files import sha256, write_json  # noqa: E402
from fairseq_powernorm.experiments.overrides import by_key  # noqa: E402
from fairseq_powernorm.experiments.paths import runs_root  # noqa: E402
from fairseq_powernorm.experiments.reports import matrix, reproduce as reproduction, schema, workers  # noqa: E402
from fairseq_powernorm.experiments.runs import compose  # noqa: E402
from fairseq_powernorm.experiments.train import parse as parse_training  # noqa: E402

SMALL = ["dataset.max_tokens=400", "generation.max_len_b=20", "generation.beam=2", "+model.encoder_layers=1",
         "+model.decoder_layers=1", "common.cpu=true"]
DEMO = ["--benchmark", "demo", "--updates", "12", "--seeds", "1", "--rows", "layer,power"]
TRANSLATION = """layer batch-reference batch-reference-all batch batch-groups0 batch-all batch-all-groups0
    power-v power-v-groups0 power-v-all
    power-v-all-groups0 power power-groups0 power-all power-all-groups0 power-algorithm2 power-algorithm2-groups0
    power-all-algorithm2 power-all-algorithm2-groups0""".split()
LM = """layer batch-reference batch batch-groups0 power-v power-v-groups0 power power-groups0 power-algorithm2
    power-algorithm2-groups0""".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Data, runs and results in a temporary directory, in this process."""
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PN_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.chdir(ROOT)
    return tmp_path


# ---- which runs ------------------------------------------------------------------------------------------------------


def of(benchmark, arch, updates=None, overrides=(), seeds=(1,)):
    return list(matrix.runs(benchmark, arch, seeds, updates, list(overrides)))


def test_rows(here):
    """Every norm, placement, layer scale and variant once; nothing that a norm or a language model does not have."""
    others = [name for name in settings.NORMS if name not in matrix.PAPER_NORMS]
    in_places = [f"{name}{place}" for name in others for place in ("", "-all")]
    assert [run.row_name for run in of("multi30k", "transformer_pn_tiny")] == TRANSLATION + in_places
    assert [run.row_name for run in of("ptb", "tensorized_lm_pn_ptb")] == LM + others
    assert set(matrix.FIGURE_ROWS) <= set(LM) and set(matrix.FIGURE_ROWS) <= set(TRANSLATION)


def test_a_row_is_what_its_name_says(here):
    """The overrides of a row, composed as train.sh composes them, give the norm, placement, variant and layer scale."""
    for run in of("demo", "transformer_pn_tiny"):
        if run.row_name not in ("layer", "batch-groups0", "power-v-all", "power-algorithm2", TRANSLATION[-1]):
            continue
        options, config = parse_training(run.train_command()[2:])
        composed = compose.compose("demo", [*compose.norm_overrides(config.model, options.norm, options.placement),
                                            *options.overrides]).model
        name = run.row_name
        norm = re.match("power-v|[a-z]+", name)[0]
        assert compose.norms_of(composed) == (norm, "all" if "-all" in name else "encoder")
        assert composed.get("norm_variant", "reference") == ("algorithm2" if "algorithm2" in name else "reference")
        assert composed.get("norm_groups") == (0 if "groups0" in name else None)


def test_prepbn_knows_its_end():
    """prepbn's way from LN to BN is as long as the run: where only early stopping ends that, the usual length."""
    for updates, expected in ((None, ["+model.norm_total_updates=100000"]), (50, [])):
        found = {run.row.norm: run.overrides for run in of("iwslt14", "transformer_pn_iwslt_de_en", updates)}
        given = {norm: [word for word in words if "total_updates" in word] for norm, words in found.items()}
        assert given.pop("prepbn") == expected and not any(given.values())


def test_names_and_overrides_of_earlier_ptb_runs(here):
    """Runs and records of Penn Treebank that were made as NORM-ARCH-UPDATES-seedS with these overrides stay valid."""
    given = ["common.cpu=true", "optimization.lr=[0.001]"]
    earlier = ["common.seed=1", "optimization.max_update=500", "lr_scheduler.warmup_updates=50", *given]
    for arch in settings.architectures("ptb"):
        runs = {run.row_name: run for run in of("ptb", arch, 500, given)}
        for norm in ("layer", "batch", "power-v", "power"):
            assert runs[norm].directory == runs_root() / "ptb" / f"{norm}-{arch}-500-seed1"
            same = matrix.identity(runs[norm].overrides, runs[norm]) == matrix.identity(earlier, runs[norm])
            # the norm after the stack, which the tensorized model does not have, warmed up as long as the layers' then
            assert same == (norm != "power" or arch == "tensorized_lm_pn_ptb")


def test_updates_scale_the_schedule(here):
    """--updates N: all that is counted in updates shrinks in proportion, the architecture's file too; N = all: none."""
    overrides = by_key(of("wikitext103", "transformer_lm_pn_wiki103", 2860)[0].overrides)
    assert overrides["model.norm_final_warmup_updates"].endswith("=10")
    assert overrides["lr_scheduler.warmup_updates"].endswith("=160")
    assert overrides["lr_scheduler.lr_period_updates"].endswith("=2700")
    assert overrides["checkpoint.save_interval_updates"].endswith("=20")
    run = of("demo", "transformer_pn_tiny", 12, ["lr_scheduler.warmup_updates=7"])[0]
    assert "checkpoint.save_interval_updates=1" in run.overrides and "lr_scheduler.warmup_updates=7" in run.overrides
    assert sum("lr_scheduler.warmup" in override for override in run.overrides) == 1
    assert of("demo", "transformer_pn_tiny", 800)[0].overrides == ("common.seed=1",)


def test_runs_that_early_stopping_ends(here):
    """Without a limit of updates a run is named for it, has no limit and is estimated by the typical length, in proportion
    to which --updates shortens everything; N = the typical length sets the limit and changes nothing else."""
    for benchmark, arch in (("iwslt14", "transformer_pn_iwslt_de_en"), ("wmt14", "transformer_pn_wmt_en_de_big")):
        run, typical = of(benchmark, arch)[0], matrix.TYPICAL_UPDATES[benchmark]
        assert run.name == "layer-early-stop-seed1" and run.overrides == ("common.seed=1",) and run.average is None
        limited = of(benchmark, arch, typical)[0]
        assert limited.name == f"layer-{typical}-seed1" and limited.gpu_hours == run.gpu_hours
        warm_up = by_key(of(benchmark, arch, typical // 10)[0].overrides)
        assert warm_up["lr_scheduler.warmup_updates"].endswith("=800")
        assert warm_up["model.norm_final_warmup_updates"].endswith("=100")
        assert warm_up["optimization.max_update"] == f"optimization.max_update={typical // 10}"


def test_shorter_runs_average_fewer_epochs(here):
    """10 epochs of 8,000 updates are 5 of 4,000 and 1 of 605; checkpoints after updates come faster instead."""
    def command(benchmark, arch, updates):
        return " ".join(of(benchmark, arch, updates)[0].evaluate_command(here))

    for updates, number in ((605, 1), (4000, 5), (8000, 10), (16000, 10)):
        assert f"--average {number} --available" in command("multi30k", "transformer_pn_tiny", updates)
    assert "--average" not in command("multi30k", "transformer_pn_tiny", None)
    assert "--average" not in command("ptb", "tensorized_lm_pn_ptb", 500)
    kept = settings.load("demo").checkpoint.keep_interval_updates
    assert f"--average {kept} --available" in command("demo", "transformer_pn_tiny", 40)


def test_tokens_of_the_estimates(here):
    """The estimate counts the tokens of an update that the YAML file states, or an override."""
    run = of("wikitext103", "transformer_lm_pn_wiki103")[0]
    assert run.tokens == 3072 * 24
    assert run.gpu_hours == pytest.approx(286000 * (0.05 + 6 * 247e6 * 3072 * 24 / 20e12) / 3600)
    assert of("wmt14", "transformer_pn_wmt_en_de_big")[0].tokens == 128 * 4096
    assert of("wmt14", "transformer_pn_wmt_en_de_big", None, ["optimization.update_freq=[16]"])[0].tokens == 16 * 4096


def test_parameters_of_the_estimates(here):
    """The numbers of parameters behind the estimates are those of the models, to 5 %."""
    record = json.loads((ROOT / "results" / "multi30k" / "layer-8000-seed1.json").read_text())
    assert record["parameters"] == pytest.approx(matrix.PARAMETERS["transformer_pn_tiny"], rel=0.05)
    data = here / "data-bin"
    data.mkdir()
    for name in ("dict.txt", "dict.de.txt", "dict.en.txt"):
        (data / name).write_text("".join(f"w{i} 1\n" for i in range(10000)))
    for split in ("train", "valid"):
        (data / f"{split}.bin").touch()
    for benchmark, arch in [("ptb", arch) for arch in settings.architectures("ptb")] + [
            (name, "transformer_pn_iwslt_de_en") for name in settings.benchmarks() if name == "iwslt14"]:
        with torch.device("meta"):  # no memory for them
            _, _, parameters = compose.resolved(benchmark, compose.arch_overrides(benchmark, arch), data, here)
        assert parameters == pytest.approx(matrix.PARAMETERS[arch], rel=0.05), arch


@pytest.mark.slow
@pytest.mark.parametrize("subject", matrix.SUBJECTS)
def test_dry_run_of_the_whole(subject, here, capsys):
    """--dry-run of a whole table says what an update of each model takes, and prints each command, which the scripts take,
    with its GPU hours, and their sum."""
    wanted = matrix.SUBJECTS[subject][0]
    there = [name for name in wanted if name in settings.benchmarks()] or ["demo"]
    reproduce.command([subject, "--dry-run", "--benchmark", ",".join(there)])
    lines = capsys.readouterr().out.splitlines()
    updates, lines = lines[: len(there)], lines[len(there) :]
    for name, line in zip(there, updates):
        assert re.match(rf"# each run of {name}, \w+: an update takes [\dx ]+ = [\d,]+ (tokens|blocks)", line), line
    assert lines[: len(there)] == [f"bash scripts/prepare.sh {name}" for name in there]
    hours = []
    for first, second in zip(lines[len(there) : -1 : 2], lines[len(there) + 1 : -1 : 2]):
        command, hint = first.split("    # about ")
        hours.append(float(hint.replace(" GPU hours", "").replace(",", "")))
        if "-seed1 " not in command:
            continue  # the same but for the seed
        options, _ = parse_training(shlex.split(command)[2:])
        evaluation = parse_evaluation(shlex.split(second)[2:])
        assert (evaluation.benchmark, evaluation.run_dir) == (None, options.run_dir)
        assert evaluation.record == f"results/{options.benchmark}/{pathlib.Path(options.run_dir).name}.json"
    rows = {"table1": len(TRANSLATION) * 3, "table2": len(LM) * 3, "figures": 5}[subject]
    assert len(hours) == rows * len(there) and min(hours) > 0
    total = float(re.match(rf"# {len(hours)} runs, about ([\d.,]+) GPU hours", lines[-1])[1].replace(",", ""))
    assert total == pytest.approx(sum(hours), rel=0.05)
    assert ("100,000 updates of iwslt14 until it stops early" in lines[-1]) == ("iwslt14" in there)
    assert not list(here.iterdir()), "nothing was made"


@pytest.mark.slow
@pytest.mark.parametrize("line", [  # that of one's own text is tested with such text
    line for line in re.findall(r"^bash scripts/(reproduce_.*?) *(?:#.*)?$", README, re.M) if " talks " not in line])
def test_the_lines_of_the_readme(line, here, capsys):
    """Each of them names runs."""
    subject, *arguments = line.replace("reproduce_", "").replace(".sh", "").split()
    reproduce.command([subject, *arguments, "--dry-run"])
    assert " runs, about " in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["table1", "--benchmark", "dmeo"], "--benchmark 'dmeo' is unknown; valid: "),
    (["table1", "--benchmark", "ptb"], "--benchmark 'ptb' is unknown; valid: iwslt14, wmt14, multi30k, demo"),
    (["table1", "--benchmark", "demo,demo"], "names something twice"),
    (["table1", "--benchmark", "demo", "--norms", "powr"],
     "--norms 'powr' is unknown; valid: layer, batch:variant=reference, batch, power-v"),
    (["table1", "--benchmark", "demo", "--rows", "layer-groups0"], "--rows 'layer-groups0' is unknown; valid: layer,"),
    (["table1", "--benchmark", "demo", "--rows", "power", "--norms", "layer"],
     "no row is of --norms layer and of --rows power"),
    (["table1", "--benchmark", "demo", "--seeds", "1,x"], "--seeds 'x': must be a number, 0 to 4294967295"),
    (["table1", "--benchmark", "demo", "--seeds", "1,1"], "--seeds '1,1' names something twice"),
    (["table1", "--benchmark", "demo", "--updates", "9"], "--updates '9': must be a number, 10 to 1000000000"),
    (["table1", "--benchmark", "demo", "--updates", "many"], "--updates 'many': must be a number"),
    (["table1", "--benchmark", "demo", "--jobs", "0"], "--jobs '0': must be a number, 1 or more"),
    (["table1", "--benchmark", "demo", "--jobs", "2", "--gpu-ids", "0"], "--gpu-ids and --jobs exclude each other"),
    (["table1", "--benchmark", "demo", "--jobs", "9" * 5000], "must be a number, 1 or more"),
    (["table1", "--benchmark", "demo", "--jobs", "100000"], "--jobs 100000: this machine has "),
    (["table1", "--benchmark", "demo", "--gpu-ids", "\u00b2"], "--gpu-ids '\u00b2': this machine has "),
    (["table1", "--benchmark", "demo", "--gpu-ids", "99"], "--gpu-ids '99': this machine has "),
    (["table1", "--benchmark", "demo", "--gpus", "2"], "--gpus goes with --slurm only; which GPUs"),
    (["table1", "--gpus", "0,1,2,3"], "--gpus '0,1,2,3': must be a number, 1 to 65535; which GPUs of"),
    (["table1", "--benchmark", "demo", "--slurm", "--jobs", "2"], "--jobs and --slurm exclude each other"),
    (["table1", "--benchmark", "demo", "--slurm", "--report-only"], "--report-only and --slurm exclude each other"),
    (["table1", "--benchmark", "demo", "--report-only", "--dry-run"], "--report-only and --dry-run exclude each other"),
    (["table1", "--benchmark", "demo", "--time", "60"], "--time goes with --slurm only"),
    (["table1", "--benchmark", "demo", "--slurm", "--gpus", "0,1"], "--gpus '0,1': must be a number, 1 to 65535"),
    (["table1", "--benchmark", "demo", "--slurm", "--gpus", "3", "--nodes", "2"], "--gpus 3 cannot be divided among"),
    (["table1", "--benchmark", "demo", "--slurm", "--gpus", "2", "--dry-run"],
     "--gpus 2: demo: 2 ranks cannot share out optimization.update_freq=[1]"),
    (["table1", "--benchmark", "demo", "fast"], "'fast' is no hydra override"),
    (["table1", "--benchmark", "demo", "common.seed=2"], "override common.seed is this command's own; use --seeds"),
    (["table1", "--benchmark", "demo", "+model.norm_groups=2"],
     "override model.norm_groups is this command's own; use --rows"),
    (["table1", "--benchmark", "demo", "optimization.max_updtae=3"], "optimization.max_updtae"),
    *((["table1", "--benchmark", "demo", f"dataset.max_tokens={value}"], message) for value, message in (
        ("x", "how large a batch is"), ("null", "how large a batch is"), ("${no.thing}", "how large a batch is"),
        ("-3", "dataset.max_tokens=-3: must be from 1"), ("9" * 400, "must be from 1"))),
    (["table1", "--benchmark", "demo", "optimization.update_freq=[[1]]"], "must be a list of numbers, 1 or more"),
    (["table1", "--benchmark", "demo", "task.target_lang=fr"], "task.target_lang=fr: that of the data demo is en"),
    (["table1", "--benchmark", "demo", "checkpoint.no_save=1"], "a run is what its checkpoints are"),
    (["table1", "--benchmark", "demo", "--seeds", "1,01"], "--seeds '1,01' names something twice"),
    (["table1", "--benchmark", "demo", "--results", "/dev/null/x"], "--results /dev/null/x: /dev/null is not a directory"),
    (["table1", "--benchmark", "demo", "--results", "/proc/x"], "--results /proc/x cannot be written"),
    (["table1", "--benchmark", "demo", "--results", "/tmp/" + "x" * 300], "cannot be written"),
    (["table1", "--benchmark", "demo", "--archs", "lstm"], "--archs 'lstm' is unknown; valid: transformer_pn_tiny"),
    (["table2", "--archs", "tensorized_lm_pn_ptb"],
     "--archs 'tensorized_lm_pn_ptb' names no architecture of wikitext103"),
])
def test_wrong_options(arguments, message, here):
    """Wrong options are refused with what is valid, before anything is prepared or made."""
    with pytest.raises(UserError) as error:
        reproduce.command(arguments)
    assert message in str(error.value)
    assert not list(here.iterdir())


def test_relative_paths(here, monkeypatch, capsys):
    """A relative path, of an option or in the environment, is one from where the user is, as for every other script."""
    (here / "at" / "place").mkdir(parents=True)
    (here / "at" / "site.sh").write_text("PN_GRES=\n")
    monkeypatch.chdir(here / "at" / "place")
    for name, value in (("PN_RUNS_ROOT", "../runs"), ("PN_DATA_ROOT", "../data"), ("PN_SLURM_SITE", "../other.sh")):
        monkeypatch.setenv(name, value)
    options = reproduce.parse(["table1", *DEMO, "--slurm", "--site", "../site.sh", "--log-dir", "logs", "--results", "out"])
    assert (options.site, options.log_dir) == (str(here / "at" / "site.sh"), str(here / "at" / "place" / "logs"))
    reproduce.command(["table1", *DEMO, *SMALL, "--dry-run", "--results", "out"])
    shown = capsys.readouterr().out
    assert f"--run-dir {here}/at/runs/demo/power-12-seed1 " in shown
    assert f"--record {here}/at/place/out/demo/power-12-seed1.json" in shown
    with pytest.raises(UserError, match=f"site file {here}/at/other.sh does not exist"):
        monkeypatch.chdir(here / "at" / "place")
        reproduce.command(["table1", *DEMO, *SMALL, "--dry-run", "--slurm"])


def test_batches_of_sentences(here):
    """A batch of so many sentences is estimated, too."""
    (run, *_) = of("demo", "transformer_pn_tiny", 40, ["dataset.max_tokens=null", "+dataset.batch_size=8"])
    assert run.tokens == 8 * matrix.SENTENCE


def test_a_comma_in_a_files_path(here, monkeypatch):
    """The report's job would take it for the border between two files."""
    monkeypatch.setattr(reproduction, "recipe", lambda word: settings.recipe("demo"))
    options = reproduce.parse(["table1", "--slurm"])
    options.benchmarks = ["/a,b/my.yaml"]
    with pytest.raises(UserError, match="/a,b/my.yaml has a comma in its path"):
        reproduction.submit(options, [])


def test_interrupted_while_another_prepares(here):
    """What waits for another process's preparation of the data ends when it is told to."""
    state = workers.State(collections.deque(), 0, here)
    with locked(here / "data" / "demo"):
        timer = threading.Timer(0.2, setattr, (state, "stopped", signal.SIGTERM))
        timer.start()
        workers.prepare(state, {"demo"})
    assert state.stopped and not state.failed and not (here / "data" / "demo").exists()


def test_output_that_nobody_takes_any_more(here, monkeypatch):
    """A run whose output cannot be shown is ended, not left at work beside the next one."""
    state = workers.State(collections.deque(), 1, here)
    started = []

    def say(line):
        started.extend(state.processes)
        if started:
            raise BrokenPipeError

    monkeypatch.setattr(state.progress, "say", say)
    with pytest.raises(BrokenPipeError):
        workers.call(state, ["bash", "-c", "echo; exec sleep 60"], dict(os.environ))
    assert started[0].returncode == -signal.SIGTERM and not state.processes


def test_places_that_fairseq_cannot_be_given(here, monkeypatch):
    """Runs and data in a directory with a colon, which fairseq reads as a border between paths, are refused at once."""
    for name in ("PN_RUNS_ROOT", "PN_DATA_ROOT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, str(here / "a:b"))
            with pytest.raises(UserError, match=rf"\({name}\) '.*a:b': fairseq reads ':' as the border"):
                reproduce.command(["table1", *DEMO])
    assert not list(here.iterdir())


def test_jobs_have_a_thread_each(here, monkeypatch):
    """--jobs N sets OMP_NUM_THREADS=1 for N > 1 unless it is set; a run sees one GPU at most."""
    monkeypatch.setattr(workers, "cpus", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")

    def threads(*arguments):
        options = reproduce.parse(["table1", "--benchmark", "demo", *arguments])
        found = workers.environments(options.jobs or 1, [])
        assert {each["CUDA_VISIBLE_DEVICES"] for each in found} == {"2"}
        return [each.get("OMP_NUM_THREADS") for each in found]

    assert threads("--jobs", "3") == ["1"] * 3 and threads() == [None]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads("--jobs", "2") == ["2"] * 2


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_going_on_with_a_run(here, monkeypatch):
    """A run that was killed is gone on with as it was begun; a run with other settings is refused."""
    run = next(run for run in of("demo", "transformer_pn_tiny", 12, SMALL) if run.row_name == "power")
    commands = []
    monkeypatch.setattr(workers, "call", lambda state, command, *_: commands.append(command))
    run.directory.mkdir(parents=True)
    facts = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "prepared_sha256": "0",
             "sessions": []}
    write_json(run.directory / "run.json", {**facts, "overrides": list(run.overrides)})
    state = workers.State(None, 1, here / "results")
    assert workers.carry_out(state, run, {}) is None
    assert [command[1] for command in commands] == ["scripts/train.sh", "scripts/evaluate.sh"]
    assert commands[0][-1] == "--resume", "with the overrides that it was begun with"
    write_json(run.directory / "run.json", {**facts, "overrides": [*run.overrides, "optimization.lr=[0.1]"]})
    with pytest.raises(UserError, match=r"with other overrides \(optimization.lr=\[0.1\], asked for none"):
        workers.carry_out(state, run, {})


def test_a_run_on_other_data(here):
    """A run that is done is not compared with those that would be trained on data that were prepared otherwise since."""
    run = next(run for run in of("demo", "transformer_pn_tiny", 12, SMALL) if run.row_name == "power")
    record = json.loads((ROOT / "results" / "multi30k" / "power-8000-seed1.json").read_text())
    (here / "data" / "demo").mkdir(parents=True)
    (here / "data" / "demo" / "prepared.json").write_text("{}")
    facts = {"schema": 1, "benchmark": "demo", "norm": "power", "placement": "encoder", "sessions": [],
             "overrides": list(run.overrides), "prepared_sha256": sha256(here / "data" / "demo" / "prepared.json")}
    for path in (run.directory / "evaluation" / "record.json", run.record(here / "results")):
        path.parent.mkdir(parents=True)
        write_json(path, {**record, "overrides": list(run.overrides)})
    write_json(run.directory / "run.json", facts)
    assert workers.done(run, run.record(here / "results"))
    write_json(run.directory / "run.json", {**facts, "prepared_sha256": "0"})
    with pytest.raises(UserError, match="was trained on other data than .*/data/demo holds now"):
        workers.done(run, run.record(here / "results"))


@pytest.mark.slow
def test_a_row_that_another_process_has(here, monkeypatch):
    """A row whose lock or whose training's lock is held is left for the others first, and taken when it is free."""
    import fcntl

    taken, free = (run for run in of("demo", "transformer_pn_tiny", 12) if run.row_name in ("layer", "power"))
    with locked(taken.directory), workers.row_lock(taken) as lock:
        assert lock is None
    done = []
    with open(taken.directory.with_name(f".{taken.name}.row.lock"), "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)

        def carry_out(_, run, *__):
            done.append(run)
            fcntl.flock(stream, fcntl.LOCK_UN)

        monkeypatch.setattr(workers, "carry_out", carry_out)
        monkeypatch.setattr(workers, "WAIT_S", 0.01)
        state = workers.State(collections.deque([taken, free]), 2, here)
        workers.work(state, {}, several=False)
    assert done == [free, taken] and not state.failed


# ---- clusters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(reproduced, tmp_path, monkeypatch):
    """Stand-ins of SLURM's clients; calls() gives what they were called with, $QUEUE is what squeue prints."""
    for name, text in (("squeue", 'printf "%b" "${QUEUE:-}"'), *(
            (name, f'echo "{name} $*" >>{tmp_path}/calls; [[ $* != *--parsable* ]] || echo 77')
            for name in ("sbatch", "scontrol", "scancel"))):
        program(tmp_path / "bin", name, text)
    for name, value in (("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"),
                        ("PN_SLURM_SITE", str(ROOT / "scripts" / "slurm" / "site.example.sh"))):
        monkeypatch.setitem(reproduced.environment, name, value)

    def calls():
        path = tmp_path / "calls"
        found = [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return [call for call in found if "--test-only" not in call]

    return calls


def lines(path):
    return [shlex.split(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_slurm(reproduced, cluster, tmp_path, monkeypatch):
    """--slurm queues each run that has neither record nor job: its training, behind it an evaluation with the options
    of the matrix, behind all the report, which waits for the jobs of others, too. Again: nothing is queued."""
    def queue(*words, seeds="1,2"):
        return again(reproduced, "--slurm", "--seeds", seeds, "--time", "60", *words, runs=reproduced.runs)

    before = contents(reproduced.runs)
    status, output, _ = queue("--dry-run")
    assert status is None and not cluster() and contents(reproduced.runs) == before
    assert "# ---- scripts/slurm/train.sbatch" in output and "# 2 runs, about" in output

    status, output, _ = queue()
    assert status is None and output.count(" is there already") == 2
    training, evaluation, report, release = cluster()
    assert {"--array=0-1", "--time=60", "--hold"} <= set(training) and release == ["scontrol", "release", "77"]
    assert {"--array=0-1", "--dependency=aftercorr:77"} <= set(evaluation)
    assert "--dependency=afterany:77" in report
    (submission,) = (reproduced.runs / "slurm").iterdir()
    wanted = {run.name: run for run in of("demo", "transformer_pn_tiny", 12, SMALL, [2])}
    tasks, evaluations = lines(submission / "tasks"), lines(submission / "evaluations")
    for name, task, words in zip(("layer", "power"), tasks, evaluations):
        run = wanted[f"{name}-12-seed2"]
        assert task == [word if word != matrix.relative(run.directory) else str(reproduced.runs / "demo" / run.name)
                        for word in run.train_command()[2:]]
        evaluated = parse_evaluation(words)
        assert evaluated.available and evaluated.run_dir == task[task.index("--run-dir") + 1]
        assert evaluated.record == str(reproduced.results / "demo" / f"{run.name}.json")
    (command,) = lines(submission / "report")
    assert command[:2] == ["bash", "scripts/reproduce_table1.sh"]
    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "finish", lambda options, runs, *_: [run.name for run in runs])
        assert reproduce.command(["table1", *command[2:]]) == [
            f"{name}-12-seed{seed}" for seed in (1, 2) for name in ("layer", "power")]

    jobs = (("", 0, 77), ("-evaluation", 0, 78), ("-evaluation", 1, 78))
    monkeypatch.setitem(reproduced.environment, "QUEUE", "".join(
        f"{task}|{job}_{task}|PENDING|Dependency|{submission.name}{kind}\n" for kind, task, job in jobs))
    status, output, _ = queue()
    assert status is None and not cluster() and "nothing to queue" in output
    assert "layer-12-seed2: job 77_0 is PENDING" in output and "power-12-seed2: job 78_1 is PENDING" in output
    status, _, errors = again(reproduced, "--seeds", "2")
    assert status == 1 and errors.count("layer-12-seed2: job 77_0 is PENDING") == 1, "nor is it trained here"
    queue(seeds="2,3")
    assert "--dependency=afterany:77:78_0:78_1" in cluster()[2], "the report waits for the earlier submission, too"
    shutil.rmtree(reproduced.runs / "slurm")
    for claim in (reproduced.runs / "demo").glob(".*.job"):
        claim.unlink()


@pytest.mark.slow
def test_slurm_refuses(reproduced, cluster, tmp_path, monkeypatch):
    """Before anything is queued: data that is not prepared, a record of another run, other settings, no site file."""
    def refused(*words, runs=reproduced.runs):
        with pytest.raises(UserError) as error:
            again(reproduced, "--slurm", *words, runs=runs)
        assert not cluster() and not (runs / "slurm").exists()
        return str(error.value)

    assert "with other overrides" in refused("optimization.lr=[0.1]")
    (tmp_path / "demo" / "layer-12-seed1").mkdir(parents=True)
    assert "holds no evaluation that it comes from" in refused(runs=tmp_path)
    assert "site file /none does not exist" in refused("--site", "/none", "--seeds", "2")
    monkeypatch.setitem(reproduced.environment, "PN_DATA_ROOT", str(tmp_path / "none"))
    assert "is not prepared; run: scripts/prepare.sh demo" in refused("--seeds", "2")


# ---- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """Two rows on the demo: killed without warning while the first trains, then gone on with."""
    scripts = demo(tmp_path_factory, "reproduce")
    scripts.results = scripts.data.parent / "results"
    scripts.arguments = [*DEMO, "--results", str(scripts.results), *SMALL]
    first = scripts.start("reproduce_table1", *scripts.arguments)
    for line in first.stdout:
        if "after 4 updates" in line:
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)  # returns when no child holds the pipe any more
    status, scripts.output, errors = again(scripts)
    assert status == 0, scripts.output + errors
    return scripts


def again(scripts, *overrides, runs=None):
    """reproduce_table1.sh in this process, where fairseq is at hand: (exit status, output, errors)."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output, \
            contextlib.redirect_stderr(io.StringIO()) as errors:
        for name, value in {**scripts.environment, "PN_RUNS_ROOT": str(runs or scripts.runs)}.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        arguments = list(scripts.arguments)
        if "--seeds" in overrides:  # each option is given once
            place = arguments.index("--seeds")
            del arguments[place : place + 2]
        status = reproduce.command(["table1", *arguments, *overrides])
    return status, output.getvalue(), errors.getvalue()


@pytest.mark.slow
def test_killed(reproduced):
    """Killed and run again: the row that was training is gone on with, and no row is lost or made twice."""
    sessions = {name: json.loads((reproduced.runs / "demo" / f"{name}-12-seed1" / "run.json").read_text())["sessions"]
                for name in ("layer", "power")}
    assert [each["exit_status"] for each in sessions["layer"]] == [None, 0]
    assert [each["exit_status"] for each in sessions["power"]] == [0]
    assert "Loaded checkpoint" in (reproduced.runs / "demo" / "layer-12-seed1" / "train.log").read_text()
    for name in ("layer", "power"):
        record = json.loads((reproduced.results / "demo" / f"{name}-12-seed1.json").read_text())
        assert not schema.problems(record, schema.TRANSLATION)
        assert (record["updates"], record["config"]["lr_scheduler"]["warmup_updates"], record["averaged"]) == (12, 3, 5)
    assert reproduced.output.count("| 12 |") == 2 and "report: " in reproduced.output


@pytest.mark.slow
def test_report_of_real_runs(reproduced):
    """The report has its table, six figures and their data, significance, and no path of this machine."""
    stem = "table1-demo-12"
    figures = [f"{stem}.demo-transformer_pn_tiny.figure{i}.png" for i in range(1, 7)]
    assert sorted(path.name for path in reproduced.results.glob("*.*")) == sorted([
        *figures, *(f"{stem}.{end}" for end in ("csv", "figures.json", "html", "md", "significance.json"))])
    for name in ("figures", "significance"):
        content = schema.check(json.loads((reproduced.results / f"{stem}.{name}.json").read_text()), name)
        assert content["kind"] == name
    data = json.loads((reproduced.results / f"{stem}.figures.json").read_text())
    assert set(data["singular_values"]) == {"demo/layer-12-seed1", "demo/power-12-seed1"}
    statistics = data["statistics"]["demo/power-12-seed1"]
    assert statistics["updates"] == list(range(1, 13))
    assert set(statistics["quantities"]) == {
        "distance_psi2", "gradient_nu", "discrepancy_std", "gradient_ratio", "gradient_smaller", "nu_largest"}
    for path in reproduced.results.rglob("*.*"):
        if path.suffix != ".png":
            assert str(reproduced.runs.parent) not in path.read_text() and str(ROOT) not in path.read_text(), path
    assert (reproduced.results / f"{stem}.html").read_text().count("data:image/png") == 6


@pytest.mark.slow
def test_again_without_runs_and_with_other_settings(reproduced, tmp_path):
    """Again: nothing to do, and the same bytes; without the run directories the records are taken as done and the
    report is made of them and of its own data; with other settings both rows are refused, and nothing is changed."""
    def left():
        return {name: digest for directory in (reproduced.runs, reproduced.results)
                for name, digest in contents(directory).items() if not name.endswith(".lock")}

    before = left()
    for runs in (reproduced.runs, tmp_path):
        status, output, _ = again(reproduced, runs=runs)
        assert status == 0 and output.count("is there already; nothing to do") == 2 and left() == before
    status, _, errors = again(reproduced, "optimization.lr=[0.1]")
    assert status == 1 and left() == before
    assert "2 of 2 runs are not in the report" in errors and errors.count("asked for optimization.lr=[0.1])") >= 2


@pytest.mark.slow
def test_a_row_that_fails(reproduced):
    """A row that fails does not stop the others; it is named with its reason, and the exit status is 1."""
    record = reproduced.results / "demo" / "layer-12-seed1.json"
    content = record.read_text()
    try:
        record.write_text(content.replace('"schema": 2', '"schema": 3', 1))
        status, output, errors = again(reproduced)
    finally:
        record.write_text(content)
    assert status == 1 and "1 of 2 runs are not in the report" in errors and "schema is 3; valid: 2" in errors
    assert "| power | encoder |" in output and "| layer |" not in output


def test_records_that_stay_valid(here):
    """The reproduce scripts take each record in results/ as done but those that results/README.md says would be made
    otherwise today, which they refuse."""
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    section = "".join(re.findall(r"^## Records that today's .*\n((?:(?!## ).*\n)*)", text, re.M))
    otherwise = {path.stem for pattern in re.findall(r"`((?:multi30k|ptb)/[^`]+)`", section)
                 for path in (ROOT / "results").glob(f"{pattern}.json")}
    refused, tried = set(), set()
    for benchmark, archs, updates, overrides in (
            ("multi30k", ["transformer_pn_tiny"], None, ["common.cpu=true"]),
            ("multi30k", ["transformer_pn_tiny"], 605, ["common.cpu=true"]),
            ("ptb", settings.architectures("ptb"), 500, ["common.cpu=true", "optimization.lr=[0.001]"])):
        for run in (run for arch in archs for run in of(benchmark, arch, updates, overrides, (1, 2, 3))):
            record = run.record(ROOT / "results")
            if record.is_file():
                tried.add(run.name)
                try:
                    assert workers.done(run, record)
                except UserError:
                    refused.add(run.name)
    assert len(tried) >= 37 and refused == otherwise & tried
