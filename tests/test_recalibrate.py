"""Estimating running statistics anew: the function and the command."""
import copy
import re
from collections import namedtuple

import pytest
import test_cli
import torch
import toy
from torch import nn

from fairseq_powernorm.fold import refuse_training
from fairseq_powernorm.norms import LayerNorm, MaskedBatchNorm, PowerNorm, PowerNormV, build_norm
from fairseq_powernorm.statistics import recalibrate

C = 6
KINDS = {
    "batch": lambda: MaskedBatchNorm(C, groups=0),
    "power-v": lambda: PowerNormV(C, groups=0),
    "reference": lambda: PowerNorm(C, groups=0, warmup_updates=3),
    "algorithm2": lambda: PowerNorm(C, groups=0, variant="algorithm2"),
    **{name: (lambda name=name: build_norm(name, C)) for name in ("batch-renorm", "mabn", "un", "rbn")},
    "prepbn": lambda: build_norm("prepbn", C, total_updates=30),
}
#: kind -> the statistics that are estimated, from the rows that count
ESTIMATES = {
    "batch": dict(running_mean=lambda rows: rows.mean(0), running_var=lambda rows: rows.var(0)),
    "prepbn": dict(running_mean=lambda rows: rows.mean(0), running_var=lambda rows: rows.var(0)),
    "rbn": dict(running_mean=lambda rows: rows.mean(0), running_var=lambda rows: rows.var(0, unbiased=False)),
    "batch-renorm": dict(
        running_mean=lambda rows: rows.mean(0), running_std=lambda rows: rows.std(0, unbiased=False) + 1e-3
    ),
    **dict.fromkeys(("mabn", "un"), dict(running_var=lambda rows: rows.square().mean(0))),
}
SECOND_MOMENT = dict(running_phi=lambda rows: rows.square().mean(0))


def model_of(kind):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(C, C), KINDS[kind](), nn.Linear(C, C), KINDS[kind]()]).double()


def forward(model, batch):
    x, mask = batch
    for module in model:
        x = module(x) if isinstance(module, nn.Linear) else module(x, mask)
    return x


