"""Scores, records and reports: numbers equal those of the public tools, and a page says what its records say."""

import copy
import csv
import gzip
import html.parser
import importlib.util
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from toy import ROOT

BIN = pathlib.Path(sys.executable).parent
for module in ("fairseq", "sacrebleu", "jinja2", "matplotlib"):
    pytest.importorskip(module)

from fairseq_powernorm.experiments import settings  # noqa: E402
from fairseq_powernorm.experiments.errors import UserError  # noqa: E402
from fairseq_powernorm.experiments.evaluation import score  # noqa: E402
from fairseq_powernorm.experiments.files import json_text, read_json, write_json  # noqa: E402
from fairseq_powernorm.experiments.reports import (  # noqa: E402
    figures,
    matrix,
    plot_curves,
    render,
    report,
    schema,
    sections,
    table,
)
from fairseq_powernorm.experiments.reports.significance import significance  # noqa: E402
from fairseq_powernorm.experiments.runs import checkpoints  # noqa: E402
from fairseq_powernorm.experiments.score import command as score_command  # noqa: E402

RECORD = json.loads((ROOT / "results" / "multi30k" / "power-8000-seed1.json").read_text())


# ---- scores ----------------------------------------------------------------------------------------------------------


def run(*command, status=0):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two systems' texts and a reference: compounds, capitals, blank lines (the last one too), words of two systems."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(3)
    words = "Der well-known @-@ man sees the a-b-c dogs - now and then not , ohne - Worte".split()
    reference = [" ".join(draw.choices(words, k=12)) for _ in range(60)]

    def worse(line, rate):
        return " ".join(word if draw.random() > rate else draw.choice(words) for word in line.split())

    found = {"ref": reference, "first": [worse(line, 0.2) for line in reference],
             "second": [worse(line, 0.3) for line in reference]}
    found["first"][7] = found["first"][-1] = ""
    for name, lines in found.items():
        (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder, found


def ours(capsys, *arguments):
    """What the command score prints."""
    score_command([str(word) for word in arguments])
    return json.loads(capsys.readouterr().out)


# A line as it is translated, its dashes split, and as it is scored, by hand: detokenized, tokenized again with whole
# compounds, and these split. A dash needs neighbours that no other match has taken.
COMPOUNDS = [
    ("ein 18 @-@ jähriger Mann", "ein 18 ##AT##-##AT## jähriger Mann"),
    ("ein 18-jähriger Mann", "ein 18 ##AT##-##AT## jähriger Mann"),
    ("die E @-@ Mail @-@ Adresse", "die E ##AT##-##AT## Mail ##AT##-##AT## Adresse"),
    ("a @-@ b @-@ c", "a ##AT##-##AT## b-c"),
    ("ab - cd – ef", "ab - cd – ef"),
    ("-ab cd- -", "-ab cd- -"),
    ("Hin- und Rückfahrt @-@ Preis", "Hin- und Rückfahrt ##AT##-##AT## Preis"),
    ("2010-2014 , 3 @-@ 5 % , 1.000,5", "2010 ##AT##-##AT## 2014 , 3 ##AT##-##AT## 5 % , 1.000,5"),
    ("a--b c---d", "a ##AT##-##AT## -b c ##AT##-##AT## --d"),
    ("sagt : &quot; Nein-Ja &quot; .", "sagt : &quot; Nein ##AT##-##AT## Ja &quot; ."),
    ("&quot; Pro @-@ &quot; Gruppe &amp; Co. @-@ KG", "&quot; Pro- &quot; Gruppe &amp; Co. ##AT##-##AT## KG"),
    ("Baum usw. ( A-B ) &apos; s", "Baum usw. ( A ##AT##-##AT## B ) &apos; s"),
    ("", ""),
]


@pytest.mark.parametrize("line, expected", COMPOUNDS)
def test_split_compounds(line, expected):
    """A line of WMT14's translation or reference = the line that the authors' test script scores, byte for byte."""
    assert score.split_compounds(line, "de") == expected


def test_split_compounds_is_perls():
    """The same from Moses' Perl scripts, with a word behind each line, whose end the package's scripts see otherwise."""
    package, perl = importlib.util.find_spec("mosestokenizer"), shutil.which("perl")
    if package is None or perl is None:
        pytest.skip("perl and the package mosestokenizer are not both installed")
    folder, text = pathlib.Path(package.origin).parent, "".join(f"{line} Z\n" for line, _ in COMPOUNDS)
    for command in ([folder / "detokenizer.perl", "-q", "-l", "de"], [folder / "tokenizer-v1.1.perl", "-q", "-l", "de"],
                    ["-ple", r"s{(\S)-(\S)}{$1 ##AT##-##AT## $2}g"]):
        text = subprocess.run([perl, *command], input=text, capture_output=True, text=True, check=True).stdout
    assert text.split("\n")[:-1] == [score.split_compounds(f"{line} Z", "de") for line, _ in COMPOUNDS]


def test_tokenized_bleu_is_fairseqs(texts, capsys, monkeypatch):
    """score.py HYP REF = fairseq-score."""
    from fairseq_cli.score import cli_main

    folder, _ = texts
    found = ours(capsys, folder / "first", folder / "ref")
    monkeypatch.setattr(sys, "argv", ["fairseq-score", "--sys", str(folder / "first"), "--ref", str(folder / "ref")])
    cli_main()
    assert found["bleu_tokenized"]["text"] in capsys.readouterr().out and found["sentences"] == 60
    assert "split_compounds" not in found["bleu_tokenized"] and 20 < found["bleu_tokenized"]["score"] < 90


def unsmoothed(hypotheses, references):
    """BLEU without smoothing of words, as sacreBLEU computes it: what multi-bleu.perl computes with one reference."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, [references])


def test_compound_split_bleu_is_multi_bleus(texts, capsys):
    """score.py HYP REF --split-compounds LANGUAGE = unsmoothed BLEU of both texts with their compounds split, in the words
    of multi-bleu.perl."""
    folder, text = texts
    split = [[score.split_compounds(line, "de") for line in text[name]] for name in ("first", "ref")]
    for lines in split:
        assert any("well ##AT##-##AT## known" in line for line in lines) and not any("@-@" in line for line in lines)
    found, wanted = ours(capsys, folder / "first", folder / "ref", "--split-compounds", "de"), unsmoothed(*split)
    bleu = found["bleu_tokenized"]
    assert bleu["score"] == pytest.approx(wanted.score, abs=1e-9) and bleu["precisions"] == pytest.approx(wanted.precisions)
    assert (bleu["hypothesis_length"], bleu["reference_length"]) == (wanted.sys_len, wanted.ref_len)
    assert bleu["brevity_penalty"] == pytest.approx(wanted.bp) and bleu["split_compounds"] is True
    assert re.fullmatch(r"BLEU = [\d.]+, ([\d.]+/){3}[\d.]+ \(BP=[\d.]+, ratio=[\d.]+, hyp_len=\d+, ref_len=\d+\)",
                        bleu["text"])


@pytest.mark.parametrize("hypothesis, reference, same", [
    ("a b c d", "a b c e", True), ("x", "x y", True), ("a  b", "a b", True), ("</s> a b", "</s> a b", True),
    ("<s> a b", "<s> a b", True), ("a </s> b", "a </s> b", True), ("a x b c", "a <unk> b c", True),
    ("", "a b", False), ("a b", "", False), ("", "", False),
    ("a <unk> b c", "a <unk> b c", False), ("a b <pad>", "a b <pad>", False), ("a b </s>", "a b </s>", False),
    ("<pad> a b", "<pad> a b", False),
])
def test_where_fairseqs_bleu_is_not_multi_bleus(hypothesis, reference, same):
    """fairseq's BLEU = multi-bleu's but for lines without words, <unk>, and <pad> and </s> at the ends of a line."""
    hypotheses, references = ["the cat sat on the mat .", hypothesis], ["the cat sat on a mat .", reference]
    fairseqs, multi = score.fairseq_bleu(hypotheses, references), score.multi_bleu(hypotheses, references)
    keys = ("score", "precisions", "hypothesis_length", "reference_length")
    assert all(fairseqs[key] == pytest.approx(multi[key], rel=1e-6) for key in keys) == same
    wanted = unsmoothed(hypotheses, references)
    assert multi["score"] == pytest.approx(wanted.score, abs=1e-9)
    assert multi["precisions"] == pytest.approx(wanted.precisions)


def test_multi_bleu_of_texts_without_matches():
    """Without a word, or without a match of some length, BLEU is 0 and nothing is divided by zero."""
    for hypotheses, references in ((["a b c d"], ["e f g h"]), ([""], ["a"]), (["a"], [""]), ([""], [""]), (["a"], ["a"])):
        assert score.multi_bleu(hypotheses, references)["score"] == 0.0


@pytest.mark.parametrize("option, lowercase", [([], []), (["-lc"], ["--lowercase"])])
def test_detokenized_scores_are_sacrebleus(texts, option, lowercase, capsys):
    """score.py --detokenized = the sacrebleu command, BLEU and chrF, to the last digit."""
    folder, _ = texts
    found = ours(capsys, folder / "first", folder / "ref", "--detokenized", *lowercase)
    for name, metric in (("sacrebleu", "bleu"), ("chrf", "chrf")):
        extra = option if metric == "bleu" else ["--chrf-lowercase"] if option else []
        command = [BIN / "sacrebleu", folder / "ref", "-i", folder / "first", "-m", metric, *extra, "-w", 12]
        theirs = json.loads(run(*command))
        assert theirs["score"] == round(found[name]["score"], 12)
        assert set(theirs["signature"].split("|")) == set(found[name]["signature"].split("|"))


def test_significance_is_sacrebleus(texts):
    """paired_bootstrap = sacrebleu --paired-bs: the same p-value; equal scores have none."""
    folder, found = texts
    theirs = json.loads(run(BIN / "sacrebleu", folder / "ref", "-i", folder / "first", folder / "second", "-m", "bleu",
                            "--paired-bs", "-w", 9, "-f", "json"))
    systems = {"second": found["second"], "same": found["first"]}
    tests = score.paired_bootstrap(found["first"], systems, found["ref"], lowercase=False)
    assert theirs[1]["BLEU"]["p_value"] == pytest.approx(tests["second"]["p_value"], abs=1e-9)
    assert round(tests["second"]["score"], 6) == pytest.approx(theirs[1]["BLEU"]["score"], abs=1e-6)
    assert tests["same"]["p_value"] is None and tests["second"]["p_value"] < 0.05


def test_score_refuses(texts, tmp_path):
    """Texts of unequal length, missing or empty ones, and options that do not fit are refused."""
    folder, _ = texts
    (tmp_path / "short").write_text("one line\n")
    (tmp_path / "empty").write_text("")
    for arguments, message in (
        ([tmp_path / "short", folder / "ref"], "1 hypotheses for 60 references"),
        ([tmp_path / "none", folder / "ref"], "cannot read"),
        ([tmp_path / "empty", folder / "ref"], "is empty"),
        ([folder / "first", folder / "ref", "--detokenized", "--split-compounds", "de"], "is for tokenized text"),
        ([folder / "first", folder / "ref", "--split-compounds", ""], "--split-compounds LANGUAGE needs a value"),
        ([folder / "first", folder / "ref", "--split-compounds", "xx"], "--split-compounds 'xx' is unknown; valid: as, bn"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            score_command(list(map(str, arguments)))


@pytest.mark.slow
def test_iwslt14_reference_against_itself(corpora, tmp_path, capsys):
    """The 6,750 sentences of IWSLT14's test reference score 100.0 against themselves, by every metric."""
    text = gzip.decompress((corpora / "iwslt14" / "test.en.gz").read_bytes()).decode()
    (tmp_path / "ref").write_text(text.replace("@@ ", ""), encoding="utf-8")
    found = ours(capsys, tmp_path / "ref", tmp_path / "ref")
    assert found["sentences"] == 6750
    assert found["bleu_tokenized"]["text"].startswith("BLEU4 = 100.00, 100.0/100.0/100.0/100.0 ")
    lines = score.lines_of(tmp_path / "ref")
    others = score.sacrebleu_scores(lines, lines, lowercase=True)
    assert [each["score"] for each in others.values()] == pytest.approx([100, 100])


def test_checkpoints_of_short_runs(tmp_path):
    """--available takes the checkpoints that there are, the last one if none was kept; without it they are too few."""
    import zipfile

    config = settings.load("multi30k")
    config.checkpoint.no_epoch_checkpoints = False
    with pytest.raises(UserError, match="0 of the 10"):
        checkpoints.last(config, tmp_path, 10, available=True)
    for name in ("checkpoint_last.pt", "checkpoint1.pt", "checkpoint2.pt"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("data", "x")
        found = [path.name for path in checkpoints.last(config, tmp_path, 10, available=True)]
        assert found == {"checkpoint_last.pt": ["checkpoint_last.pt"], "checkpoint1.pt": ["checkpoint1.pt"],
                         "checkpoint2.pt": ["checkpoint1.pt", "checkpoint2.pt"]}[name]
        with pytest.raises(UserError, match="of the 10 checkpoints"):
            checkpoints.last(config, tmp_path, 10)


# ---- records ---------------------------------------------------------------------------------------------------------


def described_keys(kind):
    """The top-level keys in the tables of results/README.md of a kind: for records those of all, and its own."""
    sections = re.split(r"^### (.*)\n", (ROOT / "results" / "README.md").read_text(), flags=re.M)
    own = dict(zip(sections[1::2], sections[2::2]))[kind]
    tables = sections[0] + own if kind in ("Translation", "Language models") else own
    rows = (line for line in tables.splitlines() if line.startswith("| `"))
    return {key.split(".")[0] for row in rows for key in re.findall(r"`([\w.]+\??)`", row.split("|")[1])}


@pytest.mark.parametrize("kind, keys", [
    ("Translation", schema.TRANSLATION), ("Language models", schema.LANGUAGE_MODEL),
    ("Significance tests", schema.SIGNIFICANCE), ("Figures' data", schema.FIGURES),
    ("Measurements of speed", schema.BENCHMARK)])
def test_the_schema_is_described(kind, keys):
    """results/README.md describes the keys of the schema and no others."""
    assert described_keys(kind) == set(keys)


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json")), ids=lambda path: path.stem)
def test_committed_records(path):
    """Each file in results/ is of the schema; a record comes from a finished run and names no path of a machine, and what
    is measured is committed code."""
    content = schema.check(json.loads(path.read_text()), path)
    assert "+changes" not in (content.get("git_commit") or "") and not content.get("quick")
    if "kind" not in content:
        assert content["finished"] and content["git_commit"]
        assert not re.search(r"(?<![\w.:/-])/\w+/", json.dumps(content))


@pytest.mark.parametrize("change, message", [
    (lambda r: r.pop("seed"), "seed is missing"),
    (lambda r: r.update(sead=1), "sead is not a key of the schema"),
    (lambda r: r.update(seed="1"), "seed is '1', not int"),
    (lambda r: r.update(seed=True), "seed is True, not int"),
    (lambda r: r.update(schema=1), "schema is 1; valid: 2"),
    (lambda r: r.update(norm="powr"), f"norm is 'powr'; valid: {', '.join(sorted(map(repr, {*settings.NORMS, 'custom'})))}"),
    (lambda r: r.update(norm="powr:groups=2"), "norm is 'powr'; valid: 'ada'"),
    (lambda r: r.update(norm=3), "norm is 3; valid: 'ada'"),
    (lambda r: r["training"].update(threads=None), "training.threads is None, not int"),
    (lambda r: r["curve"]["valid"][3].update(loss=math.nan), "curve.valid[3].loss is nan"),
    (lambda r: r["curve"]["valid"][3].update(lost=1), "curve.valid[3].lost is not a key"),
    (lambda r: r["checkpoints"].update(a=3), "checkpoints['a'] is 3, not str"),
    (lambda r: r.update(perplexity={}), "arch is missing"),
    (lambda r: r.update(kind="figures"), "statistics is missing"),
    (lambda r: r.update(kind=[]), "kind is not a key"),
    (lambda r: r.update(config={}), "config.model is missing"),
    (lambda r: r["config"].update(model=3), "config.model is int, not an object"),
    (lambda r: r["config"]["model"].pop("_name"), "config.model._name is missing"),
    (lambda r: r.update(seed=10**400), "seed is a number of 401 digits"),
    (lambda r: r["sacrebleu"].update(score=-(10**400)), "sacrebleu.score is a number of 40"),
])
def test_schema_refuses(change, message):
    """A missing key, an unknown one at any depth, a value of another type, no finite number: each is named."""
    record = copy.deepcopy(RECORD)
    change(record)
    with pytest.raises(UserError) as error:
        schema.check(record, "file")
    assert message in str(error.value)


def test_norms_with_options_in_records():
    """A record's norm may have options, as in batch:variant=reference."""
    schema.check({**RECORD, "norm": settings.BATCH_REFERENCE}, "file")


def test_schema_of_no_object():
    """What is no object is refused, not taken for an empty record."""
    for content in ([], 3, "text", None):
        with pytest.raises(UserError, match="is not a valid record: it is"):
            schema.check(content, "file")


def test_texts_of_a_record():
    """A text that a record may hold ends no cell of a table; a validation without a loss has none; a formula is drawn as it
    is written.
    """
    record = copy.deepcopy(RECORD)
    record["benchmark"] = "a|b\n$x^$"
    record["curve"]["valid"][-1].pop("loss")
    lines_ = table.tables({"x": record}).splitlines()
    assert len(lines_) == 3 and lines_[2].startswith(r"| a\|b\n$x^$ | ") and lines_[2].endswith(" | not finite |")
    assert plot_curves.plain("$x^$") == r"\$x^\$"


def test_figures_of_damaged_files(tmp_path, monkeypatch):
    """What a run left and is damaged is refused by its path, in one line."""
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path))
    (run, *_) = matrix.runs("demo", "transformer_pn_tiny", [1], 12, [])
    (run.directory / "evaluation").mkdir(parents=True)
    for name, content in (("evaluation/averaged.pt", b"PK\3\4"), (matrix.NORM_RECORD, b"x\n")):
        (run.directory / name).write_bytes(content)
        with pytest.raises(UserError, match=f"without .*{name} the figures are made") as caught:
            figures.data_of([run], None)
        assert "\n" not in str(caught.value)
        (run.directory / name).unlink()


