"""What the README says is true: its examples run, its tables match the code and the records."""
import inspect
import json
import re
import shlex
import shutil

import pytest
import toy

from fairseq_powernorm.models.tensorized_lm_pn import TensorizedLMPNConfig
from fairseq_powernorm.models.transformer_pn import TransformerPNConfig
from fairseq_powernorm.norms import NORMS, PowerNorm, RunningNorm, norm_options
from fairseq_powernorm.options import (
    INFERENCE_FIELDS,
    NORM_FIELDS,
    STATISTICS_FIELDS,
    NormOptions,
    StatisticsOptions,
    flag,
)

README, PACKAGE, RESULTS = "README.md", "fairseq_powernorm/README.md", "results/README.md"
NAMES = (README, PACKAGE, RESULTS, "scripts/README.md", "configs/README.md", "tests/checks/README.md", "CONTRIBUTING.md")
TEXTS = {name: (toy.ROOT / name).read_text(encoding="utf-8") for name in NAMES}


def blocks(language, name=README):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], re.S)


def anchors(text):
    """The anchors that a code host gives the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_read_to_the_end():
    """The README has at most 150 lines, and no table of more than nine columns; the rest stands in the folders' own."""
    assert len(TEXTS[README].splitlines()) <= 150
    assert max(line.count("|") for line in TEXTS[README].splitlines() if line.startswith("|")) <= 10


def test_the_module_example_runs():
    """The Python example, as it stands, gives an output of the input's shape."""
    names = {}
    (example,) = blocks("python")
    exec(example, names)
    assert names["y"].shape == names["x"].shape
    norms = [module for module in names["model"].modules() if isinstance(module, PowerNorm)]
    assert len(norms) == 4 and all(float(norm.iters) == 1 for norm in norms)


@pytest.mark.slow
def test_the_command_line_and_the_yaml_train_the_same_model(toy_data, tmp_path):
    """The README's fairseq-train line and configs/demo.yaml: the same loss at each of 10 updates, to the last digit."""
    (line,) = [block for block in blocks("bash") if block.startswith("fairseq-train")]
    words = shlex.split(line.replace("\\\n", " "))
    assert words[1] == "data/demo/data-bin"
    words[1] = toy_data
    shorter = {"max-update": 5, "max-tokens": 400, "log-interval": 1, "log-format": "json"}
    plain = toy.command(
        *words, *(w for key, value in shorter.items() for w in (f"--{key}", value)), "--cpu", "--num-workers", 0,
        "--data-buffer-size", 0, "--save-dir", tmp_path / "plain", "--no-epoch-checkpoints",
    )
    hydra = toy.command(
        "fairseq-hydra-train", "--config-dir", "configs", "--config-name", "demo", f"task.data={toy_data}",
        f"common.user_dir={toy.ROOT / 'fairseq_powernorm'}", f"checkpoint.save_dir={tmp_path / 'yaml'}",
        "optimization.max_update=5", "dataset.max_tokens=400", "common.log_interval=1", "common.cpu=True",
        f"hydra.run.dir={tmp_path / 'hydra'}", "hydra.job.chdir=False", "hydra/job_logging=stdout",
    )
    losses = [toy.losses(done.stdout + done.stderr) for done in (plain, hydra)]
    assert sorted(losses[0]) == list(range(1, 6))
    assert losses[0] == losses[1]
    (line,) = [block for block in blocks("bash") if block.startswith("fairseq-generate")]
    words = shlex.split(line.replace("\\\n", " "))
    words[1], words[words.index("--path") + 1] = toy_data, tmp_path / "plain" / "checkpoint_last.pt"
    # after 5 updates a translation has no end
    assert "BLEU4 = " in toy.command(*words, "--cpu", "--num-workers", 0, "--max-len-a", 1, "--max-len-b", 2).stdout


def test_the_table_of_flags_is_complete():
    """Every norm option of models and tasks stands in the table with its default, and nothing else that looks like one."""
    text = TEXTS[PACKAGE]
    in_table = set(re.findall(r"`(--(?:(?:norm|no-fold|encoder-norm|decoder-norm|tensorized)-[a-z-]+|post-norm))`", text))
    tensorized = {flag(name) for name in TensorizedLMPNConfig.__dataclass_fields__ if name.startswith("tensorized")}
    norms = {flag(name) for name in NORM_FIELDS + STATISTICS_FIELDS + INFERENCE_FIELDS}
    assert len(tensorized) == 4 and in_table == norms | {"--post-norm"} | tensorized
    assert "post_norm" in TransformerPNConfig.__dataclass_fields__
    own = {f"norm_{name}": p.default for name, p in inspect.signature(PowerNorm).parameters.items()}
    assert all(value is None for name, value in vars(NormOptions()).items() if name in own)  # left to the norm
    defaults = {**own, **vars(StatisticsOptions())}
    named = ("norm_alpha_fwd", "norm_warmup_updates", "norm_variant", "norm_eps", "norm_sync", "norm_record_interval")
    for name in named:
        row = next(row for row in text.split("\n") if row.startswith("|") and flag(name) in row)
        assert re.search(rf"\(`?{re.escape(str(defaults[name]).replace('1e-05', '1e-5'))}`?\)", row), row
    warmed = {name for name in NORMS if "warmup_updates" in norm_options(name)}
    (row,) = (row for row in text.split("\n") if row.startswith("| `--norm-warmup-updates`"))
    assert {*re.findall(r"`([a-z-]+)`", row.replace("--norm", "")), "power"} == {*warmed, "-warmup-updates"}


