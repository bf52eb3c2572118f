"""Where each benchmark's text comes from: one table, and the code that fetches and verifies it."""

import gzip
import hashlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from settings import ROOT, UserError, sha256

SPLITS = ("train", "valid", "test")
MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"

# benchmark -> files: name in the archive -> (split.language, SHA-256 of the uncompressed text).
CORPORA = {
    "multi30k": {
        "url": MULTI30K,
        "files": {
            "train.de.gz": ("train.de", "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
            "train.en.gz": ("train.en", "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
            "val.de.gz": ("valid.de", "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
            "val.en.gz": ("valid.en", "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
            "test_2016_flickr.de.gz": ("test.de", "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
            "test_2016_flickr.en.gz": ("test.en", "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
        },
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
        self.url, self.files = CORPORA[benchmark]["url"], CORPORA[benchmark]["files"]

    def identity(self):
        return {name: digest for name, digest in self.files.values()}

    def write(self, directory):
        archives = [self._find(file) for file in self.files]
        directory.mkdir()
        for archive, (name, expected) in zip(archives, self.files.values()):
            self._unpack(archive, directory / name, expected)

    def _find(self, file):
        if self.archive_dir is None:
            return self._download(file)
        places = [self.archive_dir / self.benchmark / file, self.archive_dir / file]
        for place in places:
            if place.is_file():
                return place
        raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(self.archive_dir)!r} lacks {file}; "
                        f"looked for {' and '.join(map(str, places))}")

    def _download(self, file):
        """Downloads a file, going on where an earlier attempt stopped."""
        target = self.download_dir / file
        if target.is_file():
            return target
        partial = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.is_file() else 0
        request = urllib.request.Request(self.url + file, headers={"Range": f"bytes={start}-"} if start else {})
        print(f"downloading {self.url}{file}", flush=True)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                # 206: the server goes on where we stopped; 200: it begins anew.
                with open(partial, "ab" if answer.status == 206 else "wb") as stream:
                    shutil.copyfileobj(answer, stream)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: nothing is left to download
                raise UserError(f"cannot download {self.url}{file}: {error}") from None
        except OSError as error:
            raise UserError(f"cannot download {self.url}{file}: {error}; without a network, fetch the files elsewhere and "
                            f"give their directory with --archive-dir DIR or DATA_ARCHIVES=DIR") from None
        partial.replace(target)
        return target

    def _unpack(self, archive, target, expected):
        digest = hashlib.sha256()
        try:
            with gzip.open(archive, "rb") as packed, open(target, "wb") as text:
                for block in iter(lambda: packed.read(1 << 20), b""):
                    digest.update(block)
                    text.write(block)
        except (OSError, EOFError) as error:
            self._discard(archive)
            raise UserError(f"cannot unpack {archive}: {error}") from None
        if digest.hexdigest() != expected:
            self._discard(archive)
            raise UserError(f"{archive}: SHA-256 of the uncompressed text is {digest.hexdigest()}, expected {expected}")

    def _discard(self, archive):
        """A damaged download is removed, so that the next run fetches it anew; the user's archives are left alone."""
        if self.archive_dir is None:
            archive.unlink()


class OwnText:
    """The user's own text: train|valid|test.LANGUAGE in one directory."""

    def __init__(self, directory, languages):
        self.directory = Path(directory)
        self.names = [f"{split}.{language}" for split in SPLITS for language in languages]

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
        for name in self.names:
            shutil.copyfile(self.directory / name, directory / name)


def source(benchmark, languages, *, text_dir, archive_dir, download_dir):
    """The source of a benchmark's text: `identity()` names it before any work, `write(directory)` makes it,
    with files split.language."""
    if text_dir is not None:
        return OwnText(text_dir, languages)
    if archive_dir is not None:
        archive_dir = Path(archive_dir)
        if benchmark in CORPORA and not archive_dir.is_dir():
            raise UserError(f"archive directory (--archive-dir or DATA_ARCHIVES) {str(archive_dir)!r} is not a directory")
    if benchmark in CORPORA:
        return Downloaded(benchmark, archive_dir, download_dir)
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