@pytest.mark.parametrize("model", [
    {}, {"embed_tokens.weight": torch.full((4, 3), math.nan)}, {"embed_tokens.weight": torch.ones(4)},
    {"embed_tokens.weight": torch.ones(2, 2, 2)}, {"embed_tokens.embeddings.0.0.weight": torch.ones(4, 3)},
    {"embed_tokens.embeddings.0.0.weight": torch.ones(4, 3), "embed_tokens.embeddings.0.1.weight": torch.ones(4, 4)}])
def test_checkpoints_without_an_embedding(model, tmp_path):
    """A model whose embedding is not there, or no table of finite numbers, is refused by the checkpoint's path."""
    torch.save({"model": {f"encoder.{name}": tensor for name, tensor in model.items()}}, tmp_path / "some.pt")
    with pytest.raises(UserError, match=r"some.pt': its model has no embedding of words x .* \(.*; without ") as caught:
        figures.of_file(figures.singular_values, tmp_path / "some.pt")
    assert "\n" not in str(caught.value)


# ---- figures' data ---------------------------------------------------------------------------------------------------


def test_singular_values(tmp_path):
    """Those of torch.linalg.svdvals, of an encoder's table and of adaptive inputs, each band projected."""
    torch.manual_seed(0)
    first, second, project = torch.randn(50, 6), torch.randn(40, 3), torch.randn(6, 3)
    whole = torch.cat([first, second @ project.T])
    models = {
        "encoder": ({"encoder.embed_tokens.weight": whole, "decoder.embed_tokens.weight": first}, whole),
        "adaptive": ({"decoder.embed_tokens.embeddings.0.0.weight": first,
                      "decoder.embed_tokens.embeddings.0.1.weight": torch.eye(6),
                      "decoder.embed_tokens.embeddings.1.0.weight": second,
                      "decoder.embed_tokens.embeddings.1.1.weight": project}, whole),
    }
    for name, (model, table_) in models.items():
        torch.save({"model": model, "args": None, "cfg": None}, tmp_path / name)
        wanted = torch.linalg.svdvals(table_.double()).tolist()
        assert figures.singular_values(tmp_path / name) == pytest.approx(wanted, rel=1e-5)


