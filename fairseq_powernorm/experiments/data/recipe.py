"""How the text of a benchmark is prepared: the settings of configs/data/BENCH.yaml, and the options that replace them."""

from typing import Any, Dict, Optional, Tuple, Type

from omegaconf import DictConfig

from ..errors import UserError, choose
from ..own import LM, TRANSLATION, is_language
from ..recipes import is_lm
from ..settings import BPE_TYPES, data_settings
from .corpora import NEWS_COMMENTARY

Settings = Dict[str, Any]

#: setting -> type, of those that each file has
REQUIRED = {"bpe": str, "bpe_size": int, "lowercase": bool, "normalize_punctuation": bool}
#: and of those that a file may have
OPTIONAL = {
    "lowercase_last": bool,  # lower-case after tokenization, not before it
    "normalize_train": bool,  # training and validation text: normalize punctuation, replace what is not printable by blanks
    "map_apostrophes": bool,  # test text: U+2019 becomes '
    "split_dashes": bool,  # aggressive dash splitting: a-b becomes a @-@ b
    "clean_ratio": float,  # training pairs are dropped if one side has more than this many tokens for each of the other
    "clean_max": int,  # and if a side has more tokens than this
    "clean_pieces": bool,  # tokens are counted after BPE, not before it
    "cleaning": str,  # these three by name: a key of CLEANING
    "valid_every": int,  # of the training pairs that are left, every such one becomes validation text
    "news_commentary": str,
}
#: and of those that only scripts/evaluate.sh reads: the prepared data do not depend on them
SCORING = {
    "split_compounds": bool,  # tokenized BLEU counts a ##AT##-##AT## b for a-b
}
#: Which training pairs of WMT14 stay. The authors call Moses' clean-corpus-n for 1 to 80 words without a ratio, for which
#: its own is 9; fairseq's prepare-wmt14en2de.sh counts pieces.
CLEANING: Dict[str, Settings] = {
    "authors": {"clean_max": 80, "clean_ratio": 9.0, "clean_pieces": False},
    "fairseq": {"clean_max": 250, "clean_ratio": 1.5, "clean_pieces": True},
}


def of_benchmark(
    benchmark: str,
    config: DictConfig,
    *,
    bpe: Optional[str] = None,
    bpe_size: Optional[int] = None,
    news_commentary: Optional[str] = None,
    cleaning: Optional[str] = None,
) -> Settings:
    """How the text is prepared, as it stands in prepared.json; empty for a language model, whose text is left as it is.

    Args:
        config: configs/BENCH.yaml
        bpe, bpe_size, news_commentary, cleaning: options of scripts/prepare.sh, which replace the settings of these names

    Raises:
        UserError: the file or an option holds what cannot be, or an option does not fit the benchmark
    """
    options = {"bpe": bpe, "bpe_size": bpe_size, "news_commentary": news_commentary, "cleaning": cleaning}
    given = {name: value for name, value in options.items() if value is not None}
    own = {} if is_lm(config) else checked(benchmark, data_settings(benchmark))
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if name in ("news_commentary", "cleaning") and name not in own:
            raise UserError(f"{option} {value!r}: {benchmark} has no such part; valid with: wmt14")
        if is_lm(config):
            raise UserError(f"{option} {value!r}: the text of {benchmark} is used word by word, as it is")
    if is_lm(config):
        return {}
    settings: Settings = {
        "languages": [config.task.source_lang, config.task.target_lang],
        **{name: value for name, value in {**own, **given}.items() if name not in SCORING},
    }
    choose("--bpe", settings["bpe"], BPE_TYPES)
    if "news_commentary" in settings:
        choose("--news-commentary", settings["news_commentary"], NEWS_COMMENTARY)
    if "cleaning" in settings:
        settings.update(CLEANING[choose("--cleaning", settings["cleaning"], CLEANING)])
    return settings


#: settings of text of one's own for translation -> their defaults, beside "languages"; the options of scripts/prepare.sh
OWN: Settings = {
    "bpe": "subword_nmt",
    "bpe_size": 10000,
    "lowercase": False,
    "normalize_punctuation": False,
    "tokenizer": "moses",
    "joined_dictionary": True,
}
TOKENIZERS = ("moses", "none")
#: training pairs that --clean leaves: the limits that are usual for translation
OWN_CLEANING: Settings = {"clean_max": 250, "clean_ratio": 9.0}


def of_own(
    *,
    source: Optional[str],
    target: Optional[str],
    lm: bool,
    clean: bool = False,
    uncased: bool = False,
    separate_dictionaries: bool = False,
    **options: Any,
) -> Tuple[str, Settings]:
    """(what text of the user's own is for, how it is prepared); the arguments are options of scripts/prepare.sh.

    Raises:
        UserError: they do not say what the text is, or not what can be
    """
    given = {name: value for name, value in options.items() if value not in (None, False)}
    if lm:
        others = {"source": source, "target": target, "clean": clean, "uncased": uncased,
                  "separate_dictionaries": separate_dictionaries}
        for name, value in {**others, **given}.items():
            if value:
                option = "--" + name.replace("_", "-") + ("" if value is True else f" {value!r}")
                raise UserError(f"{option}: the text of a language model (--lm) is used word by word, as it is")
        return LM, {}
    for option, language in (("--source", source), ("--target", target)):
        if language is None:
            raise UserError(f"{option} is missing: text of your own needs --source LANG and --target LANG, for translation, "
                            f"or --lm, for a language model")
        if not is_language(language) or language == "txt":
            raise UserError(f"{option} {language!r} is no language; valid: a code such as de or zh-CN, of letters, digits, "
                            f"'-' and '_', 16 at most, a letter first")
    if source == target:
        raise UserError(f"--source and --target are both {source!r}; give two languages")
    settings: Settings = {"languages": [source, target], **OWN, **given}
    settings.update(lowercase=uncased, joined_dictionary=not separate_dictionaries)
    return TRANSLATION, {**settings, **(OWN_CLEANING if clean else {})}


def checked(benchmark: str, settings: Settings) -> Settings:
    """The settings of configs/data/BENCH.yaml with numbers of the right type; refuses a name or a value that cannot be."""
    where = f"configs/data/{benchmark}.yaml:"
    valid: Dict[str, Type[Any]] = {**REQUIRED, **OPTIONAL, **SCORING}
    for name, value in settings.items():
        kind = valid[choose(where, name, valid)]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{where} {name}: {value!r} is {type(value).__name__}, not {kind.__name__}")
        if kind in (int, float) and not 1 <= value < float("inf"):
            raise UserError(f"{where} {name}: {value!r} is out of range; valid: 1 or more")
    for name in REQUIRED:
        if name not in settings:
            raise UserError(f"{where} {name} is missing")
    if "cleaning" in settings:
        for name in settings.keys() & CLEANING["authors"]:
            raise UserError(f"{where} {name}: cleaning {settings['cleaning']!r} sets it; give one of the two")
    return {name: valid[name](value) for name, value in settings.items()}
