"""Averaging, safe loading and conversion of checkpoints, as functions and as a command."""
import argparse
import random
import re
import resource

import pytest
import torch
import toy

from fairseq_powernorm import checkpoint
from fairseq_powernorm.norms import NORMS, RunningNorm, build_norm, norms_with


def average(*words):
    """The exit status of the command that averages, in this process."""
    return checkpoint.main(["average", "--inputs", *map(str, words)])


def write(path, model, **rest):
    torch.save({"args": None, "model": model, "last_optimizer_state": {"step": 1}, **rest}, path)
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """Three checkpoints of a small model with PN, PN-V and BN, each state different."""
    paths, states = [], []
    for seed in range(3):
        state = toy.build(seed=seed, encoder_norm_ff="batch", decoder_norm_self="power-v").state_dict()
        for name in state:
            if name.endswith(".iters"):
                state[name].fill_(100 + seed)
        states.append(state)
        paths.append(write(tmp_path / f"checkpoint{seed}.pt", state, epoch=seed))
    return paths, states


def test_average(runs):
    """Parameters, psi^2 and nu are averaged, running_var as a moment, step counts taken from the last checkpoint."""
    paths, states = runs
    averaged = checkpoint.average_checkpoints(paths)
    assert "last_optimizer_state" not in averaged and averaged["epoch"] == 2
    assert list(averaged["model"]) == list(states[0])
    for name, value in averaged["model"].items():
        parts = torch.stack([state[name].double() for state in states])
        if name.endswith(".iters"):
            expected = parts[-1]
        elif name.endswith(".running_var"):
            means = torch.stack([state[name.replace("running_var", "running_mean")].double() for state in states])
            expected = (parts + means**2).mean(0) - means.mean(0) ** 2
        else:
            expected = parts.mean(0)
        assert value.dtype == states[0][name].dtype
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)


#: norms with running statistics, in the way a checkpoint has them
RUNNING = [name for name, kind in NORMS.items() if issubclass(kind, RunningNorm)]


@pytest.mark.parametrize("name", RUNNING)
def test_average_of_each_norm(name, tmp_path):
    """The moments about zero are averaged, a variance or deviation is that of all together, and what holds single steps,
    step counts and windows, is that of the last checkpoint."""
    torch.manual_seed(0)
    norm = build_norm(name, 4, **getattr(NORMS[name], "REQUIRED", {}))
    states = [{f"n.{key}": torch.rand_like(value) + 0.5 for key, value in norm.state_dict().items()} for _ in range(3)]
    model = checkpoint.average_checkpoints([write(tmp_path / f"{i}.pt", state) for i, state in enumerate(states)])["model"]
    for key, value in model.items():
        parts = torch.stack([state[key].double() for state in states])
        expected = parts[-1] if key[2:] in ("iters", *norm.windows) else parts.mean(0)
        if "n.running_mean" in states[0] and key in ("n.running_var", "n.running_std"):
            means = torch.stack([state["n.running_mean"].double() for state in states])
            variances = parts if key.endswith("var") else parts.square()
            expected = variances.mean(0) + means.var(0, unbiased=False)
            expected = expected if key.endswith("var") else expected.sqrt()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=key)


def test_average_of_one_checkpoint_is_itself(runs):
    """Averaging a single checkpoint returns its model."""
    paths, states = runs
    for name, value in checkpoint.average_checkpoints(paths[:1])["model"].items():
        torch.testing.assert_close(value, states[0][name], rtol=1e-6, atol=1e-6)


