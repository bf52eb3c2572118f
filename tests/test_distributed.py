"""Running statistics in fairseq's trainer: however the batch is cut, and whatever happens in a step."""
import json
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import toy
from fairseq_cli.train import cli_main

from fairseq_powernorm import recorder
from fairseq_powernorm.tasks import MAX_SKIPPED_UPDATES, TranslationPNConfig, TranslationPNTask

pytestmark = pytest.mark.slow

TRANSLATION = (
    "--arch", "transformer_pn_iwslt_de_en", "--share-all-embeddings", "--task", "translation_pn",
    "--encoder-layers", 2, "--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64, "--attention-dropout", 0,
    "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1,
)  # fmt: skip
LANGUAGE_MODEL = (
    "--arch", "tensorized_lm_pn_ptb", "--task", "language_modeling_pn", "--tokens-per-sample", 8,
    "--tensorized-window", 8, "--tensorized-rank", 8, "--criterion", "cross_entropy",
)  # fmt: skip
RUN = (
    "--decoder-layers", 2, "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64,
    "--dropout", 0, "--activation-dropout", 0,
    # SGD: Adam divides the gradient of a bias of keys, which is rounding noise, by its own size
    "--optimizer", "sgd", "--lr", 0.5, "--lr-scheduler", "fixed",
    "--log-format", "json", "--log-interval", 1, "--no-progress-bar",
    "--cpu", "--num-workers", 0, "--data-buffer-size", 0, "--no-epoch-checkpoints", "--seed", 1,
    # no shuffling: the same sentences make an update, however they are cut into batches
    "--curriculum", 9, "--required-batch-size-multiple", 1, "--max-update", 20,
)  # fmt: skip
ALGORITHM2 = (
    "--encoder-norm-self", "power", "--encoder-norm-ff", "power", "--decoder-norm-self", "power",
    "--decoder-norm-ff", "power", "--norm-variant", "algorithm2",
)  # fmt: skip
LAYER = tuple("layer" if word == "power" else word for word in ALGORITHM2)
#: PN as the authors' code has it, BN and PN-V
MIXED = (
    "--encoder-norm-self", "power", "--encoder-norm-ff", "batch", "--encoder-norm-final", "power",
    "--decoder-norm-self", "power-v", "--decoder-norm-ff", "power", "--norm-warmup-updates", 8,
)  # fmt: skip
WHOLE = ("--batch-size", 16)
HALF = ("--batch-size", 8)
FP16 = ("--fp16", "--fp16-no-flatten-grads")
BUFFERS = ("iters", "running_phi", "ema_gz", "running_mean", "running_var")


class Run:
    """A run of fairseq-train: exit status, output, checkpoints and what ``instrumented`` saw on each rank."""

    def __init__(self, folder, data, *arguments, model=TRANSLATION, ranks=1, check=True, validate=False, **environment):
        self.folder = folder
        words = [data, "--user-dir", "tests/instrumented", "--save-dir", folder / "save", *model, *RUN, *arguments]
        words += [] if validate else ["--disable-validation"]
        start = partial(toy.on_ranks, ranks) if ranks > 1 else partial(toy.command, "fairseq-train")
        done = start(*words, check=check, WATCH=str(folder), **environment)
        self.status, self.output = done.returncode, done.stdout + done.stderr
        #: by rank: what instrumented.Watch says of each training step
        self.steps = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
        self.losses = toy.losses(self.output)

    def states(self, rank=0):
        """Parameters and buffers after each training step."""
        return [step["state"] for step in self.steps[rank]]

    def checkpoint(self, name="last"):
        return torch.load(self.folder / "save" / f"checkpoint_{name}.pt", weights_only=True)

    def warnings(self):
        return [line for line in self.output.splitlines() if "WARNING" in line]

    def logged(self, key):
        """The values of one quantity of the log."""
        rows = (json.loads(line[line.index("{") :]) for line in self.output.splitlines() if f'"{key}"' in line)
        return [row[key] for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Start a run in a folder of its own."""
    return lambda *arguments, **options: Run(tmp_path_factory.mktemp("run"), *arguments, **options)


def together(*starts):
    """Start several runs, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(start) for start in starts]]


