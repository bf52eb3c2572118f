"""Where a benchmark's text is taken from: downloads, the user's archives, the user's own text, or the generator."""

import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence

from ..errors import UserError
from ..files import sha256
from . import demo
from .archives import differing, download, gunzip, unpack
from .corpora import CORPORA, SPLITS, ArchivedCorpus, LanguageModelCorpus, Part, SingleFiles, in_one_archive
from .texts import LAYOUTS, check_equal, check_parallel

#: name of a file or text -> its SHA-256, None while it is not known (before it is downloaded)
Identity = Dict[str, Optional[str]]


class Source(Protocol):
    """What a benchmark's text is taken from."""

    def identity(self) -> Identity:
        """What the text is, told before any work. Raises UserError if something is missing."""

    def write(self, directory: Path) -> None:
        """Makes the files SPLIT.LANGUAGE, or SPLIT.txt for a language model."""


class Generated:
    """The artificial corpus of `demo`, which demo.py draws from the words of its lexicon."""

    def identity(self) -> Identity:
        return {path.name: sha256(path) for path in (Path(demo.__file__), demo.LEXICON)}

    def write(self, directory: Path) -> None:
        demo.write(directory)


class ArchiveDir:
    """A directory of the user's with the files of a corpus; DIR/BENCH/ is searched before DIR/."""

    def __init__(self, directory: Path, benchmark: str) -> None:
        if not directory.is_dir():
            raise UserError(f"{self._called(directory)} is not a directory")
        self.directory, self.folders = directory, (directory / benchmark, directory)

    @staticmethod
    def _called(directory: Path) -> str:
        return f"archive directory (--archive-dir or DATA_ARCHIVES) {str(directory)!r}"

    def find(self, *names: str) -> Optional[Path]:
        """The first of the names that is a file there, None if none is."""
        return next((folder / name for folder in self.folders for name in names if (folder / name).is_file()), None)

    def require(self, *names: str) -> Path:
        """The first of the names that is a file there; refuses if none is."""
        found = self.find(*names)
        if found is None:
            raise self.lacks(" or ".join(names))
        return found

    def lacks(self, what: str) -> UserError:
        return UserError(f"{self._called(self.directory)} lacks {what}; looked in {' and '.join(map(str, self.folders))}")


class Files:
    """The single files of a published corpus, from an archive directory or downloaded; the text is verified."""

    def __init__(
        self, corpus: SingleFiles, archive_dir: Optional[ArchiveDir], download_dir: Path, *, allow_unverified: bool
    ) -> None:
        self.corpus, self.archive_dir, self.download_dir = corpus, archive_dir, download_dir
        self.allow_unverified = allow_unverified

    def identity(self) -> Identity:
        return {text.name: text.sha256 for text in self.corpus.files.values()}

    def write(self, directory: Path) -> None:
        self._unpack({file: self._find(file) for file in self.corpus.files}, directory)

    def _unpack(self, paths: Mapping[str, Path], directory: Path) -> None:
        for file, path in paths.items():
            text = self.corpus.files[file]
            try:
                digest = gunzip(path, directory / text.name)
            except UserError:
                self._discard(path)
                raise
            self._verify(path, "uncompressed text", digest, text.sha256)

    def _find(self, file: str) -> Path:
        """The file in the archive directory, or downloaded; a download is verified when it is unpacked."""
        if self.archive_dir is not None:
            return self.archive_dir.require(file)
        text = self.corpus.files[file]
        return download(
            file,
            self.corpus.urls,
            self.download_dir,
            size=text.size,
            is_verified=self.allow_unverified or text.sha256 is not None,
        )

    def _verify(self, path: Path, what: str, digest: str, expected: Optional[str]) -> None:
        if expected is not None and digest != expected:
            self._discard(path)
            raise UserError(f"{path}: SHA-256 of the {what} is {digest}, expected {expected}")

    def _discard(self, path: Path) -> None:
        """Removes a damaged download, so that the next run fetches it again; the user's archives are left alone."""
        if self.archive_dir is None:
            path.unlink()


