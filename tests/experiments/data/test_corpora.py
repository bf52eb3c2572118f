"""iwslt14 and wmt14 from small archives laid out as the published ones, prepared through the script as a user does."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import threading
import zipfile

import pytest
import warm
from pipelines import Scripts, contents
from toy import ROOT

from fairseq_powernorm.experiments import files
from fairseq_powernorm.experiments.data import archives, corpora as corpora_table, moses, prepare, sources, stages, workers
from fairseq_powernorm.experiments.errors import UserError
from fairseq_powernorm.experiments.tools import cpus

pytestmark = pytest.mark.slow

# What stands in train.tags -> what the recipe makes of it, worked out by hand. None: it is dropped.
TRAIN = [
    ("<url>http://www.ted.com/talks/1</url>", "<url>http://www.ted.com/talks/1</url>", None),
    ("<keywords>talks, Baum</keywords>", "<keywords>talks, tree</keywords>", None),
    ("<talkid>1</talkid>", "<talkid>1</talkid>", None),
    # The tags of titles and descriptions go, their text stays.
    ("<title>Der Baum: ja!</title>", "<title>The tree: yes!</title>", ("der baum : ja !", "the tree : yes !")),
    ("<description>Er sagt's uns.</description>", "<description>He's here.</description>",
     ("er sagt &apos; s uns .", "he &apos;s here .")),
    # Entities are not resolved: &amp; is an ampersand and a word. U+2019 is no apostrophe in the training text.
    ("Tom &amp; Jerry.", "Tom & Jerry's.", ("tom &amp; amp ; jerry .", "tom &amp; jerry &apos;s .")),
    ("Es gibt’s [noch] \"so\".", "It isn’t <b> | \"so\".",
     ("es gibt ’ s &#91; noch &#93; &quot; so &quot; .", "it isn ’ t &lt; b &gt; &#124; &quot; so &quot; .")),
    # Dashes are not split; abbreviations and numbers keep their full stops and commas.
    ("Die E-Mail kam z. B. um 1,5 Uhr, Dr. Baum.", "The e-mail came at 1.5, Dr. Tree, say.",
     ("die e-mail kam z. b. um 1,5 uhr , dr. baum .", "the e-mail came at 1.5 , dr. tree , say .")),
    # 3 tokens for 2 are as many as 1.5 allows.
    ("Ja gut.", "Yes.", ("ja gut .", "yes .")),
    ("Ja, gut.", "Yes.", None),
    ("", "Nothing.", None),
    ("Nichts.", " ", None),
    ("ja " * 175, "yes " * 175, (" ".join(["ja"] * 175), " ".join(["yes"] * 175))),
    ("ja " * 176, "yes " * 175, None),
    ("Größe \u00c4\u00d6\u00dc.", "Straße ÄÖ.", ("größe äöü .", "straße äö .")),
]
KEPT = [pair for *_, pair in TRAIN if pair]
FILLERS = [(f"Satz {i} ist hier.", f"Sentence {i} is here.") for i in range(1, 61)]
SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
# A segment and the test text that the recipe makes of it: here U+2019 becomes an apostrophe.
SEGMENTS = {"de": ("Das ist ’ne Frage &amp; gut.", "das ist &apos; ne frage &amp; amp ; gut ."),
            "en": ("That’s a question.", "that &apos;s a question .")}


def tgz(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def xml(language, name, segments, kind="srcset"):
    """A file of IWSLT or WMT: what is not in a <seg> is no text."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<{kind} setid="{name}" srclang="{language}">',
             '<doc docid="1" genre="lectures">', "<url>http://www.ted.com</url>", "<title>No text</title>"]
    lines += [f'<seg id="{i}"> {segment} </seg>' for i, segment in enumerate(segments, 1)]
    return "".join(line + "\n" for line in [*lines, "</doc>", f"</{kind}>"]).encode()


def iwslt(**changed):
    """The members of de-en.tgz; `changed`: de or en -> its training text."""
    members = {"de-en/README": b"-"}
    for column, language in enumerate(("de", "en")):
        text = [line[column] for line in [*TRAIN, *FILLERS]]
        members[f"de-en/train.tags.de-en.{language}"] = changed.get(language, "".join(f"{x}\n" for x in text).encode())
        for name in reversed(SETS):
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = xml(language, name, [name, SEGMENTS[language][0]])
    return members


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def without_stamp(found):
    return {name: digest for name, digest in found.items() if not name.endswith((".lock", "prepared.json"))}


@pytest.fixture(scope="module")
def iwslt14(tmp_path_factory):
    """iwslt14 prepared from one archive, undisturbed."""
    scripts = Scripts(tmp_path_factory.mktemp("iwslt14"))
    scripts.archive = write(scripts.data.parent / "de-en.tgz", tgz(iwslt()))
    scripts.output = scripts.ok("prepare", "iwslt14", "--archive", scripts.archive)
    return scripts