def test_statistics_of_a_record(tmp_path):
    """Mean, smallest and largest over the norms at each update; null where one is not finite."""
    rows = [{"update": u, "norm": n, "distance_psi2": v} for u, n, v in
            ((2, "a", 1.0), (2, "b", 3.0), (4, "a", math.inf), (4, "b", 1.0))]
    (tmp_path / "record").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.statistics(tmp_path / "record") == {"norms": 2, "updates": [2, 4], "quantities": {
        "distance_psi2": {"mean": [2.0, None], "smallest": [1.0, None], "largest": [3.0, None]}}}


# ---- the report ------------------------------------------------------------------------------------------------------

ROWS = ("layer", "batch-groups0", "power", "power-all-algorithm2")
EVIL = "</pre><script>alert('1')</script> \"&amp; | `"


def record_of(run, number):
    """A record as evaluate.sh would write it of a run of the matrix."""
    found = copy.deepcopy(RECORD)
    model = found["config"]["model"]
    default = run.row.placement or "encoder"
    found.update(norm=run.row.norm, placement=default, seed=run.seed, variant=run.row.variant or "reference")
    model.update(norm_groups=0 if run.row.layer_scale is False else None, norm_variant=found["variant"])
    found["config"]["common"]["seed"] = run.seed
    for option, chosen in zip(settings.NORM_OPTIONS, settings.PLACEMENTS[default]):
        model[option] = run.row.norm if chosen else "layer"
    found["bleu_tokenized"].update(score=40.0 + number, ratio=0.9 + number / 100)
    found["sacrebleu"]["score"] = 39.0 + number
    found["commands"] = [f"{EVIL} {run.name}"]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of four rows and two seeds made from records alone, by the script; one record is missing."""
    results = tmp_path_factory.mktemp("results")
    runs = [run for run in matrix.runs("multi30k", "transformer_pn_tiny", [1, 2], 4000, []) if run.row_name in ROWS]
    (results / "multi30k").mkdir()
    for number, each in enumerate(runs[:-1]):
        each.record(results).write_text(json.dumps(record_of(each, number)))
    command = ["bash", ROOT / "scripts" / "reproduce_table1.sh", "--benchmark", "multi30k", "--updates", "4000",
               "--seeds", "1,2", "--rows", ",".join(ROWS), "--results", results, "--report-only"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "PN_RUNS_ROOT": str(results / "none")})
    assert done.returncode == 1 and "multi30k/power-all-algorithm2-4000-seed2: no record" in done.stderr, done.stderr
    return results, done.stdout


class Page(html.parser.HTMLParser):
    """Tags that are closed in order; all links, ids and sources; the text of all cells."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.sources, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
