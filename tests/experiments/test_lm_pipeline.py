"""The language models' pipelines, through the scripts as a user drives them, and perplexities known beforehand."""

import collections
import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import stat
import tarfile
import zipfile

import pytest
import torch
from pipelines import Scripts, contents, here
from toy import ROOT

from fairseq_powernorm.experiments.reports import schema

pytestmark = pytest.mark.slow

# A mini run: 12 updates of a small model. They shrink what configs/BENCH.yaml says; the mechanics stay the same.
SIZES = ["dataset.batch_size=24", "task.tokens_per_sample=8", "+model.decoder_layers=1", "+model.decoder_embed_dim=8",
         "+model.decoder_ffn_embed_dim=8", "eval_lm.softmax_batch=20", "checkpoint.keep_last_epochs=2",
         "checkpoint.patience=-1"]
SMALL = [*SIZES, "optimization.max_update=12", "lr_scheduler.warmup_updates=4", "common.log_interval=2",
         "eval_lm.context_window=5"]
PTB = [*SMALL, "optimization.lr=[0.01]"]
TENSORIZED = ["+model.tensorized_window=8", "+model.tensorized_rank=3"]
#: architecture of wikitext103 -> what makes it small
WIKITEXT = {
    "tensorized_lm_pn_wiki103": TENSORIZED,
    "transformer_lm_pn_wiki103": ["dataset.max_tokens=64", "optimization.update_freq=[1]", "optimization.lr=[0.1]",
                                  "+model.decoder_attention_heads=2", "+model.decoder_input_dim=8",
                                  "+model.decoder_output_dim=8", "+model.adaptive_input_factor=2",
                                  "+model.adaptive_softmax_factor=2", "eval_lm.context_window=0"],
}
ADAPTIVE = ["+model.adaptive_softmax_cutoff='8,14'", "+model.adaptive_input_cutoff='8,14'", "common.seed=2"]
WORDS = "the a of <unk> to in N and 's for that $ is it on said café by as at".split()


def text(lines, offset, headings):
    """Lines of words that follow a rule; every word of a short text is in a longer one."""
    for i in range(offset, offset + lines):
        if headings and i % 5 == 0:
            yield from (" \n", f" = {WORDS[i % 20]} = \n", " \n")
        yield " " + " ".join(WORDS[(i * 7 + j * j * (1 + i % 3)) % 20] for j in range(3 + i % 9)) + " \n"


def texts(headings=False):
    return {split: "".join(text(lines, offset, headings)).encode()
            for split, lines, offset in (("train", 120, 0), ("valid", 13, 5), ("test", 17, 20))}


def write_tgz(path, members):
    with tarfile.open(path, "w:gz") as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)


def archive(folder, benchmark, found=None):
    """A small archive laid out as the published one, other members included; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if benchmark == "ptb":
        members = {f"./simple-examples/data/ptb.{split}.txt": content for split, content in (found or texts()).items()}
        write_tgz(folder / "simple-examples.tgz", {"./simple-examples/data/README": b"-", **members,
                                                   "./simple-examples/data/ptb.char.test.txt": b"t h e\n"})
        return folder / "simple-examples.tgz"
    members = {f"wikitext-103/wiki.{split}.tokens": content for split, content in (found or texts(True)).items()}
    write_zip(folder / "wikitext-103-v1.zip", {"wikitext-103/": b"", **members})
    return folder / "wikitext-103-v1.zip"


def counted(content):
    lines = content.decode().split("\n")[:-1]
    return len(lines) + sum(len(line.split()) for line in lines)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Both benchmarks prepared from small archives."""
    home = tmp_path_factory.mktemp("lm-pipeline")
    scripts = Scripts(home)
    scripts.archives = {benchmark: archive(home / benchmark, benchmark) for benchmark in ("ptb", "wikitext103")}
    scripts.prepared = {benchmark: scripts.ok("prepare", benchmark, "--archive", path)
                        for benchmark, path in scripts.archives.items()}
    return scripts