def buffers(state):
    return {name: value for name, value in state.items() if name.endswith(BUFFERS)}


def differing(one, other):
    """Names of the tensors that are not bit-identical."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def error(one, other):
    """Largest difference of two states: max |difference| / max |value| of a tensor."""
    assert one.keys() == other.keys()
    pairs = [(value.double(), other[name].double()) for name, value in one.items()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def numbers(entries, key):
    return [entry[key] for entry in entries]


def steps(state, part=""):
    """How many steps the norms with that beginning of their names have taken."""
    return {int(value) for name, value in state.items() if name.startswith(part) and name.endswith("iters")}


@pytest.fixture(scope="module")
def even_data(tmp_path_factory):
    """A corpus like the toy one, but without padding: all sentences have the same length."""
    folder, draw = tmp_path_factory.mktemp("even"), random.Random(2)
    for language in ("de", "en"):
        lines = (" ".join(f"{language}{draw.randrange(20)}" for _ in range(6)) + "\n" for _ in range(200))
        (folder / f"train.{language}").write_text("".join(lines))
    toy.preprocess(
        "--source-lang", "de", "--target-lang", "en", "--joined-dictionary", "--destdir",
        folder / "bin", "--trainpref", folder / "train",
    )
    return folder / "bin"


# ------------------------------------------------------------------------------------------------- how the batch is cut


@pytest.fixture(scope="module")
def cut(run, toy_data):
    """Ragged sentences, 25 batches of 8 in an epoch: in one batch of 16, in two micro-batches, on two ranks."""
    arguments = (toy_data, *ALGORITHM2)
    whole, micro, ranks = together(
        lambda: run(*arguments, *WHOLE),
        lambda: run(*arguments, *HALF, "--update-freq", 2),
        lambda: run(*arguments, *HALF, "--save-interval-updates", 5, ranks=2),
    )
    return {"whole": whole, "micro": micro, "ranks": ranks}


@pytest.fixture(scope="module")
def mixed(run, even_data, tmp_path_factory):
    """PN (reference), BN and PN-V, sentences without padding: in one batch of 16, on two ranks."""
    arguments, folder = (even_data, *MIXED, "--norm-record-interval", 5), tmp_path_factory.mktemp("records")
    whole, recorded, exact, step = together(
        lambda: run(*arguments, *WHOLE),
        lambda: run(*arguments, *WHOLE, "--norm-record", folder / "whole", "--save-interval-updates", 10),
        lambda: run(*arguments, *HALF, "--norm-record", folder / "exact", "--norm-sync", "exact", ranks=2),
        lambda: run(*arguments, *HALF, "--max-update", 8, ranks=2),
    )
    return {"whole": whole, "recorded": recorded, "exact": exact, "step": step, "records": folder}


def sentences(run):
    """The sentences of each update."""
    return [sorted(s for step in ranks for batch in step["sentences"] for s in batch) for ranks in zip(*run.steps)]


@pytest.mark.parametrize("way", ["micro", "ranks"])
def test_cutting_the_batch(cut, way):
    """Two micro-batches = two ranks = one batch of their sentences: parameters and buffers of PN (algorithm2) in both
    stacks within 1e-5 after each of 20 updates, padding and a dummy batch included."""
    whole, parts = cut["whole"], cut[way]
    assert sentences(whole) == sentences(parts)
    assert [len(update) for update in sentences(whole)] == [*[16] * 12, 8, *[16] * 7]
    halves = [batch for ranks in zip(*parts.steps) for step in ranks for batch in step["sentences"]]
    assert all(len(batch) == 8 for batch in halves) and len(halves) == 39
    assert way == "micro" or parts.steps[1][12]["sentences"] == []
    assert whole.losses == parts.losses and len(whole.losses) == 20
    errors = [error(one, other) for one, other in zip(whole.states(), parts.states())]
    assert len(errors) == 20 and max(errors) < 1e-5, errors
    assert steps(parts.states()[-1]) == {20}


def test_language_model_on_two_ranks(run, tmp_path):
    """A language model on two ranks = one process with all their blocks in a batch, within 1e-5 after each update, and
    in the update in which one rank has none."""
    draw = random.Random(3)
    lines = (" ".join(f"w{draw.randrange(20)}" for _ in range(draw.randrange(3, 12))) + "\n" for _ in range(150))
    (tmp_path / "train.txt").write_text("".join(lines))
    toy.preprocess("--only-source", "--destdir", tmp_path / "bin", "--trainpref", tmp_path / "train.txt")
    arguments = (tmp_path / "bin", "--decoder-norm-self", "power", "--norm-variant", "algorithm2", "--max-update", 16)
    whole, ranks = together(
        lambda: run(*arguments, *WHOLE, model=LANGUAGE_MODEL),
        lambda: run(*arguments, *HALF, model=LANGUAGE_MODEL, ranks=2),
    )
    assert sentences(whole) == sentences(ranks) and len(sentences(whole)) == 16
    assert any(step["sentences"] == [] for step in ranks.steps[1])
    errors = [error(one, other) for one, other in zip(whole.states(), ranks.states())]
    assert max(errors) < 1e-5, errors
    assert steps(ranks.states()[-1]) == {16} and whole.losses == ranks.losses


def test_exact_from_the_start(mixed):
    """--norm-sync exact: two ranks = one batch of their sentences, within 1e-5, in the warm-up of PN (reference), too,
    and for BN and PN-V. With step it is not so: these divide by the statistics of their own rank's batch."""
    whole, exact, step = mixed["whole"], mixed["exact"], mixed["step"]
    assert sentences(whole) == sentences(exact) and sentences(whole)[:8] == sentences(step)
    assert exact.steps[1][12]["sentences"] == []
    errors = [error(one, other) for one, other in zip(whole.states(), exact.states())]
    assert len(errors) == 20 and max(errors) < 1e-5, errors
    assert all(error(one, other) > 1e-2 for one, other in zip(whole.states(), step.states()))


