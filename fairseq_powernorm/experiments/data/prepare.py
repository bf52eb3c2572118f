"""Makes data/BENCH/ from a benchmark's text, whole or not at all; see scripts/prepare.sh."""

import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from ..directories import locked, put_back, resumable_directory, same
from ..errors import UserError
from ..files import read_json, sha256, write_json
from ..paths import data_root, for_fairseq
from ..settings import is_lm, load
from ..tools import DATA_TOOLS, versions
from . import moses, recipe
from .sources import source as source_of
from .stages import LanguageModel, Preparation, Translation
from .workers import Workers

#: raised when the same settings make other data
SCHEMA = 2
STAMP = "prepared.json"
GOES_ON = "stages that are whole are kept, and the next run goes on after them"


def prepare(
    benchmark: str,
    *,
    bpe: Optional[str] = None,
    bpe_size: Optional[int] = None,
    news_commentary: Optional[str] = None,
    cleaning: Optional[str] = None,
    archive_dir: Optional[str] = None,
    archive: Optional[str] = None,
    text_dir: Optional[str] = None,
    allow_unverified: bool = False,
    force: bool = False,
) -> None:
    """Prepares a benchmark's data, unless they are there; the arguments are the options of scripts/prepare.sh.

    Raises:
        UserError: the options do not fit, the text is missing or damaged, data made otherwise are there, or the disk is full
    """
    config = load(benchmark)
    settings = recipe.of_benchmark(
        benchmark, config, bpe=bpe, bpe_size=bpe_size, news_commentary=news_commentary, cleaning=cleaning
    )
    perl = moses.perl(settings) if settings else None
    if perl:
        settings["moses"] = perl.digests()
    root = for_fairseq("data directory (PN_DATA_ROOT)", data_root())
    target = root / benchmark
    source = source_of(
        benchmark,
        settings or {"languages": ["txt"]},
        text_dir=text_dir,
        archive_dir=archive_dir,
        archive=archive,
        download_dir=root / "downloads" / benchmark,
        allow_unverified=allow_unverified,
    )
    try:
        request = {"schema": SCHEMA, "benchmark": benchmark, "settings": settings, "sources": source.identity()}
        with locked(target) as lock:
            put_back(target)
            if target.exists() and not force:
                refuse_other(target, request)
                print(f"{target} is prepared already; nothing to do (--force prepares it again)")
                return
            request["versions"] = versions(DATA_TOOLS)
            with Workers() as workers, resumable_directory(target, request) as directory:
                if is_lm(config):
                    work: Preparation = LanguageModel(directory, source, benchmark, lock)
                else:
                    work = Translation(
                        directory, source, benchmark, lock, settings=settings, perl=perl, workers=workers
                    )
                work.run()
                for path in directory.iterdir():
                    if path.is_dir() and path.name not in work.results:
                        shutil.rmtree(path)
                facts, sizes = work.facts()
                stamp = {**request, "sources": source.identity(), **facts, "versions": request["versions"]}
                write_json(directory / STAMP, {**stamp, "outputs": outputs(directory)})
    except OSError as error:
        raise UserError(f"{error.filename or 'cannot write'}: {error.strerror or error}; {GOES_ON}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(GOES_ON) from None
    unit = " tokens" if is_lm(config) else ""
    print(f"prepared {target}: " + ", ".join(f"{split} {count:,}" for split, count in sizes.items()) + unit)


def outputs(directory: Path) -> Dict[str, str]:
    """file -> SHA-256 of what was made."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != STAMP)
    return {str(path.relative_to(directory)): sha256(path) for path in paths}


def refuse_other(target: Path, request: Mapping[str, Any]) -> None:
    """Raises UserError if what lies in target was not made by the same request."""
    if not (target / STAMP).is_file():
        raise UserError(f"{target} exists and was not made by scripts/prepare.sh; move it away, or replace it with --force")
    stamp = read_json(target / STAMP)
    there, wanted = stamp.get("settings", {}), request["settings"]
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    details = [
        "tokenized by other Moses scripts" if key == "moses" else f"{key} is {there.get(key)}, asked for {wanted.get(key)}"
        for key in differing
    ]
    if not same(stamp.get("sources"), request["sources"]):
        details.append("other source text")
    if stamp.get("schema") != request["schema"]:
        details.append("by an earlier version of this program")
    if details:
        raise UserError(f"{target} was prepared otherwise ({'; '.join(details)}); --force replaces it")