# ---- IWSLT14 ---------------------------------------------------------------------------------------------------------


def test_iwslt14_text(iwslt14):
    """tok/ = what the recipe makes of these lines by hand; the 23rd, 46th, ... pair that is left is one for validation;
    the five sets follow one another in the recipe's order; raw/ is the text of tok/, line for line."""
    data = iwslt14.data / "iwslt14"
    for column, language in enumerate(("de", "en")):
        words = ("satz {} ist hier .", "sentence {} is here .")[column]
        kept = [pair[column] for pair in KEPT] + [words.format(i) for i in range(1, 61)]
        assert len(KEPT) == 8
        # The 23rd is filler 23 - 8.
        assert lines(data / "tok" / f"valid.{language}") == [words.format(15), words.format(38)] == kept[22::23][:2]
        assert lines(data / "raw" / f"valid.{language}") == [FILLERS[14][column], FILLERS[37][column]]
        assert lines(data / "tok" / f"train.{language}") == [kept[i] for i in range(68) if i not in (22, 45)]
        raw = lines(data / "raw" / f"train.{language}")
        assert raw[:3] == [("Der Baum: ja!", "The tree: yes!")[column], ("Er sagt's uns.", "He's here.")[column],
                           TRAIN[5][column]] and len(raw) == 66
        assert lines(data / "raw" / f"test.{language}") == [x for name in SETS for x in (name, SEGMENTS[language][0])]
        test = lines(data / "tok" / f"test.{language}")
        assert test[::2] == [name.lower() for name in SETS] and set(test[1::2]) == {SEGMENTS[language][1]}
        pieces = (data / "bpe" / f"train.{language}").read_text(encoding="utf-8")
        assert "@@ " in pieces
        assert pieces.replace("@@ ", "").split("\n")[:-1] == lines(data / "tok" / f"train.{language}")
    assert (data / "data-bin" / "dict.de.txt").read_bytes() == (data / "data-bin" / "dict.en.txt").read_bytes()
    stamp = json.loads((data / "prepared.json").read_text())
    assert stamp["sentences"] == {"train": 66, "valid": 2, "test": 10}
    assert set(stamp["sources"]) == {"de-en.tgz"} and None not in stamp["sources"].values()
    assert {"clean_ratio": 1.5, "clean_max": 175, "valid_every": 23}.items() <= stamp["settings"].items()
    assert "dropped 4 training pairs" in iwslt14.output
    assert re.search(r"NOT the published iwslt14, .*: test 10 \(6,750\)", iwslt14.output)
    assert sorted(path.name for path in data.iterdir()) == ["bpe", "data-bin", "prepared.json", "raw", "tok"]


