"""What the README says is true: its examples run, its tables match the code and the records."""
import inspect
import re
import shlex
import shutil

import pytest
import toy

from fairseq_powernorm.models.tensorized_lm_pn import TensorizedLMPNConfig
from fairseq_powernorm.models.transformer_pn import TransformerPNConfig
from fairseq_powernorm.norms import PowerNorm
from fairseq_powernorm.options import (
    INFERENCE_FIELDS,
    NORM_FIELDS,
    STATISTICS_FIELDS,
    NormOptions,
    StatisticsOptions,
    flag,
)

README = (toy.ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_module_example_runs():
    """The Python example, as it stands, gives an output of the input's shape."""
    names = {}
    (example,) = blocks("python")
    exec(example, names)
    assert names["y"].shape == names["x"].shape
    assert float(names["norm"].iters) == 1


def test_the_command_line_and_the_yaml_train_the_same_model(toy_data, tmp_path):
    """The README's fairseq-train line and configs/demo.yaml: the same loss at each of 10 updates, to the last digit."""
    (line,) = [block for block in blocks("bash") if block.startswith("fairseq-train")]
    words = shlex.split(line.replace("\\\n", " "))
    assert words[1] == "data/demo/data-bin"
    words[1] = toy_data
    shorter = {"max-update": 10, "max-tokens": 400, "log-interval": 1, "log-format": "json"}
    plain = toy.command(
        *words, *(w for key, value in shorter.items() for w in (f"--{key}", value)), "--cpu", "--num-workers", 0,
        "--data-buffer-size", 0, "--save-dir", tmp_path / "plain", "--no-epoch-checkpoints",
    )
    hydra = toy.command(
        "fairseq-hydra-train", "--config-dir", "configs", "--config-name", "demo", f"task.data={toy_data}",
        f"common.user_dir={toy.ROOT / 'fairseq_powernorm'}", f"checkpoint.save_dir={tmp_path / 'yaml'}",
        "optimization.max_update=10", "dataset.max_tokens=400", "common.log_interval=1", "common.cpu=True",
        f"hydra.run.dir={tmp_path / 'hydra'}", "hydra.job.chdir=False", "hydra/job_logging=stdout",
    )
    losses = [toy.losses(done.stdout + done.stderr) for done in (plain, hydra)]
    assert sorted(losses[0]) == list(range(1, 11))
    assert losses[0] == losses[1]


def test_the_table_of_flags_is_complete():
    """Every norm option of models and tasks stands in the table with its default, and nothing else that looks like one."""
    in_table = set(re.findall(r"`(--(?:(?:norm|no-fold|encoder-norm|decoder-norm|tensorized)-[a-z-]+|post-norm))`", README))
    tensorized = {flag(name) for name in TensorizedLMPNConfig.__dataclass_fields__ if name.startswith("tensorized")}
    norms = {flag(name) for name in NORM_FIELDS + STATISTICS_FIELDS + INFERENCE_FIELDS}
    assert len(tensorized) == 4 and in_table == norms | {"--post-norm"} | tensorized
    assert "post_norm" in TransformerPNConfig.__dataclass_fields__
    own = {f"norm_{name}": p.default for name, p in inspect.signature(PowerNorm).parameters.items()}
    assert all(value is None for name, value in vars(NormOptions()).items() if name in own)  # left to the norm
    defaults = {**own, **vars(StatisticsOptions())}
    named = ("norm_alpha_fwd", "norm_warmup_updates", "norm_variant", "norm_eps", "norm_sync", "norm_record_interval")
    for name in named:
        row = next(row for row in README.split("\n") if row.startswith("|") and flag(name) in row)
        assert re.search(rf"\(`?{re.escape(str(defaults[name]).replace('1e-05', '1e-5'))}`?\)", row), row


@pytest.mark.parametrize("target", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_lead_somewhere(target):
    """Each relative link names a file of the repository."""
    assert (toy.ROOT / target).exists()


def test_the_results_are_those_of_the_records(tmp_path):
    """The tables of results are what the command that the README names writes; it fails if a record says otherwise."""
    command = re.search(r"`(python -m fairseq_powernorm\.experiments\.report --readme)`", README)[1].split()
    assert toy.command(*command, "--check").stdout == "README.md is that of its records\n"
    for name in ("fairseq_powernorm", "configs", "results"):
        shutil.copytree(toy.ROOT / name, tmp_path / name)
    record = tmp_path / "results" / "multi30k" / "power-seed1.json"
    record.write_text(record.read_text().replace('"score": 40.25092547103771', '"score": 41.25092547103771'))
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    assert toy.command(*command, "--check", cwd=tmp_path, check=False).returncode == 1
    toy.command(*command, cwd=tmp_path)
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written == README.replace("| 1 | 40.25 |", "| 1 | 41.25 |") != README
    record.write_text("{}")
    assert "is not a valid record" in toy.command(*command, cwd=tmp_path, check=False).stderr
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == written
