"""scripts/benchmark.py: what it compares with is what it says, and its verdicts follow from its numbers."""
import shutil
import subprocess
import time

import pytest
import torch
import toy

from fairseq_powernorm.experiments.benchmark import cells, measure, models, report, timing
from fairseq_powernorm.experiments.benchmark.authors_norm import AuthorsPowerNorm
from fairseq_powernorm.experiments.benchmark.options import parse
from fairseq_powernorm.experiments.benchmark.targets import checks
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.files import read_json
from fairseq_powernorm.experiments.reports import schema, speed
from fairseq_powernorm.norms import PowerNorm


@pytest.mark.parametrize("groups", [1, 4])
def test_the_authors_way_computes_the_same(groups):
    """The layer timed as theirs gives the outputs, gradients and statistics of PowerNorm(variant="reference")."""
    theirs, ours = AuthorsPowerNorm(8, groups=groups).double(), PowerNorm(8, groups=groups, warmup_updates=0).double()
    mask = torch.arange(5).unsqueeze(0) >= torch.tensor([5, 3, 1]).unsqueeze(1)
    for step in range(3):
        x = torch.randn(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        found = []
        for norm in (theirs, ours):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            y = norm(leaf, mask)
            y.pow(3).sum().backward()
            found.append([y, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_phi.view(-1), norm.ema_gz.view(-1)])
        for one, other in zip(*found):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_the_command_measures_every_level(tmp_path, monkeypatch, capsys):
    """--fast goes through all levels and contenders, one from outside among them, and prints a row for each; interrupted,
    the same command goes on, and writes a record, a table and two pictures.
    """
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(timing, "keep_memory", lambda: None)  # the tests' own process stays as it is
    words = ["--fast", "--threads", "1", "--shapes", "8x64", "--extra", "torch.nn:RMSNorm", "--name", "here"]
    kept = tmp_path / "results" / "benchmark"
    generation = cells.generation

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "generation", interrupted)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            measure.benchmark(words)
        assert not (kept / "here").exists()
        monkeypatch.setattr(cells, "generation", generation)
        for level in ("accuracy", "layer"):  # known already
            monkeypatch.setattr(cells, level, interrupted)
        assert measure.benchmark(words) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {(row[0].strip("| "), row[7]) for row in rows if len(row) > 12}
    assert {("layer", name) for name in ("layer", "rms", "batch", "power-g4", "power-v-g4", "power-torch-g4", "authors-g4",
                                         "torch.nn:RMSNorm")} <= found
    assert {("8 x 64", name, memory) for name in ("float32", "bfloat16") for memory in ("default", "recycled")} <= {
        (row[2], row[3], row[5]) for row in rows if len(row) > 12}
    assert {("512 x 64", name, "power-g4") for name in ("float32", "bfloat16")} <= {
        (row[0].strip("| "), row[1], row[3]) for row in rows}  # accuracy
    for level in ("step", "generation"):
        assert {(level, name) for name in ("layer", "power")} <= found
    assert sorted(each.name for each in (kept / "here").iterdir()) == [
        "evaluation.png", "record.json", "table.md", "training.png"]
    record = schema.check(read_json(kept / "here" / "record.json"), "record.json")
    step = next(cell for cell in record["cells"] if cell["level"] == "step")
    assert step["contenders"]["power"]["statistics"] > 0 and step["contenders"]["layer"]["ratio"] == 1.0
    assert not list(kept.glob("*.json")) and not list(kept.glob(".*.json"))


