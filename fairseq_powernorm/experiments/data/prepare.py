"""Makes data/NAME/ from a benchmark's text or the user's own, whole or not at all; see scripts/prepare.sh."""

import shutil
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from ..directories import locked, put_back, resumable_directory, same
from ..errors import UserError
from ..files import read_json, sha256, write_json
from ..own import LM, TRANSLATION, check_name, names
from ..paths import data_root, for_fairseq
from ..recipes import benchmarks, is_lm, read_stamp
from ..settings import load
from ..tools import DATA_TOOLS, versions
from . import moses, recipe
from .own_text import UserText
from .sources import Identity, Source, source as source_of
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
    source: Optional[str] = None,
    target: Optional[str] = None,
    lm: bool = False,
    tokenizer: Optional[str] = None,
    uncased: bool = False,
    normalize_punctuation: bool = False,
    clean: bool = False,
    separate_dictionaries: bool = False,
) -> None:
    """Prepares the data of a benchmark, or the user's own, unless they are there; the arguments are the options of
    scripts/prepare.sh, those from `source` on for text of the user's own.

    Raises:
        UserError: the options do not fit, the text is missing or damaged, data made otherwise are there, or the disk is full
    """
    published = {"news_commentary": news_commentary, "cleaning": cleaning, "archive": archive, "archive_dir": archive_dir,
                 "allow_unverified": allow_unverified}
    for_own: Dict[str, Any] = {
        "source": source, "target": target, "lm": lm, "tokenizer": tokenizer, "uncased": uncased,
        "normalize_punctuation": normalize_punctuation, "clean": clean, "separate_dictionaries": separate_dictionaries,
    }
    root = for_fairseq("data directory (PN_DATA_ROOT)", data_root())
    place = root / benchmark
    if benchmark in benchmarks():
        refuse_given(for_own, f"is for text of your own; {benchmark} is a benchmark, whose text is what it is")
        config = load(benchmark)
        task, origin = LM if is_lm(config) else TRANSLATION, {}  # data of a benchmark have always been stamped so
        settings = recipe.of_benchmark(
            benchmark, config, bpe=bpe, bpe_size=bpe_size, news_commentary=news_commentary, cleaning=cleaning
        )
        perl = moses.perl(settings) if settings else None
        text: Source = source_of(
            benchmark,
            settings or {"languages": ["txt"]},
            text_dir=text_dir,
            archive_dir=archive_dir,
            archive=archive,
            download_dir=root / "downloads" / benchmark,
            allow_unverified=allow_unverified,
        )
    else:
        check_name("name", benchmark)
        is_prepared = benchmark in names()
        if is_prepared and not any((text_dir, bpe, bpe_size, force, *published.values(), *for_own.values())):
            print(f"{place} is prepared already; nothing to do")
            return
        if not (is_prepared or text_dir or any(for_own.values())):
            raise UserError(f"{benchmark!r} is unknown; valid: {', '.join(benchmarks())}; or a name for text of your own, "
                            f"with --text-dir DIR and --source LANG --target LANG, or --lm")
        refuse_given(published, f"is for benchmarks ({', '.join(benchmarks())}); {benchmark} is text of your own")
        task, settings = recipe.of_own(bpe=bpe, bpe_size=bpe_size, **for_own)
        if text_dir is None:
            raise UserError(f"--text-dir is missing: {benchmark} is no benchmark ({', '.join(benchmarks())}), and text of "
                            f"your own lies in a directory, --text-dir DIR")
        origin = {"task": task}
        perl = moses.perl(settings) if settings.get("tokenizer") == "moses" else None
        text = UserText(Path(text_dir), settings.get("languages", ["txt"]), clean=clean,
                        plain=settings.get("tokenizer", "none") == "none", bpe=settings.get("bpe"))
    if perl:
        settings["moses"] = perl.digests()
    try:
        request = {"schema": SCHEMA, "benchmark": benchmark, **origin, "settings": settings, "sources": text.identity()}
        # without the lock, which needs a place that can be written: data may be shared
        if (place / STAMP).is_file() and is_done(place, request, force=force):
            return
        with locked(place) as lock:
            put_back(place)
            if is_done(place, request, force=force):
                return
            request["versions"] = versions(DATA_TOOLS)
            with Workers() as workers, resumable_directory(place, request) as directory:
                text = Noted(text, directory / STAMP)
                if task == LM:
                    work: Preparation = LanguageModel(directory, text, benchmark, lock)
                else:
                    work = Translation(
                        directory, text, benchmark, lock, settings=settings, perl=perl, workers=workers
                    )
                work.run()
                for path in directory.iterdir():
                    if path.is_dir() and path.name not in work.results:
                        shutil.rmtree(path)
                facts, sizes = work.facts()
                stamp = {**read_json(directory / STAMP), **facts, "versions": request["versions"]}
                write_json(directory / STAMP, {**stamp, "outputs": outputs(directory)})
    except OSError as error:
        raise UserError(f"{error.filename or 'cannot write'}: {error.strerror or error}; {GOES_ON}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(GOES_ON) from None
    unit = " tokens" if task == LM else " sentences"
    print(f"prepared {place}: " + ", ".join(f"{split} {count:,}" for split, count in sizes.items()) + unit)


class Noted:
    """A source that notes in prepared.json what the text is that it has written: of a download, that is known only then."""

    def __init__(self, source: Source, stamp: Path) -> None:
        self.source, self.stamp = source, stamp

    def identity(self) -> Identity:
        return self.source.identity()

    def write(self, directory: Path) -> None:
        """As the source does it. Raises UserError if the text is no longer what it was when the preparation began."""
        self.source.write(directory)
        request, found = read_json(self.stamp), self.source.identity()
        if not same(found, request["sources"]):
            raise UserError(f"{', '.join(found)}: changed while it was being read; run again")
        write_json(self.stamp, {**request, "sources": found})


def refuse_given(options: Mapping[str, Any], why: str) -> None:
    """Refuses options of scripts/prepare.sh that are given."""
    for name, value in options.items():
        if value:
            raise UserError("--" + name.replace("_", "-") + ("" if value is True else f" {value!r}") + f" {why}")


def outputs(directory: Path) -> Dict[str, str]:
    """file -> SHA-256 of what was made."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != STAMP)
    return {str(path.relative_to(directory)): sha256(path) for path in paths}


def is_done(place: Path, request: Mapping[str, Any], *, force: bool) -> bool:
    """Is what is asked for there already? Says so; refuses what was made otherwise, unless it is to be replaced."""
    if force or not place.exists():
        return False
    refuse_other(place, request)
    print(f"{place} is prepared already; nothing to do (--force prepares it again)")
    return True


def refuse_other(place: Path, request: Mapping[str, Any]) -> None:
    """Raises UserError if what lies in a place was not made by the same request."""
    if not (place / STAMP).is_file():
        raise UserError(f"{place} exists and was not made by scripts/prepare.sh; move it away, or replace it with --force")
    stamp = read_stamp(place / STAMP)
    there, wanted = stamp.get("settings", {}), request["settings"]
    differing = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    details = [
        "tokenized by other Moses scripts" if key == "moses" else f"{key} is {there.get(key)}, asked for {wanted.get(key)}"
        for key in differing
    ]
    if stamp.get("task") != request.get("task"):
        details = [f"for {stamp.get('task')}, asked for {request.get('task')}"]
    if not same(stamp.get("sources"), request["sources"]):
        details.append("other source text")
    if stamp.get("schema") != request["schema"]:
        details.append("by an earlier version of this program")
    if details:
        raise UserError(f"{place} was prepared otherwise ({'; '.join(details)}); --force replaces it")
