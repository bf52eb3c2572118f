"""Downloads that can be resumed, and archives that are unpacked with care."""

import contextlib
import functools
import gzip
import hashlib
import http.client
import lzma
import os
import re
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Protocol, Sequence, Tuple

from ..errors import UserError
from ..progress import Progress

BLOCK = 1 << 20
# What reading a damaged archive raises.
DAMAGE = (EOFError, RuntimeError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
          gzip.BadGzipFile, NotImplementedError)
# Some servers refuse the name by which Python's library introduces itself.
USER_AGENT = "fairseq_powernorm (data preparation; like wget)"


class Readable(Protocol):
    """An open file, packed or not."""

    def read(self, size: int) -> bytes: ...


#: name, and what opens it (None if it is not a file)
Member = Tuple[str, Optional[Callable[[], Any]]]


class Unreachable(Exception):
    """An address that does not give the file."""


def download(
    file: str,
    urls: Sequence[str],
    directory: Path,
    *,
    size: Optional[int] = None,
    digest: Optional[str] = None,
    is_verified: bool = False,
) -> Path:
    """The path of a file in a directory, downloaded from the first address that has it.

    A part that an earlier attempt left is completed. $DATA_MIRROR, an address of the user's, is tried first.

    Args:
        urls: addresses of folders, which end in a slash
        size: in bytes, None if it is not known
        digest: the published checksum, ALGORITHM:HEXADECIMAL; an address that gives another file is passed over
        is_verified: without a digest, is the file trusted all the same (because its content is verified later, or the
            user says so)? If not, plain http, which anyone on the way can change, is refused

    Raises:
        UserError: no address gives the file, or what they give has another size or checksum
    """
    target = directory / file
    if target.is_file() and size in (None, target.stat().st_size) and differing(target, digest) is None:
        return target
    mirror = os.environ.get("DATA_MIRROR")
    addresses = [url + file for url in ([mirror.rstrip("/") + "/"] if mirror else []) + list(urls)]
    partial = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    errors = []
    for address in addresses:
        print(f"downloading {address}", flush=True)
        try:
            fetch(address, partial, size, secure=digest is None and not is_verified)
            found = differing(partial, digest)
            if found:
                partial.unlink()
                raise Unreachable(f"its checksum is {found}, expected {digest}")
        except Unreachable as error:
            errors.append(f"cannot download {address}: {error}")
            continue
        partial.replace(target)
        return target
    raise UserError(f"{'; '.join(errors)}; without a network, fetch the files elsewhere and give their directory "
                    f"with --archive-dir DIR or DATA_ARCHIVES=DIR")


def differing(path: Path, digest: Optional[str]) -> Optional[str]:
    """The checksum of a file where it is not the given one, ALGORITHM:HEXADECIMAL; None where it is, or none is given."""
    if digest is None:
        return None
    algorithm, _, _ = digest.partition(":")
    with open(path, "rb") as stream:
        found = f"{algorithm}:{digest_of(stream, algorithm)}"
    return None if found == digest else found


def digest_of(stream: Readable, algorithm: str) -> str:
    computed = hashlib.new(algorithm)
    for block in iter(lambda: stream.read(BLOCK), b""):
        computed.update(block)
    return computed.hexdigest()


def refuse_unprotected(address: str) -> None:
    scheme = address.partition(":")[0].lower()
    if scheme in ("http", "ftp"):
        raise Unreachable(f"no checksum of it is published, and plain {scheme} does not protect it on the way; "
                          "--allow-unverified takes it as it comes")