def test_a_readme_says_what_was_measured():
    """A line for each norm, pass and dtype with medians and ranges by number of rows, and one for each whole model."""
    some = [cell(rows=rows, layer=1.0, power_g4=ratio, memory=memory) for rows, ratio, memory in
            ((1, 1.5, "default"), (1, 1.1, "recycled"), (4096, 0.7, "recycled"))]
    step = cell(level="step", rows=4096, layer=1.0, power=1.005)
    step["contenders"]["power"].update(ratio_quartiles=[1.0, 1.01], statistics=0.0042)
    record = {"processor": "a processor", "cores": 2, "versions": {"torch": "2"}, "memory": "default,recycled",
              "cells": [*some, step]}
    text = speed.summary(record, speed.RESULTS / "benchmark" / "none").splitlines()
    assert "| norm | pass, dtype | 1 row | 4,096 rows |" in text
    assert "| power-g4 | train, float32 | 1.30 (1.10 - 1.50) | 0.70 |" in text
    assert text[-1] == ("- A training step of 4,096 tokens takes 1.005 of LayerNorm's time with PN (quartiles 1.000 to "
                        "1.010); the running statistics of all its norms take 0.42 % of it.")
    record["cells"].append({**step, "threads": 2})
    for line, said in zip(speed.whole_models(record), ("1 thread", "2 threads")):
        assert f"tokens on {said} takes" in line
    assert report.curve(record, "train", "power", "float32") == {1: 1.1, 4096: 0.7}  # with memory as in a long training


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shapes", "12"], "must be ROWSxCHANNELS"),
        (["--shapes", "\u00b2x512"], "must be ROWSxCHANNELS"),
        (["--shapes", "9" * 5000 + "x512"], "must be ROWSxCHANNELS"),
        (["--shapes", "8x64,8x64"], "names something twice"),
        (["--threads", "9" * 30], "must be a number, 1 to 65536"),
        (["--groups", "4,3"], "--groups 3: must divide the channels of a shape, 512"),
        (["--levels", "all"], "'all' is unknown; valid: accuracy, layer, encoder, step, generation"),
        (["--device", "gpu"], "--device 'gpu' is unknown; valid: cpu, cuda"),
        (["--threads", "0"], "--threads '0': must be a number, 1 to 65536"),
        (["--extra", "nowhere:Norm"], "--extra 'nowhere:Norm': must be MODULE:CLASS"),
        (["--name", "a/b"], "--name 'a/b': must be a name"),
        (["--output", "a"], "--output is now --name"),
        (["--seconds", "0"], "--seconds '0': must be a positive number"),
    ],
)
def test_bad_input_is_refused(words, message, capsys):
    """Exit status 2 (or the refusal that becomes it) with the option, the value and what is valid, before any measuring."""
    with pytest.raises((SystemExit, UserError)) as caught:
        measure.benchmark(words)
    assert message in capsys.readouterr().err + str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused():
    """Before any measuring."""
    with pytest.raises(UserError, match="--device 'cuda': torch finds no CUDA device; valid here: cpu"):
        measure.benchmark(["--device", "cuda"])


class Event:
    """What DeviceEvents uses of torch.cuda.Event, on this machine's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert self.time

    def elapsed_time(self, end):
        return (end.time - self.time) * 1000


def test_times_of_a_gpu(monkeypatch):
    """Between two events, behind as much other work as the host needs time; by the clock, between two synchronizations."""
    empty, order = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(timing.DeviceEvents, "BYTES", 1 << 16)
    measure = timing.DeviceEvents()
    assert measure.times > 1
    before = time.perf_counter()
    taken = measure(lambda: time.sleep(0.05))
    assert 0.05 <= taken <= time.perf_counter() - before
    assert timing.device_clock(lambda: order.append("call")) > 0 and order == ["wait", "call", "wait"]
    order.clear()
    assert timing.host_seconds(lambda: time.sleep(0.001)) >= 0.001 and order == ["wait"] * 12


def test_models_in_half_precision():
    """What a GPU measures, by a CPU: a layer, an update by fairseq's own optimizer of --fp16, and a search, in float16."""
    options = parse(["--fast", "--contenders", "rms,batch,power,power-torch,authors"])
    options.model_dtype = "float16"
    for level in ("encoder", "step", "generation"):
        job = next(cells.JOBS[level](options, "recycled"))
        assert job.cell["dtype"] == "float16" and job.cell["device"] == "cpu"
        names = {"layer", "rms", "batch", "power", "power-torch"} if level == "encoder" else {"layer", "power"}
        assert set(job.measure(0.0)) == names


def test_an_update_in_half_precision_trains():
    """The update that is timed changes the parameters and takes one step of the running statistics."""
    options = parse(["--fast"])
    options.model_dtype = "float16"
    model, running, _ = models.translation_model("power", options, 16, 32, 1, 40)
    before = [p.detach().clone() for p in model.parameters()]
    function = models.Update(options, model, running, 4, 8, 40)
    for _ in range(8):  # the first ones may lower the loss scale
        function()
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    norm = model.encoder.layers[0].self_attn_layer_norm
    assert float(norm.iters) == 8 and torch.isfinite(norm.ema_gz).all() and norm.ema_gz.any()


def cell(level="layer", which="train", rows=4096, dtype="float32", device="cpu", memory="recycled", **ratios):
    """A cell of a record in which LayerNorm takes a second and a copy 0.9."""
    contenders = {
        name.replace("_", "-"): {
            "seconds": ratio,
            "ratio": ratio,
            "saved": 1.001,
            "bandwidth_fraction": 0.9 / ratio,
            "worst": ratio,
        }
        for name, ratio in ratios.items()
    }
    return {"level": level, "pass": which, "rows": rows, "channels": 512, "dtype": dtype, "device": device, "memory": memory,
            "threads": 1, "contenders": contenders}


