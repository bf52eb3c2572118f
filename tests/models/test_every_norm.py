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


def in_places(first):
    """The four places of a model -> norms, from the one of that number on."""
    return dict(zip(toy.ALL_POWER, [*NORMS, *NORMS][first:]))


def trained(norms, **sizes):
    """A model with these norms after a few updates, and its losses."""
    model = toy.build(randomize=False, **norms, **sizes)
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


@pytest.mark.parametrize("norm", NORMS)
def test_trains(norm):
    """A norm in all four places: twelve updates on one batch lower the loss; every parameter has a finite gradient."""
    model, losses = trained(dict.fromkeys(toy.ALL_POWER, norm))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(NORMS), len(toy.ALL_POWER)))
def test_folds_and_is_exported(first, tmp_path):
    """A norm in each of the four places: folded, the log-probabilities are the same; a file of either kind computes them."""
    model, _ = trained(in_places(first), encoder_layers=1, decoder_layers=1)
    expected = log_probabilities(model)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    for file_format in export.FORMATS:
        assert export.export(model, file_format, str(tmp_path / file_format)) < tolerance
    torch.testing.assert_close(log_probabilities(fold_norms(model)), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(NORMS), len(toy.ALL_POWER)))
def test_goes_on_where_it_stopped(first, toy_data, tmp_path):
    """fairseq-train with a norm in each of the four places: stopped after 4 of 8 updates and resumed, the end is the same
    bit for bit, and fairseq-generate translates with what was saved.
    """
    places = [word for place, name in in_places(first).items() for word in (f"--{place.replace('_', '-')}", name)]
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