@pytest.fixture(scope="module")
def two_ranks(run, toy_data):
    """Other runs on two ranks: statistics not synchronized, LayerNorm, and layers dropped."""
    dropping = ("--encoder-layerdrop", 0.5, "--decoder-layerdrop", 0.5, "--dropout", 0.1)
    off, layer, dropped = together(
        lambda: run(toy_data, *ALGORITHM2, *HALF, "--norm-sync", "off", "--max-update", 3, ranks=2),
        lambda: run(toy_data, *LAYER, *HALF, "--max-update", 3, ranks=2),
        lambda: run(toy_data, *MIXED, *HALF, *dropping, ranks=2),
    )
    return {"off": off, "layer": layer, "dropped": dropped}


def test_ranks_hold_the_same_statistics(cut, mixed, two_ranks):
    """Parameters and buffers of all ranks are bit-identical after every update and those of the checkpoints, the update
    with a dummy batch included; with --norm-sync off the buffers differ."""
    for run in (cut["ranks"], mixed["exact"], mixed["step"], two_ranks["dropped"]):
        assert len(run.states(1)) in (8, 20)
        assert [differing(*states) for states in zip(run.states(0), run.states(1))] == [[]] * len(run.states(1))
    ranks = cut["ranks"]
    for update, name in ((5, "1_5"), (10, "1_10"), (15, "2_15"), (20, "last")):
        assert not differing(ranks.checkpoint(name)["model"], ranks.states(1)[update - 1]), name
    for states in zip(two_ranks["off"].states(0), two_ranks["off"].states(1)):
        norms = {name for name in states[0] if name.endswith(("running_phi", "ema_gz"))}
        assert set(differing(*states)) == norms and len(norms) == 24


def test_layers_dropped_on_some_ranks(two_ranks):
    """Ranks that drop different layers take one step of the statistics of a layer that ran on any of them, but none of
    one that ran on a dummy batch only."""
    run = two_ranks["dropped"]
    assert numbers(run.steps[0], "runs") != numbers(run.steps[1], "runs")
    both = [{name for step in ranks if step["sentences"] for name in step["runs"]} for ranks in zip(*run.steps)]
    state = run.states()[-1]
    for side in ("encoder", "decoder"):
        for layer in range(2):
            name = f"{side}.layers.{layer}"
            expected = sum(name in layers for layers in both)
            assert expected < 20
            assert steps(state, name) == {expected}