def batches(number=5):
    generator = torch.Generator().manual_seed(1)
    for index in range(number):
        x = torch.randn(7, 3, C, generator=generator, dtype=torch.float64) * 3 + 1
        yield x, torch.arange(7).unsqueeze(0) >= torch.tensor([7, 4, 1 + index]).unsqueeze(1)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_all_batches(kind):
    """The first norm's moments are those of the valid rows of all batches together; only they change."""
    model = model_of(kind).eval()
    norm = model[1]
    norm.iters.fill_(17)
    before = copy.deepcopy(model.state_dict())
    assert recalibrate(model, batches(), forward) == 5
    rows = torch.cat([model[0](x)[mask.t().logical_not()] for x, mask in batches()]).detach()
    estimates = ESTIMATES.get(kind, SECOND_MOMENT)
    for name, estimate in estimates.items():
        torch.testing.assert_close(norm.get_buffer(name), estimate(rows))
    changed = {name.split(".")[1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(estimates)
    assert not model.training and norm.stage is None


@pytest.mark.parametrize("size", [1000.0, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_checkpoint_had_does_not_matter(kind, size):
    """Statistics that are far off give, at every depth, the same estimate as those of a fresh model."""
    fresh, spoilt = model_of(kind), model_of(kind)
    for norm in (spoilt[1], spoilt[3]):
        for name, buffer in norm.named_buffers():
            if kind != "prepbn" or name != "iters":  # whose step is a part of its function
                buffer.fill_(1000.0 if name == "iters" else size)
    for model in (fresh, spoilt):
        recalibrate(model, batches(), forward)
    for i in (1, 3):
        for name, buffer in fresh[i].named_buffers():
            if name not in ("iters", "ema_gz", *fresh[i].windows):
                torch.testing.assert_close(buffer, spoilt[i].get_buffer(name))


@pytest.mark.parametrize("kind", [dict, tuple, list, None])
def test_any_iterable_of_batches(kind):
    """Keyword arguments, positional ones or a single tensor, from a generator: the statistics of all rows."""
    model = nn.Sequential(nn.Linear(C, C), MaskedBatchNorm(C, groups=0)).eval()
    rows = [torch.randn(5, C), torch.randn(7, C)]
    made = {dict: lambda x: {"input": x}, tuple: lambda x: (x,), list: lambda x: [x], None: lambda x: x}[kind]
    assert recalibrate(model, (made(x) for x in rows)) == 2
    with torch.no_grad():
        torch.testing.assert_close(model[1].running_mean, model[0](torch.cat(rows)).mean(0))


Sizes = namedtuple("Sizes", "shift, scales")


class Shifted(nn.Module):
    """Takes a named tuple with a tuple in it."""

    def __init__(self):
        super().__init__()
        self.norm = MaskedBatchNorm(C, groups=0)

    def forward(self, x, sizes):
        assert type(sizes.scales) is tuple
        return self.norm(x * sizes.scales[0] + sizes.shift)


class Packed(nn.Module):
    """Takes a packed sequence."""

    def __init__(self):
        super().__init__()
        self.norm = MaskedBatchNorm(C, groups=0)

    def forward(self, packed):
        return self.norm(packed.data)


def test_batches_with_tuples_in_them():
    """Named tuples and tuples reach the model as what they are, and a packed sequence is one argument."""
    rows = torch.randn(5, C)
    model = Shifted()
    recalibrate(model, [(rows, Sizes(torch.ones(C), (2.0,)))])
    torch.testing.assert_close(model.norm.running_mean, 2 * rows.mean(0) + 1)
    model = Packed()
    recalibrate(model, [nn.utils.rnn.pack_sequence([rows])])
    torch.testing.assert_close(model.norm.running_mean, rows.mean(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_is_not_reached_keeps_its_statistics(kind):
    """Of a layer that no batch goes through nothing is known: to the last bit what was there."""
    model = nn.ModuleList([*model_of(kind), KINDS[kind]().double()])
    for name, buffer in model[4].named_buffers():
        buffer.fill_(17.0 if name == "iters" else 0.7)
    before = copy.deepcopy(model[4].state_dict())
    recalibrate(model, batches(), lambda model, batch: forward(model[:4], batch))
    assert all(torch.equal(value, before[name]) for name, value in model[4].state_dict().items())


def test_each_module_stays_in_its_mode():
    """A part that was in evaluation is so again."""
    model = nn.Sequential(PowerNorm(8), nn.Sequential(nn.Dropout(), PowerNorm(8)).eval())
    recalibrate(model, [torch.randn(4, 8)])
    assert [each.training for each in model.modules()] == [True, True, False, False, False]


class Frozen(nn.Sequential):
    """Keeps its norms in evaluation, as models do that are fine-tuned with frozen norms."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_norms_that_a_model_keeps_frozen():
    """They are what is to be estimated; and where they are bypassed all the same, that is an error."""
    frozen, plain = (kind(*model_of("batch")[:2]) for kind in (Frozen, nn.Sequential))
    plain.load_state_dict(frozen.state_dict())
    xs = [x for x, _ in batches()]
    assert recalibrate(frozen.train(), xs) == recalibrate(plain, xs) == 5
    assert torch.equal(frozen[1].running_var, plain[1].running_var) and frozen.training and not frozen[1].training
    with pytest.raises(ValueError, match="no batch went through a norm in training mode"):
        recalibrate(frozen, xs, lambda model, x: model.eval()(x))


def test_update_bn_and_sync_batch_norm_do_nothing():
    """What torch has for its own batch norms passes over these: buffers and modules stay, as the documentation says."""
    model = nn.Sequential(nn.Linear(C, C), MaskedBatchNorm(C))
    before = copy.deepcopy(model.state_dict())
    torch.optim.swa_utils.update_bn([torch.randn(5, C)], model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1], MaskedBatchNorm)


def test_bad_calls_are_named_and_change_nothing():
    """No norm with statistics, no batch, or batches that are not finite: ValueError, statistics as before."""
    with pytest.raises(ValueError, match="no norm of the model has running statistics"):
        recalibrate(nn.ModuleList([LayerNorm(C)]), batches(), forward)
    model = model_of("algorithm2")
    with pytest.raises(ValueError, match="no batches"):
        recalibrate(model, [], forward)
    with pytest.raises(ValueError, match="statistics of 1 are not finite"):
        recalibrate(model, [(x * float("nan"), mask) for x, mask in batches()], forward)
    assert torch.equal(model[1].running_phi, torch.ones(C, dtype=torch.float64)) and model[1].stage is None
    model.train = refuse_training
    with pytest.raises(RuntimeError, match="cannot be trained"):
        recalibrate(model, batches(), forward)
    assert model[1].stage is None


@pytest.fixture(scope="module")
def spoilt(toy_data, tmp_path_factory):
    """A trained checkpoint, and the same with running statistics that are off by far."""
    folder = tmp_path_factory.mktemp("recalibrate")
    test_cli.train(toy_data, folder, "--max-update", 60, "--disable-validation", "--dropout", 0)
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    for name, value in state["model"].items():
        if name.endswith("running_phi"):
            value.copy_(torch.linspace(1, 400, len(value)))
    torch.save(state, folder / "spoilt.pt")
    return folder


def recalibrated(data, path, output, *arguments, **options):
    return toy.command(
        "python", "-m", "fairseq_powernorm.recalibrate", data, "--path", path, "--output", output, "--cpu", *arguments,
        **options,
    )


def valid_loss(data, path):
    done = toy.command(
        "fairseq-validate", data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--cpu", "--path", path,
        "--valid-subset", "valid", "--num-workers", 0, "--log-format", "json", "--max-tokens", 400,
    )
    return float(re.findall(r'"(?:valid_)?loss": "?([\d.]+)', done.stdout + done.stderr)[-1])


@pytest.mark.slow
def test_command_mends_a_checkpoint(toy_data, spoilt, tmp_path):
    """With spoilt statistics the loss is far worse; the command brings back that of the run's own, and touches no
    parameter.
    """
    done = recalibrated(toy_data, spoilt / "spoilt.pt", tmp_path / "new.pt", "--batches", 3, "--max-tokens", 400)
    assert "statistics of 3 batches" in done.stdout
    own, bad, new = (
        valid_loss(toy_data, p) for p in (spoilt / "checkpoint_last.pt", spoilt / "spoilt.pt", tmp_path / "new.pt")
    )
    assert bad > own + 0.2 and abs(new - own) < 0.05, (own, bad, new)
    before, after = (torch.load(p, weights_only=True) for p in (spoilt / "spoilt.pt", tmp_path / "new.pt"))
    for name, value in before["model"].items():
        assert value.dtype == after["model"][name].dtype and value.shape == after["model"][name].shape
        assert name.endswith("running_phi") or torch.equal(value, after["model"][name])
    assert before.keys() == after.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--batches", 0), "--batches 0: must be 1 or more"),
        (("--batches", 2, "--subset", "nothing"), "--subset 'nothing'"),
        (("--batches", 2, "--path", "nowhere.pt"), "'nowhere.pt': no such file"),
    ],
)
def test_wrong_arguments_of_the_command(toy_data, spoilt, tmp_path, arguments, message):
    """A message that names the argument, no traceback, no file."""
    done = recalibrated(toy_data, spoilt / "spoilt.pt", tmp_path / "new.pt", *arguments, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_overwrites_nothing(toy_data, spoilt, tmp_path):
    """An existing output is left alone without --force."""
    (tmp_path / "new.pt").write_text("mine")
    done = recalibrated(toy_data, spoilt / "spoilt.pt", tmp_path / "new.pt", "--batches", 1, check=False)
    assert done.returncode == 1 and "exists" in done.stderr and (tmp_path / "new.pt").read_text() == "mine"
