"""RBN and PRepBN in fairseq's trainer: the penalty in the loss and in the log, and the length of the run."""
import json

import pytest
import torch
from fairseq import checkpoint_utils
from test_kinds import SMALL, run

NORMS = ("--encoder-norm-self", "rbn:p_mean=5", "--encoder-norm-ff", "prepbn")


def train(monkeypatch, caplog, data, folder, *words):
    """The model after one update, and the values of ``norm_penalty`` in the log."""
    caplog.clear()
    caplog.set_level("INFO")
    run(
        monkeypatch, folder, data, "--task", "translation_pn", "--arch", "transformer_pn", *SMALL, *NORMS,
        "--log-format", "json", "--log-interval", 1, "--dropout", 0, "--seed", 1, *words,
    )  # fmt: skip
    lines = [json.loads(text) for text in caplog.messages if text.startswith("{") and '"norm_penalty"' in text]
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(folder / "checkpoint_last.pt")])
    return model, [float(line["norm_penalty"]) for line in lines]


@pytest.mark.slow
def test_the_task_adds_and_logs_it(toy_data, tmp_path, monkeypatch, caplog):
    """The penalty is logged by itself and changes what is learned, the same under activation checkpointing; PRepBN takes
    the number of updates of the run, which the checkpoint knows.
    """
    plain, logged = train(monkeypatch, caplog, toy_data, tmp_path / "plain")
    assert logged and all(value > 0 for value in logged)
    layer = plain.encoder.layers[0]
    assert layer.final_layer_norm.total_updates == layer.final_layer_norm.steps() == 1
    checkpointed, same = train(monkeypatch, caplog, toy_data, tmp_path / "again", "--checkpoint-activations")
    assert same == pytest.approx(logged, rel=1e-4)
    names = {name.replace("._checkpoint_wrapped_module", ""): value for name, value in checkpointed.state_dict().items()}
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(names[name], value, rtol=1e-4, atol=1e-5, msg=name)
    without, nothing = train(
        monkeypatch, caplog, toy_data, tmp_path / "without", "--encoder-norm-self", "rbn:p_mean=0,p_var=0"
    )
    assert not any(nothing)
    assert not torch.equal(without.encoder.embed_tokens.weight, plain.encoder.embed_tokens.weight)