def test_one_collective_an_update(cut, two_ranks):
    """Statistics cost one all-reduce an update more than training LayerNorm does, whatever the number of norms."""
    plain = numbers(two_ranks["layer"].steps[0], "collectives")
    assert len(plain) == 3 and plain[0]["all_reduce"] > 0
    expected = [{**calls, "all_reduce": calls["all_reduce"] + 1} for calls in plain]
    assert numbers(cut["ranks"].steps[0], "collectives")[:3] == expected
    assert numbers(two_ranks["off"].steps[0], "collectives") == plain


def test_pytorch_ddp(run, toy_data):
    """--ddp-backend pytorch_ddp gives the parameters and buffers of legacy_ddp, on two ranks with two micro-batches
    each and a dummy batch."""
    arguments = (toy_data, *ALGORITHM2, *HALF, "--update-freq", 2, "--max-update", 9)
    legacy, pytorch = together(
        lambda: run(*arguments, ranks=2), lambda: run(*arguments, "--ddp-backend", "pytorch_ddp", ranks=2)
    )
    assert sentences(legacy) == sentences(pytorch)
    assert [len(update) for update in sentences(legacy)] == [*[32] * 6, 8, *[32] * 2]
    assert max(error(one, other) for one, other in zip(legacy.states(), pytorch.states())) < 1e-5
    assert [differing(*states) for states in zip(pytorch.states(0), pytorch.states(1))] == [[]] * 9


# -------------------------------------------------------------------------------------------- what happens in an update


def test_activation_checkpointing(run, toy_data):
    """--checkpoint-activations changes no parameter and no buffer, bit for bit, with all norms and layers dropped in
    both stacks; a layer takes as many steps as it ran."""
    arguments = (toy_data, *MIXED, *WHOLE, "--encoder-layerdrop", 0.5, "--decoder-layerdrop", 0.2)
    off, on = together(lambda: run(*arguments), lambda: run(*arguments, "--checkpoint-activations"))
    assert [differing(*states) for states in zip(off.states(), on.states())] == [[]] * 20
    for run in (off, on):
        for layer in (f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)):
            count = sum(runs.get(layer, 0) for runs in numbers(run.steps[0], "runs"))
            assert count < 20 and steps(run.states()[-1], layer) == {count}


def test_activation_checkpointing_without_dropped_layers(run, toy_data, cut):
    """The same for PN of Algorithm 2 in both stacks, with every layer's gradient in the encoder's output."""
    on = run(toy_data, *ALGORITHM2, *WHOLE, "--checkpoint-activations")
    assert [differing(*states) for states in zip(cut["whole"].states(), on.states())] == [[]] * 20


def test_loss_scale(run, toy_data):
    """The loss scale of fp16 training has no effect on statistics and parameters, be it small, large, or growing on
    the way: a power of two is exact in fp16, so all are bit-identical until a gradient is subnormal under one of the
    scales, and within 1e-6 while few are.

    512 is the largest scale at which nothing overflows here. Under 1 many gradients are subnormal from the start.
    """
    arguments = (toy_data, *MIXED, *WHOLE, *FP16, "--fp16-init-scale")
    large, growing, small = together(
        lambda: run(*arguments, 512, "--fp16-scale-window", 1000),
        lambda: run(*arguments, 64, "--fp16-scale-window", 6),
        lambda: run(*arguments, 1, "--fp16-scale-window", 1000),
    )
    assert set(numbers(large.steps[0], "loss_scale")) == {512} and set(numbers(small.steps[0], "loss_scale")) == {1}
    assert numbers(growing.steps[0], "loss_scale") == [*[64] * 6, *[128] * 6, *[256] * 6, 512, 512]
    assert [differing(*states) for states in zip(large.states(), growing.states())][:5] == [[]] * 5
    assert all(error(*states) < 1e-6 for states in zip(large.states(), growing.states()))
    first, last = ((buffers(large.states()[k]), buffers(small.states()[k])) for k in (0, -1))
    assert error(*first) < 1e-3 and error(*last) < 0.1


