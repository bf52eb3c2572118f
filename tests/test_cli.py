"""fairseq's own commands with ``--user-dir``: as a user types them."""
import json
import re

import pytest
import torch
import toy

pytestmark = pytest.mark.slow

TRAIN = (
    "--arch", "transformer_pn_iwslt_de_en", "--share-all-embeddings", "--task", "translation_pn",
    "--encoder-layers", 2, "--decoder-layers", 2, "--encoder-embed-dim", 32, "--decoder-embed-dim", 32,
    "--encoder-ffn-embed-dim", 64, "--decoder-ffn-embed-dim", 64,
    "--optimizer", "adam", "--lr", 0.005, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 20,
    "--norm-warmup-updates", 10, "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1,
    "--max-tokens", 400, "--log-format", "json", "--log-interval", 1, "--no-progress-bar",
    "--cpu", "--num-workers", 0, "--data-buffer-size", 0, "--no-epoch-checkpoints", "--seed", 1,
)  # fmt: skip

def train(data, save_dir, *arguments, user_dir="fairseq_powernorm", **options):
    return toy.command(
        "fairseq-train", data, "--user-dir", user_dir, *TRAIN, "--save-dir", save_dir, *arguments, **options
    )


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory):
    """A PN model after 12 updates, with BLEU at validation; and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = train(
        toy_data, folder, "--max-update", 12, "--eval-bleu", "--eval-bleu-args", '{"beam": 2}', "--eval-bleu-remove-bpe",
        cold=True,  # warnings that loading fairseq gives are part of what it prints
    )
    return folder, done


def test_training_writes_psi_and_nu(trained):
    """A run leaves a checkpoint whose norms have taken one step an update, and logs BLEU by sacreBLEU."""
    folder, done = trained
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
    steps = {name: float(value) for name, value in state.items() if name.endswith(".iters")}
    assert len(steps) == 5 and set(steps.values()) == {12.0}
    assert state["encoder.layer_norm.running_phi"].shape == (32,)
    assert (state["encoder.layers.0.final_layer_norm.ema_gz"] != 0).any()
    assert re.search(r'"valid_bleu": "?[\d.]+', done.stdout + done.stderr)
    assert len(toy.losses(done.stdout + done.stderr)) == 12


def test_commands_are_quiet(trained):
    """A training command prints no warning that its user can do nothing about."""
    _, done = trained
    noisy = [line for line in (done.stdout + done.stderr).splitlines() if "Warning" in line]
    assert not noisy, noisy


def test_generation_covers_the_whole_test_set(toy_data, trained):
    """fairseq-generate translates each of 61 sentences, though 61 is no multiple of fairseq's batch size multiple."""
    done = toy.command(
        "fairseq-generate", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--cpu", "--path",
        trained[0] / "checkpoint_last.pt", "--beam", 2, "--batch-size", 16, "--num-workers", 0,
    )
    assert sorted(int(n) for n in re.findall(r"^H-(\d+)", done.stdout, re.M)) == list(range(61))


def test_interactive_translation(toy_data, trained):
    """fairseq-interactive translates what it reads."""
    done = toy.command(
        "fairseq-interactive", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--cpu", "--path",
        trained[0] / "checkpoint_last.pt", "--source-lang", "de", "--target-lang", "en", stdin="d1 d2 d3\nd4 d5\n",
    )
    assert len(re.findall(r"^H-\d+", done.stdout, re.M)) == 2