def test_flipped_bits(tmp_path):
    """One bit flipped at any of many places of a checkpoint = refused in one line, or a bit that means nothing: what is
    loaded is then the same."""
    path = write(tmp_path / "whole.pt", {"w": torch.randn(50, 40), "b": torch.arange(7.0)})
    whole, wanted = (tmp_path / "whole.pt").read_bytes(), checkpoint.load(path)["model"]
    draw = random.Random(2)
    refused = 0
    for place in range(0, len(whole), len(whole) // 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        (tmp_path / "whole.pt").write_bytes(flipped)
        try:
            found = checkpoint.load(path)["model"]
        except ValueError as error:
            assert str(error).startswith(f"checkpoint {path!r}: damaged")
            refused += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert refused > 100


def test_without_checksums(tmp_path):
    """Files of torch before 1.6, and those that torch was told to write without checksums, are read."""
    model = {"model": {"w": torch.ones(3)}}
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    if hasattr(torch.serialization, "set_crc32_options"):
        torch.serialization.set_crc32_options(False)
    try:
        torch.save(model, tmp_path / "new.pt")
    finally:
        if hasattr(torch.serialization, "set_crc32_options"):
            torch.serialization.set_crc32_options(True)
    for name in ("old.pt", "new.pt"):
        assert torch.equal(checkpoint.load(str(tmp_path / name))["model"]["w"], torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    """A checkpoint of a training that has diverged is not averaged, and nothing is written."""
    paths = [write(tmp_path / f"{v}.pt", {"w": torch.tensor([0.0, v])}) for v in (1.0, value)]
    with pytest.raises(ValueError, match=rf"{value}\.pt.*: w has values that are not finite: training has diverged"):
        checkpoint.average_checkpoints(paths)
    assert average(*paths, "--output", tmp_path / "c.pt") == 1 and not (tmp_path / "c.pt").exists()


def test_averaging_does_not_change_its_inputs_dtype(tmp_path):
    """Half-precision parameters are averaged in double precision and come back in half."""
    paths = [write(tmp_path / f"{v}.pt", {"w": torch.full((2,), v, dtype=torch.float16)}) for v in (1.0, 2.0, 4.0)]
    value = checkpoint.average_checkpoints(paths)["model"]["w"]
    assert value.dtype == torch.float16
    torch.testing.assert_close(value, torch.full((2,), 7 / 3, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_parameters_are_averaged_once(dtype, tmp_path):
    """Two names of one memory have the average that each of them would have by itself."""
    paths = []
    for number in (1.0, 2.0):
        tied = torch.full((2,), number, dtype=dtype)
        paths.append(write(tmp_path / f"{number}.pt", {"a": tied, "b": tied}))
    for value in checkpoint.average_checkpoints(paths)["model"].values():
        assert value.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "damaged, or not a checkpoint"),
        (lambda path: path.write_bytes(b""), "damaged, or not a checkpoint"),
        (lambda path: torch.save([1, 2], path), "holds no model"),
    ],
    ids=["missing", "truncated", "empty", "other"],
)
def test_unreadable_checkpoints_are_named(runs, tmp_path, damage, message, capsys):
    """A missing, truncated, empty or foreign file: an error that names it, and no output file."""
    paths, _ = runs
    damage(tmp_path / "checkpoint1.pt")
    assert average(*paths, "--output", tmp_path / "out.pt") == 1
    error = capsys.readouterr().err
    assert "checkpoint1.pt" in error and message in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []


def test_checkpoints_of_different_models_are_not_averaged(tmp_path):
    """A parameter of another shape, or a missing one: ValueError naming file and parameter."""
    a = write(tmp_path / "a.pt", {"w": torch.zeros(2), "v": torch.zeros(1)})
    b = write(tmp_path / "b.pt", {"w": torch.zeros(3), "v": torch.zeros(1)})
    c = write(tmp_path / "c.pt", {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="b.pt.*'w'"):
        checkpoint.average_checkpoints([a, b])
    with pytest.raises(ValueError, match="c.pt.*'v'"):
        checkpoint.average_checkpoints([a, c])
    with pytest.raises(ValueError, match="no checkpoints"):
        checkpoint.average_checkpoints([])


def test_the_command_refuses_to_overwrite(runs, tmp_path, capsys):
    """An existing output is kept unless --force is given; the file written is whole and loads."""
    paths, _ = runs
    output = tmp_path / "out.pt"
    output.write_text("precious")
    assert average(*paths, "--output", output) == 1
    assert "--force" in capsys.readouterr().err and output.read_text() == "precious"
    assert average(*paths, "--output", output, "--force") == 0
    assert "model" in checkpoint.load(str(output))


def test_a_full_disk(tmp_path):
    """A disk that is full is named, and leaves nothing; what stood there stays."""
    output = tmp_path / "out.pt"
    output.write_text("precious")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match=f"^output {re.escape(repr(str(output)))}: cannot be written: File too large$"):
            checkpoint.save({"model": {"w": torch.zeros(1000)}}, str(output), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"] and output.read_text() == "precious"


def test_loading_executes_no_code(tmp_path):
    """A checkpoint that would run code when unpickled is refused, and the code does not run."""

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"model": {}, "payload": Payload()}, path)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        checkpoint.load(str(path))
    assert not (tmp_path / "ran").exists()