@pytest.fixture(scope="module")
def trained(scripts):
    """ptb: the tensorized model with PN, interrupted and resumed, and evaluated."""
    scripts.run = scripts.runs / "ptb" / "power-seed2"
    arguments = ["ptb", "power", "common.seed=2"]
    scripts.first = scripts.ok("train", *arguments, *PTB, *TENSORIZED, "optimization.max_update=5")
    scripts.second = scripts.ok("train", *arguments, "--resume", "optimization.max_update=12")
    scripts.third = scripts.ok("evaluate", "ptb", scripts.run)
    return scripts


def record_of(run, subset=""):
    return json.loads((run / f"evaluation{subset}" / "record.json").read_text())


def table(*records):
    status, output, errors = here("table", *records)
    assert status == 0, errors
    return output


# ---- prepare ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["ptb", "wikitext103"])
def test_the_text_is_used_as_it_is(scripts, benchmark):
    """raw/ has the archive's bytes; the counts are those of the text; another corpus than the published one is said so;
    the dictionary is that of the training text, with <unk> as fairseq's own symbol."""
    wanted = texts(benchmark == "wikitext103")
    data = scripts.data / benchmark
    stamp = json.loads((data / "prepared.json").read_text())
    for split, content in wanted.items():
        assert (data / "raw" / f"{split}.txt").read_bytes() == content
        assert stamp["counts"][split]["tokens"] == counted(content)
    assert f"NOT the published {benchmark}" in scripts.prepared[benchmark] and stamp["published"] is False
    types = {word for line in wanted["train"].decode().split("\n") for word in line.split()}
    assert stamp["types"] == len(types | {"<unk>"}) + 1
    entries = [line.split(" ")[0] for line in (data / "data-bin" / "dict.txt").read_text(encoding="utf-8").splitlines()]
    assert {word for word in entries if not word.startswith("madeupword")} == types - {"<unk>"}
    assert set(stamp["sources"]) == {scripts.archives[benchmark].name}


def test_prepare_again(scripts, tmp_path):
    """prepare; prepare = prepare; unpacked files are text, too, by either name; other text needs --force."""
    before = contents(scripts.data)
    assert "nothing to do" in scripts.here("prepare", "ptb", "--archive", scripts.archives["ptb"])
    assert contents(scripts.data) == before
    mine = Scripts(tmp_path)
    for name in ("ptb.{}.txt", "{}.txt"):
        folder = tmp_path / name[:3]
        folder.mkdir()
        for split, content in texts().items():
            (folder / name.format(split)).write_bytes(content)
        mine.here("prepare", "ptb", "--text-dir", folder, "--force")
        assert contents(mine.data / "ptb" / "data-bin") == contents(scripts.data / "ptb" / "data-bin")
    other = archive(tmp_path / "other", "ptb", {**texts(), "test": b"the <unk>\n"})
    assert "other source text" in mine.refuses("prepare", "ptb", "--archive", other)
    mine.here("prepare", "ptb", "--archive", other, "--force")
    assert json.loads((mine.data / "ptb" / "prepared.json").read_text())["counts"]["test"]["tokens"] == 3