def test_targets_are_checked():
    """Each bound holds for the worst cell or the median, as its name says, from 2,048 rows on and with either use of freed
    memory, and no verdict is given without a measurement.
    """
    met = lambda found: {each["target"]: each["met"] for each in checks(found)}  # noqa: E731
    assert met([]) == {}
    good = cell(layer=1.0, power_g1=0.6, power_g4=0.65, authors_g1=20.0, authors_g4=20.0)
    assert set(met([good]).values()) == {True}
    for memory, rows in (("default", 2048), ("recycled", 65536)):
        slow = cell(rows=rows, memory=memory, layer=1.0, power_g1=0.9, power_g4=1.1, authors_g1=40.0, authors_g4=40.0)
        verdicts = met([good, good, slow])
        assert verdicts.pop("training, float32, every cell") is False and set(verdicts.values()) == {True}
    for which, dtype, bound in (("train", "bfloat16", 0.5), ("eval", "float32", 0.7), ("eval", "bfloat16", 0.4)):
        name = f"{'training' if which == 'train' else 'evaluation'}, {dtype}, every cell"
        for ratio, verdict in ((bound, True), (bound + 0.01, False)):
            assert met([cell(which=which, dtype=dtype, power_g4=0.1), cell(which=which, dtype=dtype, power_g4=ratio)])[
                name] is verdict
    assert met([cell(level="step", layer=1.0, power=1.02)]) == {"whole training step": False}
    counted = cell(level="step", layer=1.0, power=1.0)
    counted["contenders"]["power"]["statistics"] = 0.02
    assert met([counted])["running statistics / training step"] is False
    assert met([cell(level="generation", which="eval", power=1.1)]) == {"generation with folded norms": False}
    assert met([cell(rows=1, layer=1.0, power_g1=1.6)]) == {"one row, training": True}
    assert met([cell(rows=1, which="eval", dtype="bfloat16", power_g1=1.6)]) == {"one row, evaluation": False}
    assert set(met([cell(level="accuracy", power_g1=1.01)]).values()) == {False}
    near = cell(layer=1.0, power_g1=0.6, authors_g1=12.0)
    assert met([near])["authors' arithmetic, float32, median"] is False


def test_targets_of_a_gpu_are_checked():
    """Other bounds than a CPU's, and the share of a copy's bandwidth that the forward pass reaches."""
    met = lambda found: {each["target"]: each["met"] for each in checks(found)}  # noqa: E731
    gpu = dict(device="cuda", rows=16384)
    assert met([cell(**gpu, power_g1=1.0, power_g4=1.1)])["training, float32, every cell"] is False
    assert met([cell(**gpu, power_g1=1.0)])["training, float32, every cell"] is True
    assert met([cell(device="cuda", level="step", dtype="float16", power=1.02)]) == {"whole training step, float16": True}
    for dtype in ("float32", "bfloat16"):
        for time_taken, verdict in ((1.1, True), (1.15, False)):
            found = met([cell(**gpu, which="forward", dtype=dtype, power_g1=1.0, power_g4=time_taken)])
            assert found == {f"forward pass, {dtype}, share of the bandwidth of a copy": verdict}


def test_the_sanitizers_script_needs_a_compiler(tmp_path):
    """One line and exit status 2 where the compiler is none."""
    done = toy.command("bash", "tests/checks/sanitizers.sh", check=False, cold=True, CC="no-such-compiler")
    assert done.returncode == 2 and done.stderr == (
        "tests/checks/sanitizers.sh: error: no C compiler: no-such-compiler is not in PATH\n"
    )
    assert toy.command("bash", "tests/checks/sanitizers.sh", "--help", cold=True).stdout.startswith("Builds the C kernel")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_stand_alone_check_passes(tmp_path):
    """The program that the sanitizers run, built without them: every entry point of the kernel equals plain loops, with
    threads and without, for the smaller shapes.

    In the code for other processors than x86; tests/kernels/test_kernels.py runs that for this one.
    """
    source = toy.ROOT / "tests" / "checks" / "sanitize_kernel.c"
    flags = ["-std=gnu11", "-O1", "-DPN_GENERIC", "-Wno-psabi", "-o", tmp_path / "check", "-lm", "-lpthread"]
    subprocess.run([str(word) for word in ["cc", source, *flags]], check=True)
    done = subprocess.run([tmp_path / "check", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "generic: no fault\n"
