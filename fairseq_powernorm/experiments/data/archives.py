"""Downloads that can be resumed, and archives that are unpacked with care."""

import gzip
import hashlib
import http.client
import os
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import PurePosixPath

from ..settings import UserError

BLOCK = 1 << 20
# What reading a damaged archive raises.
DAMAGE = (EOFError, RuntimeError, tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile,
          NotImplementedError)


class Unreachable(Exception):
    """An address that does not give the file."""


def download(file, urls, directory, size=None):
    """The path of a file in directory, downloaded from the first address that has it; a part that an earlier attempt
    left is gone on with. $DATA_MIRROR, an address of the user's, is tried first.

    Raises:
        UserError: no address gives the file, or what they give has not the known size
    """
    target = directory / file
    if target.is_file() and size in (None, target.stat().st_size):
        return target
    mirror = os.environ.get("DATA_MIRROR")
    addresses = [url + file for url in ([mirror.rstrip("/") + "/"] if mirror else []) + list(urls)]
    partial = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    errors = []
    for address in addresses:
        print(f"downloading {address}", flush=True)
        try:
            fetch(address, partial, size)
        except Unreachable as error:
            errors.append(f"cannot download {address}: {error}")
            continue
        partial.replace(target)
        return target
    raise UserError(f"{'; '.join(errors)}; without a network, fetch the files elsewhere and give their directory "
                    f"with --archive-dir DIR or DATA_ARCHIVES=DIR")


def fetch(address, partial, size):
    """Writes what lies at an address to a file, going on where the file ends."""
    start = partial.stat().st_size if partial.is_file() else 0
    if size is not None and start > size:
        partial.unlink()
        start = 0
    if size is not None and start == size:
        return
    try:
        request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        # 416, nothing is left to download, and the answer says of how many bytes: "bytes */123"
        if error.code == 416 and start and (error.headers.get("Content-Range") or f"/{start}").endswith(f"/{start}"):
            return
        if error.code == 416:
            partial.unlink()
        raise Unreachable(error) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(error) from None
    with answer:
        # 206: the server goes on where we stopped; else it begins anew.
        start = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = size if length is None else start + int(length)
        if size is not None and total != size:
            raise Unreachable(f"it has {total:,} bytes there, expected {size:,}")
        done, told = start, time.monotonic()
        with open(partial, "ab" if start else "wb") as stream:
            while True:
                try:
                    block = answer.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise Unreachable(f"{error or type(error).__name__} after {done:,} bytes") from None
                if not block:
                    break
                stream.write(block)
                done += len(block)
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    print(f"  {done / 1e6:,.0f}{f' of {total / 1e6:,.0f}' if total else ''} MB", flush=True)
        if total is not None and done != total:
            raise Unreachable(f"the connection ended after {done:,} of {total:,} bytes")


def copy_and_hash(source, target):
    """Copies an open stream to a file; gives its SHA-256. Raises one of DAMAGE, or OSError if it cannot be written."""
    digest = hashlib.sha256()
    with open(target, "wb") as stream:
        for block in iter(lambda: read(source), b""):
            digest.update(block)
            stream.write(block)
    return digest.hexdigest()


def read(stream):
    """The next block of a packed stream. An OSError there is damage; one in writing is none."""
    try:
        return stream.read(BLOCK)
    except OSError as error:
        raise EOFError(error) from None


def gunzip(archive, target):
    """Writes the text of a gzip file, or of a plain one; gives its SHA-256."""
    try:
        with (gzip.open if archive.suffix == ".gz" else open)(archive, "rb") as packed:
            return copy_and_hash(packed, target)
    except DAMAGE as error:
        raise UserError(f"cannot unpack {archive}: {reason(error)}") from None


def reason(error):
    """An exception in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")


def unpack(archive, wanted, directory, nested=None):
    """Writes members of a zip or tar archive, given member -> name, to directory / name; gives name -> SHA-256.

    Nothing else of the archive is written, and nothing at a place that the archive names. One with members outside of
    its own directory is refused. An archive that lacks all the members may have an archive in it that holds them, at a
    path that ends in `nested`.
    """
    digests, inner = {}, None
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
                digests[name] = copy_and_hash(stream(), directory / name)
            elif nested and f"/{path}".endswith(f"/{nested}") and stream is not None:
                inner = directory / path.name
                copy_and_hash(stream(), inner)
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


def members(archive):
    """(name, function that opens it or None if it is not a file) of each member of a zip or tar archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                is_file = not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
                yield info.filename, (lambda: packed.open(info)) if is_file else None
    else:
        try:
            packed = tarfile.open(archive)
        except OSError as error:
            raise EOFError(error) from None
        with packed:
            while True:
                try:
                    info = packed.next()
                except OSError as error:
                    raise EOFError(error) from None
                if info is None:
                    return
                yield info.name, (lambda: packed.extractfile(info)) if info.isfile() else None