def test_page(written):
    """The page is well-formed and asks for nothing outside of itself; a link leads to a record or to commands in it."""
    results, _ = written
    text = (results / "table1-multi30k-4000.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.ids) == len(set(page.ids)) == 7
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (results / link).is_file(), link
    assert {link for link in page.links if not link.startswith("#")} == {
        f"multi30k/{path.name}" for path in (results / "multi30k").iterdir()}
    assert any(EVIL in data for data in page.text), "commands are shown as they are"
    assert not re.search(r"(src|href)=\"(https?:)?//|@import|url\(", text)


@pytest.mark.parametrize("key, value", [("benchmark", "demo"), ("norm", "layer"), ("seed", 2), ("arch", "other")])
def test_a_record_in_the_place_of_another(key, value, tmp_path):
    """A report takes no record of another run, whatever its file is called."""
    run = next(run for run in matrix.runs("multi30k", "transformer_pn_tiny", [1], 4000, []) if run.row_name == "power")
    (tmp_path / "multi30k").mkdir()
    record = record_of(run, 0)
    run.record(tmp_path).write_text(json.dumps(record))
    assert report.record_of(run, tmp_path) == record
    record["config"]["model"]["_name"] = value if key == "arch" else run.arch
    run.record(tmp_path).write_text(json.dumps({**record, **({} if key == "arch" else {key: value})}))
    with pytest.raises(UserError, match=f"power-4000-seed1.json is the record of another run: its {key} is {value!r}"):
        report.record_of(run, tmp_path)


def test_table_of_the_report(written):
    """Mean, deviation and difference from LN are those of the records, in Markdown and CSV; links lead to records."""
    results, output = written
    text = (results / "table1-multi30k-4000.md").read_text(encoding="utf-8")
    assert text in output
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    heading, rows = cells[0], cells[2:]
    assert [row[0] for row in rows] == ["layer", "batch", "power", "power"]
    # seed 1: 40 41 42 43, seed 2: 44 45 46
    assert [row[heading.index("tokenized BLEU")] for row in rows] == [
        "42.00 ± 2.83", "43.00 ± 2.83", "44.00 ± 2.83", "43.00"]
    assert heading.index("length ratio") == heading.index("tokenized BLEU") + 1
    assert [row[heading.index("length ratio")] for row in rows] == [
        "0.920 ± 0.028", "0.930 ± 0.028", "0.940 ± 0.028", "0.930"]
    assert [row[heading.index("against LN")] for row in rows] == ["", "+1.00", "+2.00", "+3.00"], "of common seeds"
    assert [row[heading.index("layer scale")] for row in rows] == ["", "no", "yes", "yes"]
    assert [row[heading.index("variant")] for row in rows] == ["", "", "reference", "algorithm2"]
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert all((results / target).is_file() for target in targets)
    pictures = {target for target in targets if target.endswith(".png")}
    assert pictures and {path.name for path in results.glob("*.png")} == pictures
    assert "No bootstrap test" in text and "Not in the table: multi30k/power-all-algorithm2-4000-seed2." in text
    assert "differ in" not in text
    with open(results / "table1-multi30k-4000.csv", encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [float(line["tokenized BLEU mean"]) for line in lines] == [42, 43, 44, 43]
    assert [line["tokenized BLEU deviation"] for line in lines][3] == "" and lines[0]["seeds"] == "1 2"
    assert float(lines[1]["tokenized BLEU deviation"]) == pytest.approx(math.sqrt(8))


def paper_section(benchmark, arch, records):
    """A section of a report of records, without pictures."""
    return sections.section(benchmark, arch, table.lines(records), {})


def test_paper_values_stand_beside_ours():
    """The paper's value stands in the lines of its form of a norm only, its BN being that of the authors' code."""
    assert set(matrix.PAPER) == {(benchmark, arch) for benchmark, arch in matrix.PAPER if arch in matrix.PARAMETERS}
    runs = list(matrix.runs("multi30k", "transformer_pn_tiny", [1], 4000, []))
    records = {run.name: record_of(run, i) for i, run in enumerate(runs)}
    part = paper_section("iwslt14", "transformer_pn_iwslt_de_en", records)
    found = {row.seeds[0].name.split("-4000")[0]: row.paper for row in part.rows}
    assert {name: value for name, value in found.items() if value} == {
        "layer": 35.5, "batch-reference": 34.4, "power-v": 35.5, "power": 35.9}
    others = [name for name in settings.NORMS if name not in matrix.PAPER_NORMS]
    assert len(found) == 19 + 2 * len(others) and sections.CAUSALITY not in part.notes()


def test_what_others_published_stands_beside_ours():
    """In the rows that it is of, each value with its source, which a note names; in Markdown, CSV and HTML alike, and only
    beside scores of the same kind."""
    rows = {row for of in matrix.ELSEWHERE.values() for row in of}
    runs = [run for run in matrix.runs("iwslt14", "transformer_pn_iwslt_de_en", [1], 4000, [])
            if run.row_name in (*rows, "batch-all", "scale")]
    values = [value for of in matrix.ELSEWHERE.values() for values in of.values() for value in values]
    assert {source for _, source in values} == set(matrix.SOURCES)
    records = {run.name: {**record_of(run, i), "benchmark": "iwslt14"} for i, run in enumerate(runs)}
    part = paper_section("iwslt14", "transformer_pn_iwslt_de_en", records)
    found = {row.seeds[0].name.split("-4000")[0]: render.of_others(row) for row in part.rows}
    assert {name for name, text in found.items() if text} == rows & set(found)
    assert found["layer"] == "35.3 (Unified Normalization), 35.50 ± 0.04 (Transformer-Clinic, Pre-LN)"
    note = " ".join(part.notes())
    assert "hikvision-research/Unified-Normalization (Yang et al., MM 2022)" in note and "No independent report" in note
    page = render.as_html("t", [part], [], records)
    for text in (render.as_markdown("t", [part], [], str), render.as_csv([part]), page):
        assert "published elsewhere" in text and "about 35.0 (authors of PN)" in text
    for record in records.values():
        record["subset"] = "valid"
    assert not paper_section("iwslt14", "transformer_pn_iwslt_de_en", records).has_elsewhere


@pytest.mark.slow
def test_pictures_of_every_norm():
    """Figures 5 and 6 from what records say, figure 4 for more norms than fit beside each other; each row has a colour of
    its own, which the picture still has where all lines have their ranges behind them.
    """
    from matplotlib.colors import to_rgb
    from PIL import Image

    names, draw = list(settings.NORMS), random.Random(1)
    updates = list(range(100))
    for quantities in (figures.DISCREPANCIES, figures.THEORY):
        found = {}
        for name in names:
            middle = [2.0 ** draw.uniform(-3, 3) for _ in updates]
            series = {"mean": middle, "smallest": [each / 2 for each in middle], "largest": [each * 2 for each in middle]}
            found[name] = {"updates": updates, "quantities": dict.fromkeys(quantities, series)}
        colours = dict(zip(names, figures.COLOURS))
        assert len(set(colours.values())) == len(names)
        picture = Image.open(io.BytesIO(figures.of_statistics(found, quantities, colours))).convert("RGB")
        pixels = {colour for _, colour in picture.getcolors()}
        for colour in colours.values():
            wanted = [round(255 * part) for part in to_rgb(colour)]
            assert min(max(abs(a - b) for a, b in zip(wanted, each)) for each in pixels) <= 6, colour
    record = {"curve": {subset: [{"updates": 1, "loss": 2.0}] for subset in ("train", "valid")}}
    assert figures.of_curves({"layer": record}, {name: {name: record} for name in names[1:]})[:4] == b"\x89PNG"


def lm_record(run, number, causal=True):
    found = copy.deepcopy(RECORD)
    for key in ("beam", "lenpen", "sentences", "tokens_per_s", "bleu_tokenized", "sacrebleu", "chrf"):
        del found[key]
    perplexity = {"score": 50.0 + number, "nll": 1e5, "context_window": 0}
    found.update(benchmark="ptb", arch=run.arch, causal=causal, perplexity=perplexity, perplexity_context=None,
                 tokens_per_sample=32, norm=run.row.norm, placement="all", seed=run.seed, tokens={
                     "scored": 9, "words": 8, "line_ends": 1, "line_ends_counted": True, "unknown": 0,
                     "out_of_vocabulary": 0, "types": 5, "published_corpus": True})
    found["config"]["model"] = {"_name": run.arch, "norm_groups": None if run.row.layer_scale is not False else 0,
                                "decoder_norm_self": run.row.norm, "tensorized_noncausal": not causal}
    return schema.check(found, "made")


def test_language_models_table():
    """Perplexities with the paper's beside them; a model that is none says so in its cell, in a line of its own."""
    runs = list(matrix.runs("ptb", "tensorized_lm_pn_ptb", [1], None, []))
    runs = [run for run in runs if run.row_name in ("layer", "power")]
    records = {f"{run.name}{causal}": lm_record(run, i, causal) for causal in (True, False)
               for i, run in enumerate(runs)}
    part = paper_section("ptb", "tensorized_lm_pn_ptb", records)
    headings, rows = render.plain_rows(part)
    assert sorted(row[headings.index("perplexity")] for row in rows) == [
        "50.00", "50.00 (not a language model's)", "51.00", "51.00 (not a language model's)"]
    assert {row[0]: row[headings.index("paper, non-causal")] for row in rows} == {"layer": "53.2", "power": "47.6"}
    assert sections.CAUSALITY in part.notes() and "paper" not in headings and ",paper\n" not in render.as_csv([part])


@pytest.mark.parametrize("arch, change, shown", [
    ("transformer_pn_iwslt_de_en", lambda record: None, True),
    ("transformer_pn_iwslt_de_en", lambda record: record.update(subset="valid"), False),
    ("transformer_pn_iwslt_de_en", lambda record: record["bleu_tokenized"].update(split_compounds=True), False),
    ("transformer_pn_wmt_en_de_big", lambda record: None, False),
    ("transformer_pn_wmt_en_de_big", lambda record: record["bleu_tokenized"].update(split_compounds=True), True),
    ("tensorized_lm_pn_ptb", lambda record: None, True),
    ("tensorized_lm_pn_ptb", lambda record: record["tokens"].update(published_corpus=False), False),
])
def test_no_paper_value_beside_another_kind_of_number(arch, change, shown):
    """The paper's value stands only beside a score of the test set, of the published text, with compounds split where the
    paper's are."""
    benchmark = next(benchmark for benchmark, name in matrix.PAPER if name == arch)
    run_ = next(matrix.runs(benchmark, arch, [1], None, []))
    record = lm_record(run_, 0) if settings.is_lm(settings.load(benchmark)) else record_of(run_, 0)
    record["benchmark"] = benchmark
    change(record)
    (row,) = paper_section(benchmark, arch, {"run": record}).rows
    assert (row.paper is not None) == shown


def test_the_recipe_that_was_changed_is_said():
    """Where the paper's values stand beside runs with overrides, the report lists those that change the recipe."""
    overrides = ["optimization.lr=[0.1]", "common.cpu=true"]
    run_ = next(matrix.runs("iwslt14", "transformer_pn_iwslt_de_en", [1], 1000, overrides))
    record = {**record_of(run_, 0), "benchmark": "iwslt14", "overrides": list(run_.overrides)}
    (said,) = [note for note in paper_section(run_.benchmark, run_.arch, {"run": record}).notes() if "recipe" in note]
    for override in ("optimization.max_update=1000", "lr_scheduler.warmup_updates=80", "optimization.lr=[0.1]"):
        assert override in said
    assert "common." not in said
    record["overrides"] = ["common.seed=1"]
    assert "recipe" not in " ".join(paper_section(run_.benchmark, run_.arch, {"run": record}).notes())


# ---- the paired test -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom, half_a_percent, five_percent", [
    (1, 127.321, 12.7062), (2, 14.0890, 4.30265), (3, 7.45332, 3.18245), (4, 5.59757, 2.77645), (5, 4.77334, 2.57058),
    (9, 3.68966, 2.26216), (10, 3.58141, 2.22814), (29, 3.03805, 2.04523)])