def authors_state(**changes):
    args = argparse.Namespace(
        arch="transformer_iwslt_de_en_v2", warmup_updates=8000, encoder_norm_self="power", encoder_norm_ff="power",
        decoder_norm_self="layer", decoder_norm_ff="layer",
    )
    for name, value in changes.items():
        setattr(args, name, value)
    model = {"n.running_phi": torch.ones(1, 4, 1, 1), "n.ema_gz": torch.ones(1, 4, 1, 1), "n.iters": torch.tensor([5])}
    return {"args": args, "model": model}


def test_conversion():
    """Shapes, dtypes and options of a converted checkpoint; the input is left as it was."""
    state = authors_state()
    converted = checkpoint.convert_authors_checkpoint(state)
    assert {k: (tuple(v.shape), v.dtype) for k, v in converted["model"].items()} == {
        "n.running_phi": ((4,), torch.float32), "n.ema_gz": ((4,), torch.float32), "n.iters": ((), torch.float32),
    }
    assert converted["args"].norm_warmup_updates == 8000 and converted["args"].norm_final_warmup_updates == 1000
    assert not hasattr(state["args"], "norm_warmup_updates") and state["model"]["n.iters"].dtype == torch.int64


@pytest.mark.parametrize("theirs,ours", checkpoint.AUTHORS_ARCHITECTURES.items())
def test_every_architecture_of_theirs_has_a_counterpart(theirs, ours):
    """Each architecture name that is converted becomes one that is registered for ``transformer_pn``."""
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY

    assert checkpoint.convert_authors_checkpoint(authors_state(arch=theirs))["args"].arch == ours
    assert ARCH_MODEL_NAME_REGISTRY[ours] == "transformer_pn"


@pytest.mark.parametrize(
    "state,message",
    [
        ({"args": None, "model": {}}, "stores no Namespace"),
        (authors_state(arch="lstm"), "arch 'lstm'.*transformer_iwslt_de_en_v2"),
        (authors_state(encoder_norm_ff="group"), "encoder_norm_ff 'group'.*layer, power, batch"),
    ],
)
def test_what_cannot_be_converted_is_named(state, message):
    """No options, another architecture, or a norm without a counterpart: ValueError saying what is valid."""
    with pytest.raises(ValueError, match=message):
        checkpoint.convert_authors_checkpoint(state)


@pytest.mark.parametrize("name", NORMS)
def test_checkpoints_of_each_norm(name):
    """A model loads a checkpoint of its own norm to the last bit, and refuses one with other parameters or buffers there."""
    model = toy.build(encoder_norm_self=name, seed=1)
    state = model.state_dict()
    twin = toy.build(encoder_norm_self=name, seed=2)
    twin.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
    place = "encoder.layers.0.self_attn_layer_norm"
    own = {key[len(place) + 1:] for key in state if key.startswith(f"{place}.")}
    assert name in norms_with(own)
    for other in ("layer", "batch", "power", "scale", "ada"):
        if other not in norms_with(own):
            with pytest.raises(ValueError, match=f"has norm .*'{name}'.* at {place}, the model '{other}'"):
                toy.build(encoder_norm_self=other).load_state_dict(state)