def test_iwslt14_killed_at_every_stage(iwslt14, tmp_path):
    """Killed at each stage in turn and run again, with the archive of all pairs and one processor = undisturbed: each
    run goes on where the last one was, and the bytes are the same."""
    mine = Scripts(tmp_path)
    outer = {"2014-01/texts/en/de/en-de.tgz": b"-", "2014-01/texts/de/en/de-en.tgz": iwslt14.archive.read_bytes()}
    write(tmp_path / "archives" / "2014-01.tgz", tgz(outer))
    for stage in range(1, 7):
        # Half of the times its workers are left to find out by themselves; fairseq-preprocess would hold the lock.
        alone = stage in (2, 5)
        process = mine.start("prepare", "iwslt14", "--archive-dir", tmp_path / "archives", cold=alone)
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith(f"[{stage}/6]"):
                break
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert sum("done already" in line for line in output) >= stage - 2, output
        assert not (mine.data / "iwslt14").exists()
    one = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    done = subprocess.run([*one, "bash", str(ROOT / "scripts" / "prepare.sh"), "iwslt14", "--archive-dir",
                           str(tmp_path / "archives")], env=mine.environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0 and done.stdout.count("done already") == 5, done.stdout
    assert without_stamp(contents(mine.data)) == without_stamp(contents(iwslt14.data))
    assert [path.name for path in mine.data.iterdir() if path.is_dir()] == ["iwslt14"]


def broken(kind, folder):
    content = tgz(iwslt())
    path = folder / "de-en.tgz"
    if kind == "truncated":
        content = content[:len(content) // 2]
    elif kind == "corrupt":
        content = content[:600] + bytes(200) + content[800:]
    elif kind == "wrong":
        content = tgz({"en-fr/train.tags.en-fr.en": b"Yes.\n"})
    elif kind == "escape":
        content = tgz({"de-en/../../train.tags.de-en.de": b"Ja.\n", **iwslt()})
    elif kind == "unequal":
        content = tgz(iwslt(de=b"Ja.\nNein.\nOh.\n", en=b"Yes.\n<url>a</url>\nNo.\n"))
    elif kind == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("texts/de/en/de-en.tgz", content[:-300])
        content = stream.getvalue()
    elif kind == "none left":
        content = tgz(iwslt(de=b"Ja, ja, ja.\n", en=b"Yes.\n"))
    elif kind == "none for validation":
        content = tgz(iwslt(de=b"Ja.\n" * 22, en=b"Yes.\n" * 22))
    return write(path, content)


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return stream.getvalue()


def tgz_in_zip(members):
    return zipped({"texts/inner.tgz": tgz(members), "texts/other.tgz": tgz(members)})


@pytest.mark.parametrize("pack", [tgz, zipped, tgz_in_zip])
def test_flipped_bits(pack, tmp_path):
    """One bit flipped at any of twenty places of an archive's packed content, the first and the last included, also where
    nobody unpacks it = the archive is refused; of the few bits that mean nothing there may be two among them, and then
    the text is the same."""
    draw = random.Random(1)
    names = ("first", "unwanted", "text", "last")
    texts = {f"d/{name}": draw.getrandbits(8 * 3000).to_bytes(3000, "little") for name in names}
    whole, path = pack(texts), tmp_path / "archive"
    if pack is tgz:  # between a header without a checksum of its own, and the end: the checksum itself
        places = range(10, len(whole))
    else:  # the members' content, between their headers
        with zipfile.ZipFile(io.BytesIO(whole)) as packed:
            places = [place for info in packed.infolist() for start in [info.header_offset + 30 + len(info.filename)]
                      for place in range(start, start + info.compress_size)]
    unpack = functools.partial(archives.unpack, path, {"d/text": "text"}, tmp_path, "inner.tgz")
    accepted = 0
    for place in [places[round(number * (len(places) - 1) / 19)] for number in range(20)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            unpack()
        except UserError as error:
            assert "cannot unpack" in str(error)
        else:
            accepted += 1
            assert (tmp_path / "text").read_bytes() == texts["d/text"]
    assert accepted <= 2
    path.write_bytes(whole)
    unpack()
    assert (tmp_path / "text").read_bytes() == texts["d/text"]


def test_a_size_below_zero(tmp_path):
    """An archive whose members have negative sizes, which would lead back to its beginning for ever, is damaged."""
    header = bytearray(tarfile.TarInfo("d/other").tobuf())
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("d/first").tobuf() + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match="cannot unpack .*a.tar: "):
        archives.unpack(tmp_path / "a.tar", {"d/text": "text"}, tmp_path)


@pytest.mark.parametrize("kind, message", [
    ("truncated", "cannot unpack .*de-en.tgz"),
    ("corrupt", "cannot unpack .*de-en.tgz"),
    ("wrong", "lacks de-en/train.tags.de-en.de, .*it must hold"),
    ("escape", "which leads out of its directory"),
    ("unequal", "unequal line counts: de-en/train.tags.de-en.de has 3, de-en/train.tags.de-en.en has 2"),
    ("zip", "in it texts/de/en/de-en.tgz: cannot unpack"),
    ("none left", "no sentence pair of the training text is left"),
    ("none for validation", "too few training pairs, 22, to take one in 23 for validation"),
])
def test_bad_archives(kind, message, tmp_path):
    """An archive that is damaged or another one is refused in one line; it stays as it is, and no data appear."""
    mine = Scripts(tmp_path / "home")
    path = broken(kind, tmp_path)
    before = path.read_bytes()
    assert re.search(message, mine.refuses("prepare", "iwslt14", "--archive", path))
    assert path.read_bytes() == before and not (mine.data / "iwslt14").exists()
    assert not list(tmp_path.rglob("train.*")) or kind.startswith("none")


def test_full_disk(iwslt14, tmp_path):
    """A disk that is full, early or late, is one clear line, and no data appear."""
    mine = Scripts(tmp_path)
    for limit in (1, 2):
        command = f"ulimit -f {limit}; exec bash {ROOT / 'scripts' / 'prepare.sh'} iwslt14 --archive {iwslt14.archive}"
        done = subprocess.run(["bash", "-c", command], env=mine.environment, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        assert done.returncode == 2 and "File too large" in done.stdout, done.stdout
        assert done.stdout.count("error: ") == 1 and "Traceback" not in done.stdout and not (mine.data / "iwslt14").exists()
        assert not [path for path in mine.data.rglob(".*") if path.is_dir() and path.parent.name == ".iwslt14.partial"]


def test_options_that_do_not_fit(iwslt14, tmp_path):
    """Options that do not fit are refused, naming option, value and what is valid; prepared data are left alone."""
    mine = Scripts(tmp_path)
    assert "--bpe-size '0'" in mine.refuses("prepare", "iwslt14", "--bpe-size", "0")
    assert "--bpe-size '10k': must be a number" in mine.refuses("prepare", "wmt14", "--bpe-size", "10k")
    assert "--news-commentary 'v9': iwslt14 has no such part; valid with: wmt14" in mine.refuses(
        "prepare", "iwslt14", "--news-commentary", "v9")
    assert "--news-commentary 'v10' is unknown; valid: v12, v9" in mine.refuses(
        "prepare", "wmt14", "--news-commentary", "v10")
    assert "--cleaning 'fairseq': iwslt14 has no such part; valid with: wmt14" in mine.refuses(
        "prepare", "iwslt14", "--cleaning", "fairseq")
    assert "--cleaning 'none' is unknown; valid: authors, fairseq" in mine.refuses("prepare", "wmt14", "--cleaning", "none")
    assert "--archive 'x.tgz': wmt14 does not come in one archive" in mine.refuses(
        "prepare", "wmt14", "--archive", "x.tgz")
    assert "not a file; it must be laid out as de-en.tgz or 2014-01.tgz" in mine.refuses(
        "prepare", "iwslt14", "--archive", "x.tgz")
    assert "lacks de-en.tgz or 2014-01.tgz; looked in" in mine.refuses("prepare", "iwslt14", "--archive-dir", tmp_path)
    for other in ("--archive", "--text-dir"):
        assert f"{other} and --archive-dir exclude each other" in mine.refuses(
            "prepare", "iwslt14", "--archive-dir", tmp_path, other, "x")
    assert not mine.data.exists()
    before = contents(iwslt14.data)
    assert "nothing to do" in iwslt14.here("prepare", "iwslt14", "--archive", iwslt14.archive)
    assert "bpe_size is 10000, asked for 500" in iwslt14.refuses(
        "prepare", "iwslt14", "--archive", iwslt14.archive, "--bpe-size", "500")
    assert contents(iwslt14.data) == before
    stamp = iwslt14.data / "iwslt14" / "prepared.json"
    whole = stamp.read_text()
    stamp.write_text(whole.replace(f'"schema": {prepare.SCHEMA}', '"schema": 1'))
    assert "by an earlier version of this program" in iwslt14.refuses("prepare", "iwslt14", "--archive", iwslt14.archive)
    stamp.write_text(whole)


def test_lines_are_read_as_they_are_needed():
    """Workers give the lines in order, and of a long text hold no more than a few batches for each processor."""
    taken = 0

    def text():
        nonlocal taken
        for taken in range(1, 100_001):
            yield f"LINE {taken}"

    with workers.Workers() as pool:
        out = pool.map(functools.partial(moses.process, names=["lowercase"], language="de"))(text())
        assert next(out) == "line 1" and taken <= (2 * cpus() + 1) * workers.BATCH
        assert list(out) == [f"line {i}" for i in range(2, 100_001)]


# ---- WMT14 -----------------------------------------------------------------------------------------------------------

# In the archives of the training text -> tok/, worked out by hand. Normalized as the Perl script does: German full stops
# go behind the quotation mark, in English it stays; what is not printable becomes a space; dashes are split.
WMT = {
    "training-parallel-europarl-v7.tgz": ("training/europarl-v7.de-en", [
        ("Die EU-Staaten sagen: „Nein.“", "The EU-states say: “No no.”",
         "Die EU @-@ Staaten sagen : &quot; Nein &quot; .", "The EU @-@ states say : &quot; No no . &quot;"),
        ("Hal\u200blo \u2013 du’s", "Hel\u200blo \u2013 you’s", "Hal lo - du &apos; s", "Hel lo - you &apos;s"),
    ]),
    "training-parallel-commoncrawl.tgz": ("commoncrawl.de-en", [
        ("Rock\u00a0&amp; Roll", "Rock \u00ab&amp;\u00bb Roll",
         "Rock &amp; amp ; Roll", "Rock &quot; &amp; amp ; &quot; Roll"),
        ("ja " * 250, "yes " * 250, " ".join(["ja"] * 250), " ".join(["yes"] * 250)),
        ("ja " * 251, "yes " * 250, " ".join(["ja"] * 251), " ".join(["yes"] * 250)),
        ("ja ja", "yes yes yes yes", "ja ja", "yes yes yes yes"),
        ("", "yes", "", "yes"),
        ("ja " * 80, "yes " * 80, " ".join(["ja"] * 80), " ".join(["yes"] * 80)),
        ("ja " * 81, "yes " * 80, " ".join(["ja"] * 81), " ".join(["yes"] * 80)),
        ("ja", "yes " * 9, "ja", " ".join(["yes"] * 9)),
        ("ja", "yes " * 10, "ja", " ".join(["yes"] * 10)),
    ]),
}
NEWS = [("Kommentar {}", "Comment {}", "Kommentar {}", "Comment {}")] * 2
# Held-out text, and what becomes of it as newstest2013, which is treated as training text is, and as newstest2014, where
# U+2019 becomes an apostrophe and nothing else changes.
HELD_OUT = {"en": ("The EU’s “so-called” man &amp; woman\u200b.",
                   "The EU &apos;s &quot; so @-@ called &quot; man &amp; amp ; woman .",
                   "The EU &apos;s “ so @-@ called ” man &amp; amp ; woman \u200b ."),
            "de": ("Der „so-genannte“ Mann’s Baum usw.",
                   "Der &quot; so @-@ genannte &quot; Mann &apos; s Baum usw .",
                   "Der „ so @-@ genannte “ Mann &apos; s Baum usw .")}
# The rows that are left out: too many words before BPE, or too many and too unequal pieces after it.
DROPPED = {"authors": (3, 4, 6, 8, 10), "fairseq": (4, 5, 6, 9, 10)}


def wmt(folder, version, **changed):
    """The five archives."""
    news = [tuple(text.format(version) for text in row) for row in NEWS]
    texts = {**WMT, f"training-parallel-nc-{version}.tgz": (f"training/news-commentary-{version}.de-en", news)}
    for archive, (member, rows) in texts.items():
        write(folder / archive, tgz({f"{member}.{language}": "".join(row[column] + "\n" for row in rows).encode()
                                     for column, language in enumerate(("de", "en"))}))
    write(folder / "dev.tgz", tgz({f"dev/newstest{year}.{language}": (text + "\n").encode() for year in (2012, 2013)
                                   for language, (text, *_) in HELD_OUT.items()}))
    write(folder / "test-full.tgz", tgz({
        f"test-full/newstest2014-deen-{side}.{language}.sgm": xml(language, "newstest2014", [text, text], f"{side}set")
        for side in ("src", "ref") for language, (text, *_) in HELD_OUT.items()}))
    return [row for _, rows in texts.values() for row in rows]


@pytest.mark.parametrize("version, bpe, cleaning", [("v12", "subword_nmt", "authors"), ("v9", "sentencepiece", "fairseq")])
def test_wmt14_text(version, bpe, cleaning, tmp_path):
    """tok/ = what the recipe makes of these lines by hand; pairs are left out that the authors' limits of 1 to 80 words
    (and 9 for one) exclude, of bpe/ only with fairseq's of 250 pieces (and 1.5 for one); valid is newstest2013, test
    newstest2014, whose references stay in raw/ as they are."""
    mine = Scripts(tmp_path)
    rows = wmt(tmp_path / "archives" / "wmt14", version)
    # v12 and the authors' cleaning are the default
    options = [] if version == "v12" else [
        "--news-commentary", "v9", "--bpe", bpe, "--bpe-size", "78", "--cleaning", cleaning]
    output = mine.here("prepare", "wmt14", *options, DATA_ARCHIVES=str(tmp_path / "archives"))
    assert "is NOT the published training-parallel-europarl-v7.tgz" in output
    data = mine.data / "wmt14"
    kept = [row for number, row in enumerate(rows) if number not in DROPPED[cleaning]]
    assert cleaning == "fairseq" or f"dropped {len(DROPPED[cleaning])} training pairs" in output
    for column, language in ((0, "de"), (1, "en")):
        before_bpe = kept if cleaning == "authors" else rows
        assert lines(data / "raw" / f"train.{language}") == [row[column] for row in before_bpe]
        assert lines(data / "tok" / f"train.{language}") == [row[2 + column] for row in before_bpe]
        for split, number in (("valid", 1), ("test", 2)):
            raw, *tokens = HELD_OUT[language]
            assert lines(data / "raw" / f"{split}.{language}") == [raw] * number
            assert lines(data / "tok" / f"{split}.{language}") == [tokens[number - 1]] * number
        pieces = lines(data / "bpe" / f"train.{language}")
        if bpe == "subword_nmt":  # of words that occur often, a piece is a word
            assert [line.replace("@@ ", "") for line in pieces] == [row[2 + column] for row in kept]
        else:
            words = [line.replace(" ", "").replace("\u2581", " ").strip() for line in pieces]
            assert len(words) >= 3 and words == [row[2 + column] for row in kept if row[2 + column] in words]
    counts = [[len(line.split()) for line in lines(data / "bpe" / f"train.{language}")] for language in ("de", "en")]
    if cleaning == "fairseq":
        assert all(max(pair) <= min(250, 1.5 * min(pair)) for pair in zip(*counts))
    stamp = json.loads((data / "prepared.json").read_text())
    assert stamp["sentences"] == {"train": len(counts[0]), "valid": 1, "test": 2}
    assert stamp["settings"]["news_commentary"] == version and stamp["settings"]["bpe"] == bpe
    assert (stamp["settings"]["cleaning"], stamp["settings"]["clean_max"]) == (
        cleaning,
        80 if cleaning == "authors" else 250,
    )
    assert f"training-parallel-nc-{version}.tgz" in stamp["sources"] and len(stamp["sources"]) == 5


# ---- Moses -----------------------------------------------------------------------------------------------------------

TOKENIZER = """binmode(STDIN, ":utf8"); binmode(STDOUT, ":utf8");
my $arguments = join(" ", @ARGV); while (<STDIN>) { s/([.,])/ $1/g; s/^/PERL / if $arguments =~ /-l de$/; print; }"""
LOWERCASE = 'binmode(STDIN, ":utf8"); binmode(STDOUT, ":utf8"); while (<STDIN>) { print lc($_); }'


def test_perl_scripts(iwslt14, tmp_path):
    """MOSES=DIR: the text goes through the scripts of that directory, in the recipe's order, and the stamp says so; a
    directory without them, or scripts that fail or lose a line, are refused."""
    import shutil

    if shutil.which("perl") is None:
        pytest.skip("perl is not installed")
    mine = Scripts(tmp_path)
    scripts = tmp_path / "moses" / "scripts" / "tokenizer"
    prepare = functools.partial(mine.here, "prepare", "iwslt14", "--archive", iwslt14.archive)
    refused = functools.partial(mine.refuses, "prepare", "iwslt14", "--archive", iwslt14.archive)
    environment = {"MOSES": str(tmp_path / "moses")}
    tokenizer = write(scripts / "tokenizer.perl", b"exit 3;")
    assert re.search("MOSES=.*/moses lacks .*/lowercase.perl; valid is the directory", refused(**environment))
    write(scripts / "lowercase.perl", LOWERCASE.encode())
    assert "tokenizer.perl -threads" in refused(**environment)
    tokenizer.write_text("<STDIN>; while (<STDIN>) { print; }")
    assert "lines of" in refused(**environment)
    tokenizer.write_text(TOKENIZER)
    prepare(**environment)
    data = mine.data / "iwslt14"
    assert lines(data / "tok" / "test.de")[1] == "perl das ist 'ne frage &amp; gut ."
    assert lines(data / "tok" / "test.en")[1] == "that's a question ."
    stamp = json.loads((data / "prepared.json").read_text())
    assert set(stamp["settings"]["moses"]) == {"tokenizer.perl", "lowercase.perl"}
    assert "nothing to do" in prepare(**environment)
    assert "tokenized by other Moses scripts" in refused()


def test_perl_scripts_see_bytes(tmp_path, monkeypatch):
    """The scripts that work on bytes do so whatever $PERL_UNICODE says."""
    import shutil

    if shutil.which("perl") is None:
        pytest.skip("perl is not installed")
    scripts = tmp_path / "scripts" / "tokenizer"
    write(scripts / "tokenizer.perl", b"print while <STDIN>;")
    write(scripts / "normalize-punctuation.perl", b"while (<STDIN>) { s/\xe2\x80\x99/'/g; print; }")
    perl = moses.Perl(str(tmp_path), {"languages": ["de", "en"], "normalize_punctuation": True})
    monkeypatch.setenv("PERL_UNICODE", "SDA")
    with open(tmp_path / "lock", "w") as lock:
        assert list(perl.process(["Es gibt\u2019s."], ["normalize", "tokenize"], "de", lock)) == ["Es gibt's."]


def test_tokenization_is_that_of_the_published_text(corpora):
    """Tokenizing the real IWSLT14 test text anew, from its words = that text: the same tokens, escapes and dashes."""
    from sacremoses import MosesDetokenizer

    for language in ("de", "en"):
        with gzip.open(corpora / "iwslt14" / f"test.{language}.gz", "rt", encoding="utf-8") as text:
            words = [line.rstrip("\n").replace("@@ ", "") for line in text][:1500]
        if language == "en":  # the parts of a contraction are not joined again
            words = [line for line in words if "&apos;" not in line]
        plain = [MosesDetokenizer().unescape_xml(line) for line in words]
        assert len(plain) > 900 and moses.process(plain, ["tokenize", "lowercase"], language) == words


def test_real_dictionary(corpora, tmp_path):
    """Binarized as the pipeline does it, with the dictionary of a real IWSLT14 run (which has ' and " where the text
    has their entities): the words that become <unk> are those that are not in it, less than 0.3 % of the test text."""
    from sacremoses import MosesDetokenizer

    for name in ("valid.de", "valid.en", "test.de", "test.en", "dict.de.txt"):
        text = gzip.decompress((corpora / "iwslt14" / f"{name}.gz").read_bytes()).decode("utf-8")
        write(tmp_path / "bpe" / name, (text if "dict" in name else MosesDetokenizer().unescape_xml(text)).encode())
    with open(tmp_path / "lock", "w") as lock:
        stages.binarize(tmp_path, tmp_path / "data-bin", [
            warm.program("fairseq-preprocess"), "--source-lang", "de", "--target-lang", "en", "--joined-dictionary",
            "--srcdict", str(tmp_path / "bpe" / "dict.de.txt"), "--workers", "1"],
            {split: f"bpe/{split}" for split in ("valid", "test")}, lock)
    known = {line.split(" ")[0] for line in lines(tmp_path / "bpe" / "dict.de.txt")}
    log = (tmp_path / "data-bin" / "preprocess.log").read_text()
    for language in ("de", "en"):
        words = (tmp_path / "bpe" / f"test.{language}").read_text(encoding="utf-8").split()
        tokens = len(words) + 6750
        unknown = 100 * sum(word not in known for word in words) / tokens
        assert unknown < 0.3 and f"bpe/test.{language}: 6750 sents, {tokens} tokens, {unknown:.3}% replaced" in log, log


# ---- downloads -------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, but not to Python's own name; breaks off after `most` bytes; understands Range if `ranges`."""

    content, most, ranges, asked, length = b"", None, True, [], None

    def do_GET(self):
        if "urllib" in self.headers["User-Agent"]:  # as some servers do
            self.send_error(403)
            return
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", self.length or str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][:self.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    class Own(Server):
        asked = []

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    Own.url = f"http://127.0.0.1:{running.server_address[1]}/"
    yield Own
    running.shutdown()
    running.server_close()


@pytest.fixture
def direct(monkeypatch):
    """No proxy, no mirror."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "DATA_MIRROR"):
        monkeypatch.delenv(name, raising=False)


#: The server's files have no checksum.
download = functools.partial(archives.download, is_verified=True)


def test_download_is_resumed(server, direct, tmp_path):
    """A download that breaks off + the next one = the file: it goes on where it stopped, or begins anew where the
    server cannot; a mirror that is missing is passed over."""
    server.content, server.most = bytes(range(256)) * 9000, 1_000_000
    nowhere = "http://127.0.0.1:9/"
    with pytest.raises(UserError, match=r"cannot download .*:9/a.tgz.*after 1,000,000 of 2,304,000 bytes"):
        download("a.tgz", (nowhere, server.url), tmp_path)
    server.most = None
    path = download("a.tgz", (nowhere, server.url), tmp_path, size=len(server.content))
    assert path.read_bytes() == server.content and server.asked == [None, "bytes=1000000-"]
    assert download("a.tgz", (nowhere,), tmp_path) == path, "it is there"
    server.ranges = False
    (tmp_path / "b.tgz.part").write_bytes(b"some")
    assert download("b.tgz", (server.url,), tmp_path).read_bytes() == server.content
    # What is whole but has not got its name yet is not fetched again.
    server.ranges = True
    (tmp_path / "c.tgz.part").write_bytes(server.content)
    assert download("c.tgz", (server.url,), tmp_path).read_bytes() == server.content


def test_download_of_another_size(server, direct, tmp_path):
    """A file that has not the known size is not fetched; the next mirror is tried, and all are named if none has it."""
    server.content = b"<html>gone</html>"
    with pytest.raises(UserError, match=f"{server.url}a.tgz: it has 17 bytes there, expected 99"):
        download("a.tgz", (server.url,), tmp_path, size=99)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", ["many", "9" * 5000])
def test_download_of_a_length_that_is_none(length, server, direct, tmp_path):
    """A server that does not say how long a file is, or something else, is taken at its bytes."""
    server.content, server.length = b"the text", length
    fetched = archives.download("a.tgz", (server.url,), tmp_path, is_verified=True)
    assert fetched.read_bytes() == b"the text"


def test_download_is_verified(server, direct, tmp_path):
    """The checksum of the published file, of either algorithm, decides: an address that gives another one is passed
    over, and what lies there from before is fetched again; plain http without a checksum is refused before anything
    is asked for."""
    server.content = b"the text" * 1000
    for algorithm in ("md5", "sha256"):
        digest = f"{algorithm}:{hashlib.new(algorithm, server.content).hexdigest()}"
        other = (tmp_path / algorithm).with_suffix(".tgz")
        other.write_bytes(b"another")
        assert archives.download(other.name, (server.url,), tmp_path, digest=digest) == other
        assert other.read_bytes() == server.content
        asked = len(server.asked)
        assert archives.download(other.name, (server.url,), tmp_path, digest=digest) == other and len(server.asked) == asked
        with pytest.raises(UserError, match=f"its checksum is {digest}, expected {algorithm}:00"):
            archives.download("b.tgz", (server.url,), tmp_path, digest=f"{algorithm}:00")
    asked = len(server.asked)
    for url in (server.url, server.url.replace("http", "HTTP"), "ftp://127.0.0.1:9/"):
        with pytest.raises(UserError, match="no checksum of it is published, .* --allow-unverified takes it"):
            archives.download("b.tgz", (url,), tmp_path)
    assert len(server.asked) == asked and not (tmp_path / "b.tgz").exists()


def test_another_archive_after_a_download(direct, tmp_path, monkeypatch, capsys):
    """A preparation that was interrupted after its download notes what it had downloaded: with another archive the next
    one begins anew, with the same it goes on."""
    def interrupt(*_):
        raise KeyboardInterrupt

    write(tmp_path / "mirror" / "de-en.tgz", tgz(iwslt()))
    mine = write(tmp_path / "mine.tgz", tgz(iwslt(de=b"Mein.\n", en=b"Mine.\n")))
    monkeypatch.setenv("DATA_MIRROR", (tmp_path / "mirror").as_uri())
    monkeypatch.setenv("PN_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setattr(moses, "steps", interrupt)
    left = tmp_path / "data" / ".iwslt14.partial"
    downloaded = tmp_path / "data" / "downloads" / "iwslt14" / "de-en.tgz"
    for archive, first, said in ((None, "Der Baum", ""), (None, "Der Baum", "going on with"), (mine, "Mein.", "removing"),
                                 (None, "Der Baum", "removing")):
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("iwslt14", archive=archive and str(archive))
        stamp = json.loads((left / "prepared.json").read_text())
        assert stamp["sources"] == {"de-en.tgz": files.sha256(archive or downloaded)}
        assert (left / "corpus" / "train.de").read_text().startswith(first) and said in capsys.readouterr().out


def test_archive_directory(tmp_path):
    """A benchmark's own directory is searched before the one around it, and the first name before the second."""
    for name in ("a", "b"):
        write(tmp_path / name, b"-")
    write(tmp_path / "iwslt14" / "b", b"-")
    folder = sources.ArchiveDir(tmp_path, "iwslt14")
    assert folder.find("b", "a") == folder.find("a", "b") == folder.find("b") == tmp_path / "iwslt14" / "b"
    assert folder.find("a") == tmp_path / "a" and folder.find("c") is None


def test_every_address():
    """Every file has an https address, tried before plain http, and over plain http nothing lies that has no checksum
    (an archive, or the texts of single files)."""
    for benchmark, entry in corpora_table.CORPORA.items():
        files = [(archive.urls, archive.checksum) for archive in getattr(entry, "archives", {}).values()]
        if isinstance(entry, corpora_table.LanguageModelCorpus):
            files.append((entry.archive.urls, entry.archive.checksum))
        files += [(entry.urls, text.sha256) for text in getattr(entry, "files", {}).values() if entry.urls]
        assert files
        for urls, checksum in files:
            assert urls[0].startswith("https://"), benchmark
            assert checksum or all(url.startswith("https://") for url in urls), benchmark
            assert not any(host in url for url in urls for host in ("metamind", "wit3", "vutbr")), "they are dead"


def test_damaged_download_is_removed(server, direct, tmp_path):
    """DATA_MIRROR gives a damaged archive: it is refused and removed, so that the next run fetches it anew. Over plain
    http it is not even asked for, as it has no checksum, unless the user allows it."""
    mine = Scripts(tmp_path)
    environment = {"DATA_MIRROR": server.url, "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    server.content = tgz(iwslt())[:-500]
    assert "--allow-unverified" in mine.refuses("prepare", "iwslt14", **environment) and server.asked == []
    fetch = functools.partial(mine.refuses, "prepare", "iwslt14", "--allow-unverified", **environment)
    message = fetch()
    assert "cannot unpack" in message and "downloads/iwslt14/de-en.tgz" in message
    assert [path.name for path in mine.data.rglob("*") if path.is_file()] == [".iwslt14.lock"]
    server.content = tgz({"de-en/README": b"-"})
    assert "lacks de-en/train.tags" in fetch()
    assert server.asked == [None, None]
