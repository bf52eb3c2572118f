"""What holds of a model whichever norm stands in it: it trains, goes on, folds and is exported."""
import pytest
import torch
import toy
from test_cli import TRAIN
from test_resume import check_same_end

from fairseq_powernorm import export
from fairseq_powernorm.fold import fold_norms
from fairseq_powernorm.norms import NORMS
from fairseq_powernorm.statistics import RunningStatistics

pytest.importorskip("onnx")


def log_probabilities(model):
    with torch.no_grad():
        return model.get_normalized_probs(model(*toy.batch()), log_probs=True)


@pytest.fixture(scope="module", params=list(NORMS))
def trained(request):
    """A model with one norm in all four places after a few updates, and its losses."""
    model = toy.build(randomize=False, **dict.fromkeys(toy.ALL_POWER, request.param))
    statistics = RunningStatistics(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    source, lengths, target = toy.batch()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with statistics.batch():
            output = model(source, lengths, target)[0]
            loss = torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=1)
            loss.backward()
        optimizer.step()
        statistics.commit()
        losses.append(float(loss.detach()))
    statistics.release()
    return model.eval(), losses


def test_trains(trained):
    """Twelve updates on one batch lower the loss; every parameter has a finite gradient."""
    model, losses = trained
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("file_format", ["torchscript", "onnx"])
def test_folds_and_is_exported(trained, file_format, tmp_path):
    """Folded, the log-probabilities are the same; a file of either kind computes them."""
    model, _ = trained
    state, expected = model.state_dict(), log_probabilities(model)
    copy = toy.build(randomize=False, **{place: norm_of(model, place) for place in toy.ALL_POWER})
    copy.load_state_dict(state)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert export.export(copy, file_format, str(tmp_path / "file")) < tolerance
    torch.testing.assert_close(log_probabilities(fold_norms(copy)), expected, rtol=0, atol=tolerance)


def norm_of(model, place):
    side = model.encoder if place.startswith("encoder") else model.decoder
    kind = type(side.layers[0].self_attn_layer_norm)
    return next(name for name, each in NORMS.items() if each is kind)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(NORMS), 4))
def test_goes_on_where_it_stopped(first, toy_data, tmp_path):
    """fairseq-train with a norm in each of the four places: stopped after 4 of 8 updates and resumed, the end is the same
    bit for bit, and fairseq-generate translates with what was saved.
    """
    names = [*NORMS, *NORMS][first : first + len(toy.ALL_POWER)]
    places = [word for place, name in zip(toy.ALL_POWER, names) for word in (f"--{place.replace('_', '-')}", name)]
    common = ("fairseq-train", toy_data, "--user-dir", "fairseq_powernorm", *TRAIN, *places, "--dropout", 0.1,
              "--norm-total-updates", 8)
    for folder, updates in (("whole", 8), ("parts", 4), ("parts", 8)):
        toy.command(*common, "--save-dir", tmp_path / folder, "--max-update", updates)
    check_same_end(tmp_path / "whole", tmp_path / "parts")
    done = toy.command(
        "fairseq-generate", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--cpu",
        "--path", tmp_path / "whole" / "checkpoint_last.pt", "--beam", 2, "--max-len-b", 10,
    )
    assert done.stdout.count("\nH-") == 61