def test_the_tables_of_norms_are_complete():
    """Every norm stands in the table of norms, and in that of trainers where it needs one, and nothing else."""
    text = TEXTS[PACKAGE]
    (table,) = re.findall(r"^\| norm \| what \|\n((?:\|.*\n)+)", text, re.M)
    assert set(re.findall(r"`([a-z-]+)`", " ".join(row.split("|")[1] for row in table.splitlines()))) == set(NORMS)
    (table,) = re.findall(r"^\| norm \| layouts \|.*\n\|.*\n((?:\|.*\n)+)", text, re.M)
    running, others = (set(re.findall(r"`([a-z-]+)`", row.split("|")[1])) for row in table.splitlines())
    assert running == {name for name, kind in NORMS.items() if issubclass(kind, RunningNorm)}
    assert running | others == set(NORMS) and not running & others


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """Each relative link names a file of the repository, and a heading in it where it has an anchor."""
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", TEXTS[name]):
        path = (toy.ROOT / name).parent / target if target else toy.ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def read_off(name, after):
    """quantity -> norm -> mean, smallest, largest over norms and updates, of a table's figures after some updates."""
    found = {}
    for run, each in json.loads((toy.ROOT / "results" / f"{name}.figures.json").read_text())["statistics"].items():
        late = [i for i, update in enumerate(each["updates"]) if update > after]
        for quantity, series in each["quantities"].items():
            mean, low, high = ([series[key][i] for i in late] for key in ("mean", "smallest", "largest"))
            found.setdefault(quantity, {})[run.split("/")[1].split("-seed")[0]] = sum(mean) / len(mean), min(low), max(high)
    return found


def percent(*values):
    return f"{' to '.join(f'{100 * value:.0f}' for value in values)} %"


@pytest.mark.parametrize("name, after", [("table1-demo", 200), ("all-norms/figures-multi30k-605", 150)])
def test_what_figures_5_and_6_say(name, after):
    """The numbers in the paragraphs are those of the figures' data."""
    text, found, whole = " ".join(TEXTS[RESULTS].split()), read_off(name, after), read_off(name, 0)
    mean, deviation, ratio, smaller = (
        {norm: values[0] for norm, values in found[quantity].items()}
        for quantity in ("discrepancy_mean", "discrepancy_std", "gradient_ratio", "gradient_smaller")
    )
    above = {norm: round(values[2], 3) for norm, values in found["gradient_ratio"].items() if values[2] >= 1}
    said = [f"{min(ratio.values()):.2f} to {max(ratio.values()):.2f} of BN's",
            f"in {percent(min(smaller.values()), max(smaller.values()))} of the channels"]
    if name == "table1-demo":
        said += [f"deviations are on average {percent(min(deviation.values()), max(deviation.values()))} away",
                 f"means are off by {percent(min(mean.values()), max(mean.values()))} of a standard deviation"]
        assert above == {"mabn-800": 1.021} and "where one norm comes to 1.02;" in text
        assert found["nu_largest"]["power-800"][2] < 0.004 < whole["nu_largest"]["power-800"][2] < 0.01
    else:
        renorm = percent(deviation.pop("batch-renorm-all-605"))
        said += [f"deviations are on average {percent(min(deviation.values()), max(deviation.values()))} away",
                 f"(batch renormalization: {renorm})", f"off by {percent(mean['batch-all-605'])} (BN and RBN)",
                 f"{percent(mean['prepbn-all-605'])} (PRepBN) and {percent(mean['batch-renorm-all-605'])} (batch renorm"]
        assert percent(mean["batch-all-605"]) == percent(mean["rbn-all-605"])
        assert above == {"power-all-605": 1.015, "un-all-605": 1.001} and "(1.015) and UN's (1.001)" in text
        ranges = whole["gradient_ratio"].values()
        said.append(f"vary from {min(low for _, low, _ in ranges):.2f} to {max(high for *_, high in ranges):.2f}.")
        largest = [max(values[2] for values in each["nu_largest"].values()) for each in (whole, found)]
        assert largest[0] < 0.03 and largest[1] < 0.006 and "stays below 0.03, and after update 150 below 0.006" in text
    for words in said:
        assert words in text