def test_students_distribution(freedom, half_a_percent, five_percent):
    """The two-sided 0.5 % and 5 % points of printed tables of Student's t, for odd and even degrees of freedom."""
    assert 1 - table.within_t(half_a_percent, freedom) == pytest.approx(0.005, rel=1e-4)
    assert 1 - table.within_t(five_percent, freedom) == pytest.approx(0.05, rel=1e-4)
    assert table.within_t(0.0, freedom) == 0


def test_paired_test_over_seeds():
    """t and degrees of freedom of a textbook's arithmetic; none for one seed, equal differences or what is not finite."""
    t, freedom, p = table.paired_t([1.0, 2.0, 4.0])  # mean 7/3, s^2 = 7/3
    assert t == pytest.approx(math.sqrt(7)) and freedom == 2 and p == pytest.approx(1 - math.sqrt(7 / 9))
    assert table.paired_t([-1.0, -2.0, -4.0]) == pytest.approx((-t, 2, p))
    for differences in ([], [1.0], [0.5, 0.5, 0.5], [1.0, None]):
        assert table.paired_t(differences) is None


def test_paired_test_in_the_report(tmp_path):
    """The report gives t and degrees of freedom of the differences from LN of the same seed, in Markdown, CSV and HTML;
    seeds that LN lacks do not count."""
    runs = [each for each in matrix.runs("multi30k", "transformer_pn_tiny", [1, 2, 3, 4], 4000, [])
            if each.row_name in ("layer", "power") and (each.row_name, each.seed) != ("layer", 4)]
    scores = {("layer", 1): 40, ("layer", 2): 41, ("layer", 3): 42, ("power", 1): 41, ("power", 2): 43, ("power", 3): 46,
              ("power", 4): 99}
    records = {f"multi30k/{each.name}": record_of(each, scores[each.row_name, each.seed] - 40) for each in runs}
    part = paper_section("multi30k", "transformer_pn_tiny", records)
    headings, rows = render.plain_rows(part)
    assert [row[headings.index(render.T_TEST)] for row in rows] == ["", "t = 2.65, df = 2, p = 0.118"]
    assert any("Student's test of the differences in tokenized BLEU" in note for note in part.notes())
    lines = list(csv.DictReader(io.StringIO(render.as_csv([part]))))
    assert [line["degrees of freedom"] for line in lines] == ["", "2"]
    assert float(lines[1]["t"]) == pytest.approx(math.sqrt(7))
    assert float(lines[1]["p of t"]) == pytest.approx(0.11808, abs=1e-5)
    assert "t = 2.65, df = 2, p = 0.118" in render.as_html("Table 1", [part], [], records)