def test_validation_of_a_checkpoint(toy_data, trained):
    """fairseq-validate gives the loss that training logged for the same checkpoint, and changes no file."""
    folder, done = trained
    before = (folder / "checkpoint_last.pt").read_bytes()
    validated = toy.command(
        "fairseq-validate", toy_data, "--user-dir", "fairseq_powernorm", "--task", "translation_pn", "--cpu", "--path",
        folder / "checkpoint_last.pt", "--max-tokens", 400, "--valid-subset", "valid", "--num-workers", 0,
        "--log-format", "json",
    )
    text = validated.stdout + validated.stderr
    logged = re.findall(r'"valid_loss": "([\d.]+)"', done.stdout + done.stderr)[-1]
    assert logged in re.findall(r'"(?:valid_)?loss": "?([\d.]+)', text), text[-2000:]
    assert (folder / "checkpoint_last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--encoder-norm-self", "powr"), r"--encoder-norm-self.*powr.*power-v"),
        (("--norm-groups", 3), r"--norm-groups 3: --encoder-norm-self 'power': groups=3: must .* divide the 32 channels"),
        (("--norm-alpha-fwd", 1.5), r"--norm-alpha-fwd 1.5: must lie in \[0, 1\]"),
        (("--norm-aplha-fwd", 0.5), r"unknown norm option 'norm_aplha_fwd' = '0.5'.*norm_alpha_fwd"),
        (("--norm-variant", "paper"), r"--norm-variant.*paper.*algorithm2"),
    ],
)
def test_bad_options_stop_the_command_line_before_anything_is_written(toy_data, tmp_path, arguments, message):
    """A wrong norm option: non-zero exit, a message naming option, value and choices, no save directory."""
    done = train(toy_data, tmp_path / "run", *arguments, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.S), done.stderr[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override,message",
    [
        ("+model.norm_aplha_fwd=0.5", r"unknown norm option 'norm_aplha_fwd' = 0.5.*norm_alpha_fwd"),
        ("model.encoder_norm_self=powr", "--encoder-norm-self 'powr': must be one of layer, rms, batch, power-v, power, "),
        ("+model.norm_groups=3", r"--norm-groups 3: .*groups=3: must be 0 \(no layer scale\) or divide the 128 channels"),
        ("+model.norm_alpha_bkw=2", r"--norm-alpha-bkw 2.0: must lie in \[0, 1\]"),
    ],
)
def test_bad_options_stop_a_yaml_run(toy_data, tmp_path, override, message):
    """The same through fairseq-hydra-train: non-zero exit and the option named; no checkpoint."""
    done = toy.command(
        "fairseq-hydra-train", "--config-dir", "configs", "--config-name", "demo", f"task.data={toy_data}",
        f"common.user_dir={toy.ROOT / 'fairseq_powernorm'}", f"checkpoint.save_dir={tmp_path / 'run'}",
        f"hydra.run.dir={tmp_path / 'hydra'}", "hydra.job.chdir=False", "common.cpu=True", override, check=False,
    )
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.pt"))


def test_missing_data_is_named(tmp_path):
    """A data directory that is not there: an error that names it."""
    done = train(tmp_path / "nowhere", tmp_path / "run", check=False)
    assert done.returncode != 0 and "nowhere" in done.stderr and "fairseq-preprocess" in done.stderr


def test_checkpoint_of_another_norm_is_refused(toy_data, trained, tmp_path):
    """Going on from a PN checkpoint with --encoder-norm-ff layer stops and says which norm stands where."""
    done = train(
        toy_data, tmp_path, "--restore-file", trained[0] / "checkpoint_last.pt", "--encoder-norm-ff", "layer", check=False
    )
    assert done.returncode != 0
    assert "the checkpoint has norm 'power' at encoder.layers.0.final_layer_norm, the model 'layer'" in done.stderr
    assert not list(tmp_path.glob("*.pt"))


def test_the_authors_checkpoint_generates_the_recorded_translations(oracle, tmp_path):
    """Their checkpoint as it is, and converted: at beam 5 the recorded top hypothesis of all 100 sentences."""
    recorded = json.loads((oracle / "model" / "power_enc" / "beam5_nbest.json").read_text())
    theirs = oracle / "model" / "power_enc" / "checkpoint_best.pt"
    text = (oracle / "model" / "power_enc" / "generate_beam5_lenpen1.txt").read_text()
    expected = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", text, re.M))
    assert len(expected) == len(recorded) == 100
    ours = tmp_path / "converted.pt"
    toy.command("python", "-m", "fairseq_powernorm.checkpoint", "convert", theirs, ours)
    for path in (theirs, ours):
        done = toy.command(
            "fairseq-generate", oracle / "model" / "data" / "data-bin", "--user-dir", "fairseq_powernorm", "--task",
            "translation_pn", "--path", path, "--beam", 5, "--lenpen", 1.0, "--remove-bpe", "--cpu", "--num-workers", 0,
            "--batch-size", 16,
        )
        assert dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", done.stdout, re.M)) == expected