def test_what_is_said_of_speed():
    """The ranges in both texts are those of the cells of the record that they name."""
    path = re.search(r"<!-- records: (results/benchmark/\S+) -->", TEXTS[RESULTS])[1]
    cells = [each for each in json.loads((toy.ROOT / path).read_text())["cells"] if each["level"] == "layer"]

    def ratios(which, dtype, *rows, memory=("default", "recycled")):
        found = [cell["contenders"]["power-g4"]["ratio"] for cell in cells if cell["memory"] in memory
                 and cell["pass"] == which and cell["dtype"] == dtype and cell["rows"] in rows]
        return found, f"{min(found):.2f} to {max(found):.2f}"

    many = 2048, 4096, 65536
    for name, few in ((README, "a single one"), (RESULTS, "one row")):
        text = " ".join(TEXTS[name].split())
        single, double = (ratios("train", dtype, 1)[0] for dtype in ("float32", "bfloat16"))
        said = [f"in {ratios('train', 'float32', *many)[1]} of LayerNorm's time in float32" if name == README else
                f"in {ratios('train', 'float32', *many)[1]} of its time in float32",
                f"in {ratios('train', 'bfloat16', *many)[1]} in bfloat16", ratios("train", "float32", 512)[1],
                f"{few} {min(single):.1f} to {max(double):.1f} times as long"]
        if name == RESULTS:
            said += [f"{words} {ratios('eval', dtype, *many)[1]}"
                     for dtype, words in (("float32", "float32 takes"), ("bfloat16", "bfloat16"))]
            default, kept = (ratios("train", "float32", 65536, memory=[memory])[1] for memory in ("default", "recycled"))
            said.append(f"{default} of LayerNorm's time by default, and {kept} when memory is kept")
        for words in said:
            assert words in text


def test_what_is_said_of_the_full_recipe():
    """Scores, their difference and its significance in both texts are those of the records."""
    folder = toy.ROOT / "results"
    layer, power = (json.loads((folder / "multi30k" / f"{norm}-8000-seed1.json").read_text()) for norm in ("layer", "power"))
    tests = json.loads((folder / "table1-multi30k.significance.json").read_text())["tests"]
    p_value = f"(p = {tests['multi30k/power-8000-seed1']['p_value']:.3f})"
    scores = [f"{record['bleu_tokenized']['score']:.2f}" for record in (power, layer)]
    ahead = power["sacrebleu"]["score"] - layer["sacrebleu"]["score"]
    assert ahead > 0 and power["curve"]["valid"][-1]["loss"] < layer["curve"]["valid"][-1]["loss"]
    for name, said in ((README, f"PN has {scores[0]} BLEU and LayerNorm {scores[1]}"),
                       (RESULTS, f"PN is ahead of LN by {ahead:.2f} sacreBLEU")):  # fmt: skip
        text = " ".join(TEXTS[name].split())
        assert said in text and p_value in text


@pytest.mark.slow
def test_the_results_are_those_of_the_records(tmp_path):
    """The tables of results are what the command that the README names writes; it fails if a record says otherwise."""
    command = re.search(r"`(python -m fairseq_powernorm\.experiments\.report --readme)`", TEXTS[RESULTS])[1].split()
    names = ("README.md", "results/README.md")
    assert toy.command(*command, "--check").stdout == "".join(f"{name} is that of its records\n" for name in names)
    for name in ("fairseq_powernorm", "configs", "results"):
        shutil.copytree(toy.ROOT / name, tmp_path / name)
    record = tmp_path / "results" / "multi30k" / "power-605-seed1.json"
    score = json.loads(record.read_text())["bleu_tokenized"]["score"]
    record.write_text(record.read_text().replace(f'"score": {score}', f'"score": {score + 30}'))
    (tmp_path / "README.md").write_text(TEXTS[README], encoding="utf-8")
    assert toy.command(*command, "--check", cwd=tmp_path, check=False).returncode == 1
    toy.command(*command, cwd=tmp_path)
    for name in names:
        written = (tmp_path / name).read_text(encoding="utf-8")
        changed = [row for row, old in zip(written.splitlines(), TEXTS[name].splitlines()) if row != old]
        (row,) = changed
        assert row.startswith("| power | encoder | yes | reference |")
    record.write_text("{}")
    assert "is not a valid record" in toy.command(*command, cwd=tmp_path, check=False).stderr
    assert (tmp_path / names[-1]).read_text(encoding="utf-8") == written