def test_automatic_mixed_precision(run, toy_data):
    """--amp, whose loss scale torch keeps on the device: statistics to 1e-6 those of plain float32, and an update that
    it skips for an infinite gradient, and its repetitions, leave every parameter and buffer bit-identical.

    Parameters stay as they are in the first comparison: fairseq's AMPOptimizer divides gradients by the scale twice.
    """
    arguments = (toy_data, *MIXED, *WHOLE, "--max-update", 8)
    plain, scaled, struck = together(
        lambda: run(*arguments, "--lr", 0),
        lambda: run(*arguments, "--lr", 0, "--amp", "--fp16-init-scale", 32768),
        lambda: run(*arguments, "--amp", "--fp16-init-scale", 1, "--amp-batch-retries", 1, INJECT_INF="3,4"),
    )
    assert set(numbers(scaled.steps[0], "loss_scale")) == {32768}
    assert max(error(*states) for states in zip(plain.states(), scaled.states())) < 1e-6
    assert any(value.any() for name, value in scaled.states()[-1].items() if name.endswith("ema_gz"))
    # fairseq takes the same batch again at once; the accident strikes once more, and the batch is given up
    states = struck.states()
    changed = [bool(differing(*pair)) for pair in zip(states, states[1:])]
    assert changed == [True, False, False, *[True] * 6]
    assert numbers(struck.steps[0], "update") == [1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    assert struck.output.count("AMP: overflow detected") == 2 and not struck.warnings()


def test_automatic_mixed_precision_without_a_batch(run, toy_data):
    """An update that --amp skips on two ranks of which the second has no batch left (13 batches in an epoch): nothing
    changes on either, and both go on with the same parameters and buffers."""
    done = run(
        toy_data, *MIXED, *WHOLE, "--amp", "--fp16-init-scale", 1, "--amp-batch-retries", 1, "--max-update", 8, ranks=2,
        INJECT_INF="7", INJECT_RANK="0",
    )  # fmt: skip
    assert done.steps[1][7]["sentences"] == []
    assert numbers(done.steps[0], "update") == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert [differing(*states) for states in zip(done.states(0), done.states(1))] == [[]] * 9
    assert done.output.count("AMP: overflow detected") > 0
    assert steps(done.states()[-1]) == {8}


@pytest.fixture(scope="module")
def accidents(run, toy_data):
    """Runs in which a training step goes wrong."""
    eleven = ",".join(str(step) for step in range(2, 23) if step != 6)
    overflow, nan, nan_on_one_rank, nan_in_a_row = together(
        lambda: run(
            toy_data, *MIXED, *WHOLE, *FP16, "--fp16-init-scale", 128, "--max-update", 8, INJECT_INF="5", INJECT_NAN="7"
        ),
        lambda: run(toy_data, *MIXED, *WHOLE, "--max-update", 15, INJECT_NAN="4"),
        lambda: run(
            toy_data, *MIXED, *HALF, "--max-update", 15, "--norm-sync", "exact", "--clip-norm", 1, ranks=2,
            INJECT_NAN="1", INJECT_RANK="1",
        ),
        lambda: run(toy_data, *ALGORITHM2, *WHOLE, "--max-update", 40, check=False, INJECT_NAN=eleven),
    )
    return {"overflow": overflow, "nan": nan, "nan on one rank": nan_on_one_rank, "nan in a row": nan_in_a_row}


def test_overflow(accidents):
    """An update with an infinite gradient in fp16, and one with NaN in the forward pass, leave every parameter and
    buffer bit-identical and are not counted; training goes on."""
    done = accidents["overflow"]
    assert done.output.count("gradient overflow detected") == 2
    assert numbers(done.steps[0], "update") == [1, 2, 3, 4, 4, 5, 5, 6, 7, 8]
    assert numbers(done.steps[0], "loss_scale") == [128] * 5 + [64] * 2 + [32] * 3
    states = done.states()
    for before, after in zip(states, states[1:]):
        changed = differing(buffers(before), buffers(after))
        assert changed in ([], list(buffers(before)))
    changed = [bool(differing(*pair)) for pair in zip(states, states[1:])]
    assert changed == [True, True, True, False, True, False, True, True, True]
    assert steps(states[-1]) == {8}
    warnings = [line for line in done.warnings() if "not finite" in line]
    assert len(warnings) == 1 and "left out" in warnings[0]


def test_validation_changes_nothing(run, toy_data):
    """Validation with BLEU in the middle of epochs: every parameter and buffer bit-identical to those without it."""
    arguments = (toy_data, *MIXED, *WHOLE, "--max-update", 15)
    validation = ("--validate-interval-updates", 4, "--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 9}')
    without, validated = together(lambda: run(*arguments), lambda: run(*arguments, *validation, validate=True))
    assert validated.output.count('"valid_bleu"') == 5
    assert [differing(*states) for states in zip(without.states(), validated.states())] == [[]] * 15


def check_nan(done, update):
    """What follows from NaN in one training step."""
    assert numbers(done.steps[0], "update") == list(range(1, len(done.steps[0]) + 1))
    states = done.states()
    assert all(torch.isfinite(value).all() for state in states for value in state.values())
    if update > 1:
        assert not differing(states[update - 2], states[update - 1])
    assert all(differing(*pair) for k, pair in enumerate(zip(states, states[1:]), 2) if k != update)
    assert steps(states[-1]) == {len(states) - 1}
    (warning,) = done.warnings()
    assert "not finite" in warning and "update skipped" in warning
    nonfinite = [float(value) for value in done.logged("norm_nonfinite")]
    assert nonfinite[0] > 0 and not any(nonfinite[1:])
    assert all(0 < float(loss) < 10 for loss in done.logged("train_loss")) and len(done.logged("train_loss")) == 2
    assert [float(loss) > 0 for loss in done.losses.values()] == [k != update for k in range(1, len(states) + 1)]


def test_nan_in_one_update(accidents):
    """A batch of NaN embeddings in fp32: no step of parameters and statistics, which stay finite; the update counts;
    one warning; norm_nonfinite in the log, from then on; the logged loss of the epoch is finite."""
    check_nan(accidents["nan"], 4)


def test_nan_on_one_rank(accidents):
    """The same on two ranks where only the second has NaN, in the first update, with --norm-sync exact and clipping;
    both ranks go on with the same parameters and buffers."""
    done = accidents["nan on one rank"]
    check_nan(done, 1)
    assert [differing(*states) for states in zip(done.states(0), done.states(1))] == [[]] * 15


def test_nan_in_eleven_updates_in_a_row(accidents):
    """Ten updates in a row whose gradients are not finite are skipped, the eleventh stops training, as in plain
    fairseq; one good update between begins the count anew. The checkpoint of the crash is finite."""
    assert MAX_SKIPPED_UPDATES == 10
    done = accidents["nan in a row"]
    assert done.status == 1
    assert re.search(r"^FloatingPointError: gradients are Nan/Inf$", done.output, re.M)
    assert numbers(done.steps[0], "update") == list(range(1, 17))
    crash = torch.load(done.folder / "save" / "crash.pt", weights_only=True)["model"]
    assert not differing(crash, done.states()[-1]) and not differing(crash, done.states()[5])
    assert all(torch.isfinite(value).all() for value in crash.values())


def test_moving_average_of_the_model(run, toy_data):
    """--store-ema averages the buffers of all norms like any parameter: avg(t) = 0.9 avg(t-1) + 0.1 value(t),
    in fp16, too; avg(1) = value(1), as fairseq begins after the first update."""
    arguments = (toy_data, *MIXED, *WHOLE, "--max-update", 8, "--store-ema", "--ema-decay", 0.9)
    for done in together(
        lambda: run(*arguments), lambda: run(*arguments, *FP16, "--fp16-init-scale", 64, "--ema-fp32")
    ):
        average = done.checkpoint()["extra_state"]["ema"]
        first, *states = [buffers(state) for state in done.states()]
        assert average.keys() == done.checkpoint()["model"].keys()
        assert {name.rpartition(".")[2] for name in first} == set(BUFFERS)
        for name, expected in first.items():
            for state in states:
                expected = 0.9 * expected + 0.1 * state[name]
            assert average[name].dtype == torch.float32 and torch.isfinite(average[name]).all()
            assert error({name: expected}, {name: average[name]}) < 1e-5


# ------------------------------------------------------------------------------------------------------ what is refused


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


#: option that cannot work -> its value, the message
REFUSED = {
    "--ddp-backend": ("fully_sharded", r"ImportError: .*[Pp]lease install fairscale"),
    "--norm-sync": ("bogus", r"--norm-sync.*bogus.*off.*step.*exact"),
    "--norm-record": ("nowhere/record", r"ValueError: --norm-record 'nowhere/record': its directory does not exist"),
    "--norm-record-interval": (0, r"ValueError: --norm-record-interval 0: must be 1 or more"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_bad_options(option, toy_data, tmp_path, monkeypatch, capsys):
    """What cannot work ends with an error that says why, and writes no file."""
    value, message = REFUSED[option]
    words = ["fairseq-train", toy_data, "--user-dir", "fairseq_powernorm", "--save-dir", tmp_path / "save", *TRANSLATION]
    words += [*RUN, *ALGORITHM2, *WHOLE, "--norm-record", "record", option, value]
    monkeypatch.chdir(toy.ROOT)
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises((SystemExit, ImportError, ValueError)) as refusal:
        cli_main()
    said = f"{refusal.type.__name__}: {refusal.value}\n{capsys.readouterr().err}"
    assert re.search(message, said, re.S), said
    assert files(tmp_path) == [] and not (toy.ROOT / "record").exists()


def test_a_record_that_is_elsewhere(toy_data):
    """What only uses a model, and takes the task's options from the checkpoint, does not ask for its record's directory."""
    cfg = TranslationPNConfig(data=str(toy_data), source_lang="de", target_lang="en", norm_record="nowhere/record")
    task = TranslationPNTask.setup_task(cfg)
    with pytest.raises(ValueError, match="--norm-record 'nowhere/record': its directory does not exist"):
        task.check_training()


def test_exact_with_layers_dropped(run, toy_data):
    """--norm-sync exact with layers dropped would wait for ever on two ranks: an error that names both."""
    dropping = ("--norm-sync", "exact", "--decoder-layerdrop", 0.2)
    done = run(toy_data, *ALGORITHM2, *HALF, *dropping, ranks=2, check=False)
    assert done.status != 0
    assert re.search(r"ValueError: --norm-sync exact with layer drop 0\.2: .*must be step or off", done.output)


# ----------------------------------------------------------------------------------------------------------- the record


KEYS = {
    "power": ["update", "norm", "distance_psi2", "size_psi2", "discrepancy_std", "gradient_nu", "nu_largest"],
    "power-v": ["update", "norm", "distance_psi2", "size_psi2", "discrepancy_std", "gradient_psi2"],
    "batch": [
        "update", "norm", "distance_mean", "distance_var", "size_mean", "size_var", "gradient_mean", "gradient_var",
        "discrepancy_std", "discrepancy_mean",
    ],
}  # fmt: skip
#: what BN and PN-V would make of the gradient, whichever norm is there
PROBED = ["gradient_ratio", "gradient_smaller"]
NORMS = {
    "encoder.layer_norm": "power",
    "decoder.layer_norm": "power",
    **{f"encoder.layers.{i}.self_attn_layer_norm": "power" for i in range(2)},
    **{f"encoder.layers.{i}.final_layer_norm": "batch" for i in range(2)},
    **{f"decoder.layers.{i}.{name}_attn_layer_norm": "power-v" for i in range(2) for name in ("self", "encoder")},
    **{f"decoder.layers.{i}.final_layer_norm": "power" for i in range(2)},
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_record(mixed):
    """An entry for each norm at the updates 5, 10, 15 and 20 with the quantities of its kind; distances are those of
    the buffers. A run that is recorded has the parameters and buffers of one that is not, bit for bit."""
    run, found = mixed["recorded"], rows(mixed["records"] / "whole")
    assert [differing(*states) for states in zip(mixed["whole"].states(), run.states())] == [[]] * 20
    places = sorted((row["update"], row["norm"]) for row in found)
    assert places == sorted((update, norm) for update in (5, 10, 15, 20) for norm in NORMS)
    for row in found:
        assert list(row) == [*KEYS[NORMS[row["norm"]]], *PROBED]
        assert all(0 < row[key] < 10 for key in list(row)[2:-1]) and 0 <= row["gradient_smaller"] <= 1, row
    # after the warm-up: psi2(t) = 0.9 psi2(t-1) + 0.1 batch, so batch - psi2(t-1) = 10 (psi2(t) - psi2(t-1))
    for row in found:
        name = f"{row['norm']}.running_{'mean' if NORMS[row['norm']] == 'batch' else 'phi'}"
        before, after = (run.states()[row["update"] + k][name].double() for k in (-2, -1))
        key = name.rpartition("_")[2].replace("phi", "psi2")
        assert row[f"size_{key}"] == pytest.approx(float(before.norm() / 32), rel=1e-4)
        if row["update"] > 8:
            assert row[f"distance_{key}"] == pytest.approx(float((after - before).norm() * 10 / 32), rel=1e-3)


def test_record_of_two_ranks(mixed):
    """Two ranks (--norm-sync exact) write one record: that of one process with their sentences, to 1e-3."""
    paths = (mixed["records"] / name for name in ("whole", "exact"))
    one, two = ({(row.pop("update"), row.pop("norm")): row for row in rows(path)} for path in paths)
    assert list(one) == list(two) and len(one) == 4 * len(NORMS)
    for place, row in one.items():
        assert row.pop("gradient_smaller") == pytest.approx(two[place].pop("gradient_smaller"), abs=0.1)  # of 32 channels
        assert row == pytest.approx(two[place], rel=1e-3)
    assert files(mixed["records"]) == ["exact", "whole"]


def test_record_goes_on(run, even_data, mixed, tmp_path):
    """Going on from the checkpoint of update 10 writes the entries of updates 15 and 20 anew and none twice."""
    shutil.copy(mixed["records"] / "whole", tmp_path / "record")
    arguments = (even_data, *MIXED, *WHOLE, "--norm-record", tmp_path / "record", "--norm-record-interval", 5)
    done = run(*arguments, "--restore-file", mixed["recorded"].folder / "save" / "checkpoint_1_10.pt")
    assert numbers(done.steps[0], "update") == list(range(11, 21))
    assert not differing(done.states()[-1], mixed["whole"].states()[-1])
    assert (tmp_path / "record").read_text() == (mixed["records"] / "whole").read_text()


@pytest.mark.parametrize("begin", ["anew", "--finetune-from-model", "--restore-file"])
def test_record_of_another_run(run, even_data, mixed, tmp_path, begin):
    """A run that begins does not touch the record of another one, be it untrained or starting from a checkpoint with
    running statistics: an error that names the file."""
    record = shutil.copy(mixed["records"] / "whole", tmp_path / "record")
    arguments = [*MIXED, *WHOLE, "--norm-record", record, "--max-update", 1]
    if begin != "anew":
        arguments += [begin, mixed["recorded"].folder / "save" / "checkpoint_1_10.pt"]
    if begin == "--restore-file":
        arguments += ["--reset-optimizer", "--reset-lr-scheduler", "--reset-dataloader", "--reset-meters"]
    done = run(even_data, *arguments, check=False)
    assert record.read_text() == (mixed["records"] / "whole").read_text()
    assert done.status != 0
    assert re.search(r"ValueError: --norm-record '.*/record': holds the record of another run", done.output)


def test_figure(mixed, tmp_path, capsys):
    """The module's command draws records as a PNG, and names a file that is missing."""
    words = [str(mixed["records"] / name) for name in ("whole", "exact")]
    toy.command("python", "-m", "fairseq_powernorm.recorder", *words, "--output", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert recorder.main([*words, str(tmp_path / "nothing"), "--output", str(tmp_path / "y.png")]) == 1
    assert f"record '{tmp_path / 'nothing'}': no such file" in capsys.readouterr().err
    assert files(tmp_path) == ["x.png"]