class FilesOrArchive(Files):
    """The text of a language model, from single files, plain or compressed with gzip, or from one archive."""

    corpus: LanguageModelCorpus

    def identity(self) -> Identity:
        digests = super().identity()
        return {self.corpus.archive_name: self.corpus.archive.sha256} if None in digests.values() else digests

    def write(self, directory: Path) -> None:
        paths = self._single_files()
        if paths is not None:
            return self._unpack(paths, directory)
        archive = self._archive()
        self._verify(archive, "archive", sha256(archive), self.corpus.archive.sha256)
        try:
            digests = unpack(archive, self.corpus.members, directory)
        except UserError:
            self._discard(archive)
            raise
        for text in self.corpus.files.values():
            self._verify(archive, f"text {text.name}", digests[text.name], text.sha256)
        return None

    def _single_files(self) -> Optional[Dict[str, Path]]:
        """file -> where it is; None if one of them is not to be had, or the archive is there.

        A corpus without addresses of single files has no checksums of its texts either: such files could be anything.
        """
        if not self.corpus.urls:
            return None
        if self.archive_dir is None:
            try:
                return {file: self._find(file) for file in self.corpus.files}
            except UserError as error:
                print(error, flush=True)
                return None
        if self.archive_dir.find(self.corpus.archive_name):
            return None
        found = {file: self.archive_dir.find(file, f"{file}.gz") for file in self.corpus.files}
        return {file: path for file, path in found.items() if path} if all(found.values()) else None

    def _archive(self) -> Path:
        name, archive = self.corpus.archive_name, self.corpus.archive
        if self.archive_dir is None:
            return download(
                name, archive.urls, self.download_dir, digest=archive.checksum, is_verified=self.allow_unverified
            )
        found = self.archive_dir.find(name)
        if found is None:
            raise self.archive_dir.lacks(f"{name} or {' + '.join(self.corpus.files)}" if self.corpus.urls else name)
        return found


class OneArchive:
    """An archive of the user's with the text of a language model, laid out as the published one."""

    def __init__(self, corpus: LanguageModelCorpus, archive: Path) -> None:
        self.corpus, self.archive = corpus, archive

    def identity(self) -> Identity:
        return {self.archive.name: sha256(a_file(self.archive, [self.corpus.archive_name]))}

    def write(self, directory: Path) -> None:
        unpack(self.archive, self.corpus.members, directory)


def a_file(archive: Path, layouts: Sequence[str]) -> Path:
    """The path of --archive; refuses if it is not a file."""
    if not archive.is_file():
        raise UserError(f"--archive {str(archive)!r} is not a file; it must be laid out as {' or '.join(layouts)}")
    return archive


class Archives:
    """A published parallel corpus, put together from members of archives.

    They are downloaded, in an archive directory, or, if it is one archive, in a file of the user's. The user's archives
    must have the layout of the published ones, but not their checksums.
    """

    def __init__(
        self,
        corpus: ArchivedCorpus,
        settings: Mapping[str, Any],
        archive_dir: Optional[ArchiveDir],
        archive: Optional[Path],
        download_dir: Path,
        *,
        allow_unverified: bool,
    ) -> None:
        self.corpus, self.download_dir, self.allow_unverified = corpus, download_dir, allow_unverified
        self.archive_dir, self.archive = archive_dir, archive
        self.parts: Dict[str, List[Part]] = {}  # SPLIT.LANGUAGE -> its parts, in order
        for split, parts in corpus.parts.items():
            for language, side in zip(settings["languages"], ("src", "ref")):
                names = {**settings, "language": language, "side": side}
                self.parts[f"{split}.{language}"] = [
                    Part(part.archive.format(**names), part.member.format(**names), part.layout) for part in parts
                ]
        self.names = list(dict.fromkeys(part.archive for parts in self.parts.values() for part in parts))

    def identity(self) -> Identity:
        return {
            name: sha256(path) if path else self.corpus.archives[name].sha256 for name, path in self._present().items()
        }

    def _present(self) -> Dict[str, Optional[Path]]:
        """archive -> where it is, None if it has still to be downloaded."""
        if self.archive is not None:
            return {self.names[0]: a_file(self.archive, [*self.names, *self.corpus.nested])}
        if self.archive_dir is not None:
            return {name: self.archive_dir.require(name, *self.corpus.nested) for name in self.names}
        paths = {name: self.download_dir / name for name in self.names}
        return {name: path if path.is_file() else None for name, path in paths.items()}

    def write(self, directory: Path) -> None:
        unpacked = directory / "unpacked"
        unpacked.mkdir()
        if self.archive_dir is None and self.archive is None:
            paths = {name: self._download(name) for name in self.names}
        else:
            paths = {name: path for name, path in self._present().items() if path}
        for name, path in paths.items():
            self._unpack(name, path, unpacked)
        counts: Dict[Any, Dict[str, int]] = {}
        for name, parts in self.parts.items():
            with open(directory / name, "wb") as text:
                for number, part in enumerate(parts):
                    member, count = unpacked / flat(part.member), 0
                    with open(member, "rb") as lines:
                        for line in LAYOUTS[part.layout](lines):
                            text.write(line + b"\n")
                            count += 1
                    print(f"  {name}: {count:,} lines of {part.member}", flush=True)
                    member.unlink()
                    counts.setdefault((name.partition(".")[0], number), {})[part.member] = count
        unpacked.rmdir()
        for partners in counts.values():
            check_equal(partners)

    def _download(self, name: str) -> Path:
        published = self.corpus.archives[name]
        return download(
            name,
            published.urls,
            self.download_dir,
            size=published.size,
            digest=published.checksum,
            is_verified=self.allow_unverified,
        )

    def _unpack(self, name: str, path: Path, directory: Path) -> None:
        """Verifies and unpacks an archive; a damaged download is removed, so that the next run fetches it again."""
        published = self.corpus.archives[name].checksum
        found, is_download = differing(path, published), path.parent == self.download_dir
        wanted = {part.member: flat(part.member) for parts in self.parts.values() for part in parts if part.archive == name}
        try:
            if found:
                print(f"  {path} is NOT the published {name}: its checksum is {found}, not {published}", flush=True)
            print(f"  unpacking {path}", flush=True)
            unpack(path, wanted, directory, next(iter(self.corpus.nested.values()), None))
        except UserError:
            if is_download:
                path.unlink()
            raise


