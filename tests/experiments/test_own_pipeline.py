"""Text of one's own from files to a table, through the scripts: a translation model as the README has it, a language model
with a YAML file.
"""
import json
import re
import shlex
import shutil

import pytest
from pipelines import SMALL, Scripts, write_text
from toy import ROOT

from fairseq_powernorm.experiments.reports import schema

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Scripts with roots of their own."""
    scripts = Scripts(tmp_path_factory.mktemp("own"))
    scripts.home = scripts.data.parent
    return scripts


def commands():
    """The commands of "Your own text" in the README: (script, its words), without what stands behind a "#"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own text")[1]
    for line in re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines():
        bash, script, *words = shlex.split(line, comments=True)
        assert bash == "bash" and script.startswith("scripts/")
        yield script[len("scripts/") : -len(".sh")], words


def test_the_commands_of_the_readme(scripts):
    """prepare, train and evaluate as they stand in the README make a record of the test text; what the run directory says
    is enough, a name before it is compared, one behind it is refused. The table's command would train what it says.
    """
    prepare, train, evaluate, table = commands()
    assert [each[0] for each in (prepare, train, evaluate, table)] == ["prepare", "train", "evaluate", "reproduce_table1"]
    text = write_text(scripts.home / "text")
    words = [str(text) if word == "my/talks" else word for word in prepare[1]]
    scripts.ok(prepare[0], *words, "--bpe-size", "60")
    output = scripts.ok(train[0], *train[1], *SMALL, *(f"+model.{side}coder_{size}_dim=32" for side in ("en", "de")
                                                        for size in ("embed", "ffn_embed")))
    run = scripts.home.joinpath(*evaluate[1])
    assert f"finished {run}: 30 updates" in output and output.startswith("talks: an update takes 1 x 400 = 400 tokens")
    assert "stands behind the run directory; write: scripts/evaluate.sh" in scripts.refuses("evaluate", run, "talks")
    assert "is a run of benchmark 'talks', not 'demo'" in scripts.refuses("evaluate", "demo", run)
    output = scripts.ok("evaluate", "talks", run)
    assert "talks power (encoder), test: BLEU4 = " in output and "nothing to do" in scripts.ok(evaluate[0], run)
    record = schema.read_record(run / "evaluation" / "record.json")
    assert (record["benchmark"], record["subset"], record["sentences"]) == ("talks", "test", 16)
    assert record["recipe"]["data"] == "talks" and record["config"]["task"]["source_lang"] == "de"
    planned = scripts.ok(table[0], *table[1], "--seeds", "1", "--dry-run")
    assert planned.count("scripts/train.sh talks ") == 2 and "scripts/prepare.sh" not in planned


def test_a_language_model(scripts):
    """reproduce_table2.sh --benchmark FILE trains, evaluates and reports a language model of one's own text without a test
    text, whose perplexity is that of valid; with another file, what is there is refused.
    """
    text = scripts.home / "novels"
    text.mkdir()
    for split, end in (("train", "train"), ("valid", "valid")):
        shutil.copy(write_text(scripts.home / "other") / f"{split}.en", text / f"{end}.txt")
    scripts.ok("prepare", "novels", "--lm", "--text-dir", text)
    file = scripts.home / "small.yaml"
    settings = ("data: novels\nmodel: {decoder_layers: 1, decoder_embed_dim: 32, decoder_ffn_embed_dim: 32}\n"
                "task: {tokens_per_sample: 8}\neval_lm: {context_window: 4}\ndataset: {batch_size: 16}\n"
                "optimization: {max_update: 60, lr: [%s]}\n")
    file.write_text(settings % 0.01)
    words = ["--benchmark", file, "--rows", "layer", "--seeds", "1", "--updates", "10",
             "--results", scripts.home / "results"]
    output = scripts.ok("reproduce_table2", *words, "common.cpu=true")
    scored = (text / "valid.txt").read_text().splitlines()
    record = json.loads((scripts.home / "results" / "small" / "layer-10-seed1.json").read_text())
    assert (record["benchmark"], record["subset"], record["updates"]) == ("small", "valid", 10)
    assert record["tokens"]["scored"] == sum(len(line.split()) + 1 for line in scored)
    assert f" {record['perplexity']['score']:.2f} |" in next(line for line in output.splitlines() if "| layer |" in line)
    assert (scripts.home / "results" / "table2-small-10.html").is_file()
    file.write_text(settings % 0.02)
    status, output = scripts("reproduce_table2", *words, "common.cpu=true")
    assert status == 1 and "made with other settings (optimization.lr=[0.01], now optimization.lr=[0.02])" in output