def test_significance_in_words():
    """Each seed's difference from LN and p; a seed without a test, and one whose scores are equal, have none."""
    tests = [{"score": 30.5, "baseline": 30.0, "p_value": 0.0412}, None,
             {"score": 29.0, "baseline": 31.25, "p_value": 0.001}, {"score": 30.0, "baseline": 30.0, "p_value": None}]
    assert render.by_seed(tests) == "+0.50 (0.041), -, -2.25 (0.001), +0.00"
    assert render.unrounded(tests) == {"sacreBLEU against LN by seed": "0.5 - -2.25 0.0", "p": "0.0412 - 0.001 -"}
    assert render.by_seed([None, None]) == "" and render.unrounded([None, None]) == {}


def test_significance_belongs_to_its_records(texts, tmp_path, monkeypatch):
    """p-values come from the translations of a record's run; they are kept as long as the scores are the records',
    and no longer; translations that are not those of the record give none."""
    folder, found = texts
    monkeypatch.setenv("PN_RUNS_ROOT", str(tmp_path))
    runs = list(matrix.runs("multi30k", "transformer_pn_tiny", [1], 4000, []))
    runs = [run for run in runs if run.row_name in ("layer", "power")]
    names = [f"{run.benchmark}/{run.name}" for run in runs]
    records = {name: record_of(run, 0) for name, run in zip(names, runs)}
    for name, each, text in zip(names, runs, ("first", "second")):
        (each.directory / "evaluation").mkdir(parents=True)
        for target, source in (("hyp.detok", text), ("ref.detok", "ref")):
            (each.directory / "evaluation" / target).write_bytes((folder / source).read_bytes())
        records[name]["sacrebleu"] = score.sacrebleu_scores(found[text], found["ref"], lowercase=True)["sacrebleu"]
    tests = significance(runs, records)
    assert set(tests) == {names[1]} and tests[names[1]]["against"] == names[0]
    assert not schema.problems({"schema": 1, "kind": "significance", "tests": tests}, schema.SIGNIFICANCE)
    (runs[1].directory / "evaluation" / "hyp.detok").write_text("one line\n")
    with pytest.raises(UserError, match=r"power-4000-seed1/evaluation/hyp.detok has 1 lines, but the reference 60; without"):
        significance(runs, records)
    for each in runs:
        (each.directory / "evaluation" / "hyp.detok").unlink()
    assert significance(runs, records, tests) == tests
    records[names[0]]["sacrebleu"]["score"] += 0.1
    assert significance(runs, records, tests) == {}