def flat(member: str) -> str:
    """A file name for a member of an archive."""
    return member.replace("/", "_")


class OwnText:
    """The user's own text: SPLIT.LANGUAGE in one directory, or the files of a published corpus, unpacked."""

    def __init__(self, directory: Path, languages: Sequence[str], corpus: Optional[LanguageModelCorpus]) -> None:
        self.directory = directory
        self.names = {f"{split}.{language}": f"{split}.{language}" for split in SPLITS for language in languages}
        if corpus is not None and all((directory / file).is_file() for file in corpus.files):
            self.names = {file: text.name for file, text in corpus.files.items()}

    def identity(self) -> Identity:
        if not self.directory.is_dir():
            raise UserError(f"--text-dir {str(self.directory)!r} is not a directory")
        missing = [name for name in self.names if not (self.directory / name).is_file()]
        if missing:
            raise UserError(
                f"--text-dir {str(self.directory)!r} lacks {', '.join(missing)}; it must hold {', '.join(self.names)}"
            )
        check_parallel(self.directory, self.names)
        return {name: sha256(self.directory / name) for name in self.names}

    def write(self, directory: Path) -> None:
        for file, name in self.names.items():
            shutil.copyfile(self.directory / file, directory / name)


def source(
    benchmark: str,
    settings: Mapping[str, Any],
    *,
    text_dir: Optional[str],
    archive_dir: Optional[str],
    archive: Optional[str],
    download_dir: Path,
    allow_unverified: bool = False,
) -> Source:
    """What a benchmark's text is taken from, given the options of the command `prepare`."""
    corpus = CORPORA.get(benchmark)
    if archive is not None and text_dir is not None:
        raise UserError("--archive and --text-dir exclude each other; give the text in one of them")
    if archive is not None and not in_one_archive(corpus):
        valid = ", ".join(name for name, each in CORPORA.items() if in_one_archive(each))
        raise UserError(
            f"--archive {archive!r}: {benchmark} does not come in one archive; valid with: {valid}; --archive-dir DIR takes "
            f"several"
        )
    one = None if archive is None else Path(archive)
    if isinstance(corpus, LanguageModelCorpus) and one is not None:
        return OneArchive(corpus, one)
    if text_dir is not None:
        return OwnText(Path(text_dir), settings["languages"], corpus if isinstance(corpus, LanguageModelCorpus) else None)
    if corpus is None and benchmark == "demo":
        return Generated()
    if corpus is None:
        raise UserError(f"benchmark {benchmark!r} has no corpus of its own; give your text with --text-dir DIR")
    folder = None if archive_dir is None or one else ArchiveDir(Path(archive_dir), benchmark)
    if isinstance(corpus, ArchivedCorpus):
        return Archives(corpus, settings, folder, one, download_dir, allow_unverified=allow_unverified)
    kind = FilesOrArchive if isinstance(corpus, LanguageModelCorpus) else Files
    return kind(corpus, folder, download_dir, allow_unverified=allow_unverified)