def test_prepare_killed(scripts, tmp_path):
    """prepare, killed while it binarizes, then prepare = prepare: it goes on with the text, to the same bytes."""
    mine = Scripts(tmp_path)
    process = mine.start("prepare", "ptb", "--archive", scripts.archives["ptb"])
    for line in process.stdout:
        if line.startswith("[2/2]"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # returns when no child holds the pipe any more
    assert not (mine.data / "ptb").exists()
    output = mine.here("prepare", "ptb", "--archive", scripts.archives["ptb"])
    assert "[1/2] text: done already" in output and "NOT the published ptb" in output
    assert contents(mine.data / "ptb") == contents(scripts.data / "ptb")
    assert [path.name for path in mine.data.iterdir() if path.is_dir()] == ["ptb"]


def evil(folder, kind):
    """An archive that must be refused."""
    path = archive(folder, "wikitext103" if kind.endswith("zip") else "ptb")
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "escape.zip":
        write_zip(path, {"wikitext-103/../../wiki.train.tokens": b"the\n"})
    elif kind == "escape.tgz":
        write_tgz(path, {"/simple-examples/data/ptb.train.txt": b"the\n"})
    elif kind == "link.tgz":
        with tarfile.open(path, "w:gz") as packed:
            info = tarfile.TarInfo("simple-examples/data/ptb.train.txt")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            packed.addfile(info)
    elif kind == "link.zip":
        link = zipfile.ZipInfo("wikitext-103/wiki.train.tokens")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(link, "/etc/passwd")
    elif kind == "wrong.zip":
        write_zip(path, {"wikitext-2/wiki.train.tokens": b"the\n"})
    elif kind == "text.tgz":
        path.write_text("no archive\n")
    elif kind == "empty.tgz":
        archive(folder, "ptb", {**texts(), "valid": b""})
    elif kind == "pad.tgz":
        archive(folder, "ptb", {**texts(), "valid": b"the\nthe <pad>\n"})
    elif kind == "utf-8.zip":
        archive(folder, "wikitext103", {**texts(), "test": b"the\n\xff\n"})
    return path


@pytest.mark.parametrize("kind, message", [
    ("truncated.tgz", "cannot unpack .*simple-examples.tgz"),
    ("truncated.zip", "cannot unpack .*wikitext-103-v1.zip"),
    ("escape.zip", r"wiki\.train\.tokens', which leads out of its directory"),
    ("escape.tgz", r"ptb\.train\.txt', which leads out of its directory"),
    ("link.tgz", "ptb.train.txt is not a file"),
    ("link.zip", "wiki.train.tokens is not a file"),
    ("wrong.zip", r"lacks wikitext-103/wiki\.train\.tokens, .*it must hold"),
    ("text.tgz", "cannot unpack"),
    ("empty.tgz", r"valid\.txt is empty"),
    ("pad.tgz", r"valid\.txt, line 2: the word '<pad>' is reserved"),
    ("utf-8.zip", r"test\.txt, line 2: not valid UTF-8"),
])
def test_bad_archives(kind, message, tmp_path):
    """What is no archive, or not this one, is refused, and nothing is left, neither in data/ nor outside of it."""
    mine = Scripts(tmp_path / "home")
    path = evil(tmp_path / "home" / "archives", kind)
    benchmark = "ptb" if path.suffix == ".tgz" else "wikitext103"
    before = set(tmp_path.rglob("*"))
    assert re.search(message, mine.refuses("prepare", benchmark, "--archive", path))
    left = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert left <= {"data", f".{benchmark}.lock"}


def test_other_archives_than_the_published(tmp_path):
    """--archive-dir and DATA_ARCHIVES take the published corpus only: by the digest of texts (PTB) or archive."""
    mine = Scripts(tmp_path)
    for benchmark, what in (("ptb", "text train.txt"), ("wikitext103", "archive")):
        path = archive(tmp_path / "archives" / benchmark, benchmark)
        for given in (["--archive-dir", path.parent], ["--archive-dir", tmp_path / "archives"]):
            assert f"SHA-256 of the {what} is" in mine.refuses("prepare", benchmark, *given)
    for split, content in texts().items():
        (tmp_path / f"ptb.{split}.txt.gz").write_bytes(gzip.compress(content))
    assert re.search("ptb.train.txt.gz: SHA-256 of the uncompressed text is .*, expected fcea919f",
                     mine.refuses("prepare", "ptb", DATA_ARCHIVES=str(tmp_path)))
    (tmp_path / "ptb.test.txt.gz").unlink()
    assert "lacks simple-examples.tgz or ptb.train.txt + ptb.valid.txt + ptb.test.txt" in mine.refuses(
        "prepare", "ptb", DATA_ARCHIVES=str(tmp_path))
    assert "lacks wikitext-103-v1.zip; looked in" in mine.refuses("prepare", "wikitext103", DATA_ARCHIVES=str(tmp_path))
    assert not [path for path in mine.data.iterdir() if path.is_dir()]


def test_prepare_refuses_bad_arguments(scripts, tmp_path):
    """Options that do not fit are refused, naming option, value and what is valid; without a network, all mirrors."""
    mine = Scripts(tmp_path)
    assert "--bpe 'subword_nmt': the text of ptb is used word by word" in mine.refuses(
        "prepare", "ptb", "--bpe", "subword_nmt")
    assert "--archive 'x.zip': demo does not come in one archive; valid with: ptb, wikitext103" in mine.refuses(
        "prepare", "demo", "--archive", "x.zip")
    assert "x.zip' is not a file; it must be laid out as wikitext-103-v1.zip" in mine.refuses(
        "prepare", "wikitext103", "--archive", "x.zip")
    assert "exclude each other" in mine.refuses(
        "prepare", "ptb", "--archive", scripts.archives["ptb"], "--text-dir", tmp_path)
    nowhere = dict.fromkeys(("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
    message = mine.refuses("prepare", "wikitext103", **nowhere, no_proxy="", NO_PROXY="")
    assert message.count("cannot download") == 1 and "--archive-dir" in message
    assert not (mine.data / "wikitext103").exists()


# ---- train -----------------------------------------------------------------------------------------------------------


def test_train_refuses(scripts):
    """What a language model does not have, or cannot be evaluated, is refused before a run directory exists."""
    before = contents(scripts.runs)
    for arguments, message in (
        (["--placement", "encoder"],
         "--placement 'encoder': ptb trains a language model, which has no encoder; valid: all"),
        (["--placement", "top"], "--placement 'top' is unknown; valid: all"),
        (["--arch", "transformer_lm_pn_wiki103"],
         "--arch 'transformer_lm_pn_wiki103' is unknown; valid: tensorized_lm_pn_ptb, transformer_lm_pn_ptb"),
        (["task.tokens_per_sample=33"], "task.tokens_per_sample=33 does not fit the model's window; valid: 1 to 32"),
        (["eval_lm.context_window=32"],
         "eval_lm.context_window=32 leaves a block no tokens of its own; valid: 0 to 31"),
        (["task.add_bos_token=true"], "task.add_bos_token=true"),
        (["+model.encoder_norm_self=power"], "encoder_norm_self"),
    ):
        assert message in scripts.refuses("train", "ptb", "power", *arguments)
    assert "valid: transformer_pn_tiny" in scripts.refuses("train", "demo", "power", "--arch", "transformer_pn")
    locks = {name for name in contents(scripts.runs) if name.endswith(".lock")}
    assert set(contents(scripts.runs)) - locks == set(before) - locks


def test_train_and_resume(trained):
    """The norm stands in all positions; --resume goes on; the two architectures have directories of their own."""
    (first, second) = (trained.run / "command.txt").read_text().splitlines()
    assert "model.decoder_norm_self=power model.decoder_norm_ff=power" in first and "encoder_norm" not in first
    assert "+ptb=" not in first and "optimization.max_update=12" in second
    assert "update 4 of 5" in trained.first
    assert "update 6 of 12" in trained.second and "update 2 of" not in trained.second
    assert "has finished (12 updates)" in trained.here("train", "ptb", "power", "common.seed=2", "--resume")
    facts = json.loads((trained.run / "run.json").read_text())
    assert (facts["arch"], facts["placement"]) == ("tensorized_lm_pn_ptb", "all")
    assert "arch 'tensorized_lm_pn_ptb', not 'transformer_lm_pn_ptb'" in trained.refuses(
        "train", "ptb", "power", "--arch", "transformer_lm_pn_ptb", "--run-dir", trained.run, "--resume")


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(trained):
    return record_of(trained.run)


def reported(run, log):
    """Bits a token as fairseq-eval-lm reports them, in four decimals."""
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", (run / "evaluation" / log).read_text())[1])


def test_record(record, trained):
    """The record is of the schema; it counts the text's tokens, line ends included; its perplexities are those
    of fairseq-eval-lm, of the checkpoint with the best validation loss; they are what the script prints."""
    assert not schema.problems(record, schema.LANGUAGE_MODEL)
    content = texts()["test"]
    assert record["tokens"] == {
        "scored": counted(content), "words": counted(content) - 17, "line_ends": 17, "line_ends_counted": True,
        "unknown": content.count(b"<unk>"), "out_of_vocabulary": 0, "types": 21, "published_corpus": False}
    assert (record["arch"], record["causal"], record["placement"]) == ("tensorized_lm_pn_ptb", True, "all")
    assert list(record["checkpoints"]) == ["checkpoint_best.pt"]
    assert (record["averaged"], record["tokens_per_sample"]) == (1, 8)
    for key, log, context in (("perplexity", "eval-lm.log", 0), ("perplexity_context", "eval-lm-context5.log", 5)):
        found = record[key]
        assert found["context_window"] == context
        assert found["score"] == pytest.approx(math.exp(found["nll"] / counted(content)), rel=1e-12)
        assert math.log2(found["score"]) == pytest.approx(reported(trained.run, log), abs=6e-5)
        assert f"perplexity {found['score']:.2f}" in trained.third
    assert record["perplexity"]["score"] != record["perplexity_context"]["score"]
    assert "NOT the published corpus" in trained.third and "NOT a language model" not in trained.third
    text = json.dumps(record)
    assert str(trained.data.parent) not in text and str(ROOT) not in text


def test_evaluate_again_average_and_valid(trained, record):
    """evaluate; evaluate = evaluate; --average N takes the last N; --subset valid has its own directory."""
    before = contents(trained.run)
    assert "nothing to do" in trained.here("evaluate", "ptb", trained.run)
    assert contents(trained.run) == before
    assert "other checkpoints; --force" in trained.refuses("evaluate", "ptb", trained.run, "--average", "2")
    trained.here("evaluate", "ptb", trained.run, "--average", "2", "--subset", "valid")
    averaged = record_of(trained.run, "-valid")
    assert averaged["averaged"] == 2
    assert all(re.fullmatch(r"checkpoint\d+\.pt", name) for name in averaged["checkpoints"])
    assert averaged["tokens"]["scored"] == counted(texts()["valid"])
    row = table(trained.run / "evaluation-valid" / "record.json").splitlines()[2]
    assert f"| valid | 5 | {averaged['perplexity']['score']:.2f} |" in row


def test_no_best_checkpoint(trained, tmp_path):
    """A run without a best checkpoint, as without validation, is refused, naming --average."""
    run = tmp_path / "run"
    shutil.copytree(trained.run, run, ignore=shutil.ignore_patterns("evaluation*", "checkpoint_best.pt"))
    message = trained.refuses("evaluate", "ptb", run)
    assert re.search("has no checkpoint_best.pt, .*; --average N takes the last N", message)


def test_noncausal_is_labelled(trained, tmp_path):
    """--tensorized-noncausal: every printed perplexity, the record, the table and the curves say that it is no LM's."""
    run = tmp_path / "run"
    arguments = ["ptb", "power", "--run-dir", run, *PTB, *TENSORIZED, "+model.tensorized_noncausal=true"]
    trained_output = trained.ok("train", *arguments)
    output = trained.here("evaluate", "ptb", run)
    for printed in (trained_output, output):
        numbers = re.findall(r"perplexity [\d.]+.{0,40}", printed)
        assert numbers and all("(NOT a language model's" in number for number in numbers), numbers
    record = record_of(run)
    assert record["causal"] is False and record["config"]["model"]["tensorized_noncausal"] is True
    rows = table(run / "evaluation" / "record.json", trained.run / "evaluation" / "record.json").splitlines()
    assert rows[2].count("(not a language model's)") == 2 and "language model's" not in rows[3]


def test_table_of_both_kinds(trained, record):
    """Translation and language models stand in tables of their own."""
    translation = next((ROOT / "results" / "multi30k").glob("*.json"))
    first, second = table(translation, trained.run / "evaluation" / "record.json").split("\n\n")
    assert "BLEU" in first and "perplexity" not in first and first.count("\n") == 2
    assert second.splitlines()[0].startswith("| benchmark | architecture | norm |") and "BLEU" not in second
    score = f"{record['perplexity']['score']:.2f}"
    assert f"| ptb | tensorized_lm_pn_ptb | power | yes | reference | 12 | 2 | test | 5 | {score} |" in second


def test_the_other_architecture(scripts):
    """--arch: the other architecture's model and settings, in a directory that names it."""
    scripts.ok("train", "ptb", "layer", "--arch", "transformer_lm_pn_ptb", *PTB, "+model.decoder_attention_heads=2",
               "eval_lm.context_window=0")
    run = scripts.runs / "ptb" / "layer-transformer_lm_pn_ptb-seed1"
    assert "perplexity" in scripts.here("evaluate", "ptb", run)
    record = record_of(run)
    assert (record["arch"], record["norm"], record["causal"]) == ("transformer_lm_pn_ptb", "layer", True)
    assert record["config"]["model"]["decoder_attention_heads"] == 2


@pytest.mark.parametrize("arch", WIKITEXT)
def test_wikitext103(scripts, arch):
    """The whole pipeline, adaptive softmax included, of both architectures."""
    scripts.ok("train", "wikitext103", "power", "--arch", arch, *SMALL, *ADAPTIVE, *WIKITEXT[arch])
    default = arch.startswith("tensorized")
    run = scripts.runs / "wikitext103" / ("power-seed2" if default else f"power-{arch}-seed2")
    scripts.here("evaluate", "wikitext103", run)
    record = record_of(run)
    assert record["tokens"]["scored"] == counted(texts(True)["test"]) and record["arch"] == arch
    assert record["config"]["optimizer"]["_name"] == ("adam" if default else "nag")
    assert math.log2(record["perplexity"]["score"]) == pytest.approx(reported(run, "eval-lm.log"), abs=6e-5)


def test_reproduce(scripts, tmp_path):
    """reproduce_figures.sh of a language model: the run that the tables have, its record, and the figures."""
    arguments = ["reproduce_figures", "--benchmark", "ptb", "--rows", "power", "--updates", "10", "--results", tmp_path,
                 *SIZES, *TENSORIZED, "eval_lm.context_window=0"]
    output = scripts.ok(*arguments)
    name = "power-tensorized_lm_pn_ptb-10-seed1"
    record = json.loads((tmp_path / "ptb" / f"{name}.json").read_text())
    assert record["updates"] == 10 and record["config"]["lr_scheduler"]["warmup_updates"] == 1
    data = json.loads((tmp_path / "figures-ptb-10.figures.json").read_text())
    assert data["statistics"][f"ptb/{name}"]["updates"] == list(range(1, 11))
    assert data["singular_values"][f"ptb/{name}"]["checkpoint"] == "checkpoint_best.pt"
    assert len(data["singular_values"][f"ptb/{name}"]["values"]) == 8, "the channels of the embedding"
    pictures = {f"figures-ptb-10.ptb-tensorized_lm_pn_ptb.figure{i}.png" for i in range(1, 7)}
    assert {path.name for path in tmp_path.glob("*.*")} == {*pictures, "figures-ptb-10.figures.json"}
    assert all(name in output for name in pictures)


# ---- real text -------------------------------------------------------------------------------------------------------


def two_state_model(checkpoint, data):
    """Gives a checkpoint the probabilities P(w | line end before) and P(w | a word before), counted in the training
    text plus one for each word that the dictionary lists, and returns {state: {word: log-probability}}.

    The residual stream carries the embedding, (1, -1, 0, 0) for the line end and (0, 0, 1, -1) for words, unchanged to
    the final PN: attention and feed-forward blocks give zero. The output projection holds the log-probabilities.
    """
    words = [line.rpartition(" ")[0] for line in (data / "data-bin" / "dict.txt").read_text().splitlines()]
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *words]
    counts = [collections.Counter(symbols[2:]), collections.Counter(symbols[2:])]
    before = "</s>"
    for line in (data / "raw" / "train.txt").read_text().split("\n")[:-1]:
        for word in [*line.split(), "</s>"]:
            counts[before != "</s>"][word] += 1
            before = word
    tables = [{word: math.log(count / sum(found.values())) for word, count in found.items()} for found in counts]
    state = torch.load(checkpoint, weights_only=True)
    model = state["model"]
    for name in ("self_attn.out_proj", "fc2"):
        for part in ("weight", "bias"):
            model[f"decoder.layers.0.{name}.{part}"].zero_()
    embedding = model["decoder.embed_tokens.weight"]
    embedding[:] = torch.tensor([0.0, 0.0, 1.0, -1.0])
    embedding[symbols.index("</s>")] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_phi", 1.0)):
        model[f"decoder.layer_norm.{name}"].fill_(value)
    eps = 1e-5
    height = 2 / math.sqrt(2 + eps) / math.sqrt(1 + eps)  # embeddings are scaled by sqrt(4); layer scale, then psi
    output = model["decoder.output_projection.weight"]
    output.zero_()
    for column, found in ((0, tables[0]), (2, tables[1])):
        for index, symbol in enumerate(symbols):
            output[index, column] = found.get(symbol, -50.0) / height
    torch.save(state, checkpoint)
    return tables


def test_perplexity_of_a_known_model(corpora, tmp_path):
    """PTB's test text, 82,430 tokens, under a model with two states whose probabilities are counts of training text:
    evaluate.sh gives the perplexity computed on paper, to 1e-5, block by block and with a context."""
    mine = Scripts(tmp_path)
    output = mine.here("prepare", "ptb", DATA_ARCHIVES=str(corpora))
    assert "929,589, valid 73,760, test 82,430 tokens" in output and "NOT the published" not in output
    data = mine.data / "ptb"
    assert json.loads((data / "prepared.json").read_text())["types"] == 10000
    run = tmp_path / "run"
    mine.ok("train", "ptb", "power", "--arch", "transformer_lm_pn_ptb", "--run-dir", run, "optimization.max_update=1",
            "eval_lm.context_window=4", "dataset.max_valid_steps=1", "+model.decoder_layers=1", "+model.decoder_embed_dim=4",
            "+model.decoder_ffn_embed_dim=4", "+model.decoder_attention_heads=1",
            "+model.share_decoder_input_output_embed=false", "+model.no_token_positional_embeddings=true")
    tables = two_state_model(run / "checkpoints" / "checkpoint_best.pt", data)
    mine.here("evaluate", "ptb", run)
    total, tokens, before = 0.0, 0, "</s>"
    for line in (data / "raw" / "test.txt").read_text().split("\n")[:-1]:
        for word in [*line.split(), "</s>"]:
            total -= tables[before != "</s>"][word]
            tokens, before = tokens + 1, word
    record = record_of(run)
    assert tokens == record["tokens"]["scored"] == 82430 and record["tokens"]["published_corpus"] is True
    assert [record["tokens"][key] for key in ("words", "line_ends", "unknown")] == [78669, 3761, 4794]
    for key in ("perplexity", "perplexity_context"):
        assert record[key]["score"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert record[key]["nll"] == pytest.approx(total, rel=1e-6)


def test_wikitext_real(corpora, tmp_path):
    """The real test text, 245,569 tokens, headings and words that the dictionary lacks included, is scored whole."""
    mine, folder = Scripts(tmp_path), tmp_path / "text"
    folder.mkdir()
    for split in ("valid", "test"):
        packed = (corpora / "wikitext" / f"wiki.{split}.txt.gz").read_bytes()
        (folder / f"{split}.txt").write_bytes(gzip.decompress(packed))
    # a short training text makes a small dictionary, for which evaluation takes less time
    (folder / "train.txt").write_text("".join((folder / "valid.txt").open(encoding="utf-8").readlines()[:400]))
    output = mine.here("prepare", "wikitext103", "--text-dir", folder)
    assert "valid 217,646" in output and "test 245,569 tokens" in output
    run = tmp_path / "run"
    mine.ok("train", "wikitext103", "power", "--run-dir", run, *SMALL, "+model.tensorized_rank=3",
            "task.tokens_per_sample=64",
            "+model.tensorized_window=64", "optimization.max_update=2", "eval_lm.context_window=0",
            "eval_lm.softmax_batch=1024", "+model.adaptive_softmax_cutoff='500,2000'",
            "+model.adaptive_input_cutoff='500,2000'", "dataset.max_valid_steps=1")
    mine.here("evaluate", "wikitext103", run)
    record = record_of(run)
    assert record["tokens"]["scored"] == 245569 and record["tokens"]["line_ends"] == 4358
    assert record["perplexity_context"] is None and record["tokens"]["out_of_vocabulary"] > 1000
    assert 2 < record["perplexity"]["score"] < 1e6