@pytest.mark.parametrize("key, message", [
    (("parameters",), "parameters of the model"),
    (("bleu_tokenized", "reference_length"), "words of the reference")])
def test_seeds_on_other_data(key, message):
    """Runs whose data were prepared anew, otherwise, in between have no mean in common."""
    other = copy.deepcopy(RECORD)
    other["seed"] += 1
    assert len(table.lines({"one": RECORD, "other": other})) == 1
    place = other[key[0]] if key[1:] else other
    place[key[-1]] = 5
    with pytest.raises(UserError, match="^one and other are records of the same settings and other data") as caught:
        table.lines({"one": RECORD, "other": other})
    assert f" and 5 {message}" in str(caught.value)


def test_settings_that_differ_are_said(written):
    """A row that was trained with another learning rate is not compared in silence."""
    results, _ = written
    records = {path.stem: json.loads(path.read_text()) for path in sorted((results / "multi30k").glob("*seed1.json"))}
    records["power-4000-seed1"]["config"]["optimization"]["lr"] = [0.1]
    records["layer-4000-seed1"]["config"]["dataset"]["seed"] = 5
    assert sections.differing(table.lines(records)) == {
        "optimization.lr": ["[0.005]", "[0.1]"], "dataset.seed": ["5", "default"]}


@pytest.mark.parametrize("content", [
    None, [], {}, "ä", 0.5, {"a": []}, [[1, 2], [3]], {"text": "x" * 300, "list": [True, None, "y" * 300, {"deep": [{}]}]},
    {"row": {"a": 1, "b": [0.25] * 200, "c": {"d": "e" * 150}}, "next": [{"n": i, "name": "ü" * 60} for i in range(5)]},
    RECORD,
], ids=lambda content: str(content)[:20])
def test_json_of_records(content, tmp_path):
    """What is written reads as what was given; what fits into a line is one; only texts and lists of numbers are longer."""
    text = json_text(content)
    assert json.loads(text) == content
    write_json(tmp_path / "some.json", [content, "\ud800"])  # a half of a pair, as foreign files may have it
    assert read_json(tmp_path / "some.json") == [content, "\ud800"]
    assert "\n" in text or len(text) <= 160
    for line in text.splitlines():
        assert len(line) <= 163 or re.fullmatch(r'\s*("\w+": )?("[^"]*"|\[[^"{\[]*\]),?', line), line