def fetch(address: str, partial: Path, size: Optional[int], *, secure: bool = False) -> None:
    """Writes what lies at an address to a file, from where the file ends.

    Args:
        size: of the whole in bytes, None if it is not known
        secure: refuse plain http

    Raises:
        Unreachable: the address does not give the file, or gives only a part of it
    """
    if secure:
        refuse_unprotected(address)
    start = partial.stat().st_size if partial.is_file() else 0
    if size is not None and start > size:
        partial.unlink()
        start = 0
    if size is not None and start == size:
        return
    try:
        request = urllib.request.Request(address, headers={
            "User-Agent": USER_AGENT, **({"Range": f"bytes={start}-"} if start else {})})
        answer = urllib.request.build_opener().open(request, timeout=60)  # by the proxies of now
    except urllib.error.HTTPError as error:
        # 416, nothing is left to download, and the answer says of how many bytes: "bytes */123"
        if error.code == 416 and start and (error.headers.get("Content-Range") or f"/{start}").endswith(f"/{start}"):
            return
        if error.code == 416:
            partial.unlink()
        raise Unreachable(str(error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(str(error)) from None
    with answer:
        if secure:
            refuse_unprotected(answer.url)  # it may have led elsewhere
        # 206: the server goes on where we stopped; else it begins anew.
        start = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and re.fullmatch("[0-9]{1,18}", length.strip()) else size
        if size is not None and total != size:
            raise Unreachable(f"it has {total:,} bytes there, expected {size:,}")
        done, name = start, target_of(partial)
        with open(partial, "ab" if start else "wb") as stream, Progress(name, total, "B", initial=start) as progress:
            while True:
                try:
                    block = answer.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise Unreachable(f"{error or type(error).__name__} after {done:,} bytes") from None
                if not block:
                    break
                stream.write(block)
                done += len(block)
                progress.reach(done)
        if total is not None and done != total:
            raise Unreachable(f"the connection ended after {done:,} of {total:,} bytes")


def target_of(partial: Path) -> str:
    """The name of the file that a part belongs to."""
    return partial.name[: -len(".part")] if partial.suffix == ".part" else partial.name


def copy_and_hash(source: Readable, target: Path) -> str:
    """Copies an open stream to a file; gives its SHA-256. Raises one of DAMAGE, or OSError if it cannot be written."""
    digest = hashlib.sha256()
    with open(target, "wb") as stream:
        for block in iter(lambda: read(source), b""):
            digest.update(block)
            stream.write(block)
    return digest.hexdigest()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """To be put around what reads a packed file: an OSError there means damage; one in writing does not."""
    try:
        yield
    except OSError as error:
        raise EOFError(error) from None


def opened(member: Callable[[], Readable]) -> Readable:
    """A member's stream, given the function that opens it."""
    with reading():
        return member()


def read(stream: Readable) -> bytes:
    """The next block of a packed stream."""
    with reading():
        return stream.read(BLOCK)


def gunzip(archive: Path, target: Path) -> str:
    """Writes the text of a gzip file, or of a plain one; gives its SHA-256."""
    try:
        with gzip.open(archive, "rb") if archive.suffix == ".gz" else open(archive, "rb") as packed:
            return copy_and_hash(packed, target)
    except DAMAGE as error:
        raise UserError(f"cannot unpack {archive}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


def unpack(archive: Path, wanted: Mapping[str, str], directory: Path, nested: Optional[str] = None) -> Dict[str, str]:
    """Writes members of a zip or tar archive, given member -> name, to directory / name; gives name -> SHA-256.

    Nothing else of the archive is written, and nothing at a place that the archive names. An archive that lacks all the
    members may have an archive in it that holds them, at a path that ends in `nested`.

    Raises:
        UserError: the archive is damaged, lacks a member, or has a member outside of its own directory
    """
    digests: Dict[str, str] = {}
    inner: Optional[Path] = None
    try:
        for member, stream in members(archive):
            path = PurePosixPath(member)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"{archive} has the member {member!r}, which leads out of its directory")
            if str(path) in wanted:
                name = wanted[str(path)]
                if stream is None:
                    raise UserError(f"{archive}: {member} is not a file")
                print(f"  unpacking {path}", flush=True)
                digests[name] = copy_and_hash(opened(stream), directory / name)
            elif nested and f"/{path}".endswith(f"/{nested}") and stream is not None:
                inner = directory / path.name
                copy_and_hash(opened(stream), inner)
    except DAMAGE as error:
        raise UserError(f"cannot unpack {archive}: {reason(error)}") from None
    if inner is not None and not digests:
        try:
            return unpack(inner, wanted, directory)
        except UserError as error:
            raise UserError(f"{archive}, in it {nested}: {error}") from None
        finally:
            inner.unlink()
    if inner is not None:
        inner.unlink()
    missing = [member for member, name in wanted.items() if name not in digests]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}; it must hold {', '.join(wanted)}")
    return digests


def members(archive: Path) -> Iterator[Member]:
    """(name, function that opens it or None if it is not a file) of each member of a zip or tar archive.

    The archive is read to its end, members that nobody opens included, so that each of its checksums is compared.
    """
    return zip_members(archive) if zipfile.is_zipfile(archive) else tar_members(archive)


def zip_members(archive: Path) -> Iterator[Member]:
    with reading():
        packed = zipfile.ZipFile(archive)
    with packed:
        for info in packed.infolist():
            is_file = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
            yield info.filename, functools.partial(packed.open, info) if is_file else None
        with reading():
            damaged = packed.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {damaged!r}")


def tar_members(archive: Path) -> Iterator[Member]:
    with reading():
        packed = tarfile.open(archive)
    with packed:
        while True:
            with reading():
                info = packed.next()
            if info is None:
                break
            if info.size < 0:  # Python 3.11 would go back, and never come to an end
                raise tarfile.ReadError(f"{info.name} has a size of {info.size}")
            yield info.name, functools.partial(packed.extractfile, info) if info.isfile() else None
        stream: Any = packed.fileobj
        for _ in iter(lambda: read(stream), b""):
            pass  # the checksum of the packed stream stands at its end, behind the last member
