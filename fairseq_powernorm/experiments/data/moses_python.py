"""Moses' text tools in Python: byte for byte what the Perl scripts of mosesdecoder print, as they are since November 2019.

A character is a letter, a number, ... by the Unicode version of the package `regex`; the scripts take that of perl. One
word differs: DOTMULTI, which tokenizer.perl uses as a mark and turns into a full stop, stays as it is.
"""

from __future__ import annotations

import collections
import functools
import re

import regex

# ---- tokenizer.perl --------------------------------------------------------------------------------------------------

# Perl's \s, \p{IsAlpha}, \p{IsAlnum} and \p{IsLower}.
SPACE, ALPHA = r"\p{White_Space}", r"\p{Alphabetic}"
ALNUM, LOWER = rf"{ALPHA}\p{{Nd}}", r"\p{Lowercase}"
SPACES, BLANKS, FULL_STOPS = regex.compile(f"{SPACE}+"), regex.compile(" +"), regex.compile(r"\.{2,}")
HYPHEN = regex.compile(rf"(?<=[{ALNUM}])-(?=[{ALNUM}])")
HAS_ALPHA, STARTS_LOWER, STARTS_WITH_DIGIT = regex.compile(ALPHA), regex.compile(f"[{LOWER}]"), regex.compile("[0-9]")
ESCAPES = str.maketrans({"&": "&amp;", "|": "&#124;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;",
                         "[": "&#91;", "]": "&#93;"})
# What is a part of words, beside letters, digits and .'`,- , but in Finnish, Swedish and Tetun only before a small letter.
INSIDE = {"fi": ":", "sv": ":", "tdt": "'", "ca": "·"}
NOT_BEFORE_SMALL = {language: regex.compile(rf"{INSIDE[language]}(?!\p{{Ll}})") for language in ("fi", "sv", "tdt")}


def rules(*pairs: tuple[str, str]) -> list[tuple[regex.Pattern, str]]:
    """(pattern, replacement), compiled."""
    return [(regex.compile(pattern), replacement) for pattern, replacement in pairs]


# One after another; a match takes its neighbours with it, so that of two commas in a row the second may stay.
COMMAS = rules((r"(\P{N}),", r"\1 , "), (r",(\P{N})", r" , \1"), (r"(?<=\p{N}),$", " ,"))
LETTER, OTHER, OTHER_OR_NUMBER = f"({ALPHA})", r"(\P{Alphabetic})", rf"([^{ALPHA}\p{{N}}])"
APART = r"\1 ' \2"
ENGLISH = rules((f"{OTHER}'{OTHER}", APART), (f"{OTHER_OR_NUMBER}'{LETTER}", APART), (f"{LETTER}'{OTHER}", APART),
                (f"{LETTER}'{LETTER}", r"\1 '\2"), (r"(?<=\p{N})'s", " 's"))
SOMALI = rules((f"{OTHER}'{OTHER}", APART), (f"{OTHER}'{LETTER}", APART), (f"{LETTER}'{OTHER}", APART))
FRENCH = [*SOMALI, *rules((f"{LETTER}'{LETTER}", r"\1' \2"))]
APOSTROPHES = {"en": ENGLISH, **dict.fromkeys(("fr", "it", "ga", "ca"), FRENCH), **dict.fromkeys(("so", "tdt"), SOMALI)}
OTHER_APOSTROPHES = rules(("'", " ' "))


@functools.lru_cache(maxsize=None)
def single(language: str) -> regex.Pattern:
    """A character that is a token by itself."""
    return regex.compile(rf"([^{ALNUM}{SPACE}.'`,\-{INSIDE.get(language, '')}])")


@functools.lru_cache(maxsize=None)
def abbreviations(language: str) -> dict[str, bool]:
    """The words that keep their full stop: word -> only before a number? English ones for a language without a list.

    Moses' lists of Spanish, Italian, Dutch, Slovak and Swedish have a blank behind a few words, which spoils them there.
    """
    from sacremoses.corpus import NonbreakingPrefixes

    parts = (line.partition("#NUMERIC_ONLY#") for line in NonbreakingPrefixes().words(language))
    return {word.rstrip(): bool(numeric) for word, numeric, _ in parts}


def languages() -> list[str]:
    """The languages with a list of abbreviations."""
    from sacremoses.corpus import NonbreakingPrefixes

    return sorted(set(NonbreakingPrefixes().available_langs.values()))


def tokenize(line: str, language: str, *, split_dashes: bool = False) -> str:
    """The tokens of a line, with a blank between two.

    Args:
        split_dashes: a-b becomes a @-@ b (option -a of the script)
    """
    text: str = SPACES.sub(" ", line)
    if text in ("", " "):
        return line
    text = text.translate(dict.fromkeys(range(0x20)))
    text = single(language).sub(r" \1 ", BLANKS.sub(" ", text).strip(" "))
    if language in NOT_BEFORE_SMALL:
        text = NOT_BEFORE_SMALL[language].sub(r" \g<0> ", text)
    if split_dashes:
        text = HYPHEN.sub(" @-@ ", text)
    text = FULL_STOPS.sub(r" \g<0> ", text)
    for pattern, replacement in (*COMMAS, *APOSTROPHES.get(language, OTHER_APOSTROPHES)):
        text = pattern.sub(replacement, text)
    words = text.rstrip(" ").split(" ")
    text = " ".join(word if keeps_full_stop(word, following, language) else f"{word[:-1]} ."
                    for word, following in zip(words, [*words[1:], None]))
    text = BLANKS.sub(" ", text).strip(" ")
    if text.endswith(".'"):
        text = text[:-2] + " . ' "
    return text.translate(ESCAPES)


def keeps_full_stop(word: str, following: str | None, language: str) -> bool:
    """Does a word keep what may be a full stop at its end? The last word of a line, which None follows, never does."""
    before = word[:-1]
    if not word.endswith(".") or not before.strip("."):
        return True
    if following is None:
        return False
    only_before_number = abbreviations(language).get(before)
    return bool("." in before and HAS_ALPHA.search(before) or only_before_number is False
                or STARTS_LOWER.match(following) or only_before_number and STARTS_WITH_DIGIT.match(following))


# ---- detokenizer.perl ------------------------------------------------------------------------------------------------

CHARACTERS = {"&bar;": "|", "&bra;": "[", "&ket;": "]", **{entity: chr(code) for code, entity in ESCAPES.items()}}
ENTITY = regex.compile("|".join(map(regex.escape, CHARACTERS)))
CJK = r"[\u1100-\u11FF\u2E80-\uA4CF\uA840-\uA87F\uAC00-\uD7AF\uF900-\uFAFF\uFE30-\uFE4F\uFF65-\uFFDC\U00020000-\U0002FFFF]"
OPENING, CLOSING, QUOTES = map(regex.compile, (r"[\p{Sc}(\[{¿¡]+", r"[,.?!:;\\%}\])]+", "['\"„“`]+"))
STARTS_CJK, ENDS_CJK = regex.compile(CJK), regex.compile(f"{CJK}$")
CONTRACTION, ENDS_ALNUM, ELISION = map(regex.compile, (f"'{ALPHA}", f"[{ALNUM}]$", f"{ALPHA}'$"))


def detokenize(line: str, language: str) -> str:
    """The text of a tokenized line, its entities resolved.

    The script's rules for Czech and Finnish are left to sacremoses, which has most of them.
    """
    if not SPACES.sub("", line) or len(line) > 2 and line[0] + line[-1] == "<>":
        return line
    if language in ("cs", "fi"):
        from sacremoses import MosesDetokenizer

        return str(MosesDetokenizer(lang=language).detokenize(line.split()))
    text: str = ENTITY.sub(lambda entity: CHARACTERS[entity[0]], f" {line} ".replace(" @-@ ", "-"))
    words, parts = text.rstrip(" ").split(" "), []
    quotes: collections.Counter[str] = collections.Counter()
    joins_next = False
    for before, word, following in zip(["", *words], words, [*words[1:], ""]):
        joins, joins_next = joins_next, False  # does it join the word before it, and the one behind it?
        if STARTS_CJK.match(word):
            joins |= language != "ko" and bool(ENDS_CJK.search(before))
        elif OPENING.fullmatch(word):
            joins_next = True
        elif CLOSING.fullmatch(word):
            joins = not (language == "fr" and word in ("?", "!", ":", ";", "\\", "%"))
        elif language == "en" and CONTRACTION.match(word) and ENDS_ALNUM.search(before):
            joins = True
        elif language in ("fr", "it") and ELISION.search(word) and HAS_ALPHA.match(following):
            joins_next = True
        elif QUOTES.fullmatch(word):
            kind = word if word.strip("„“") else '"'
            closes = quotes[kind] % 2 == 1
            if closes or not (language == "en" and word == "'" and before.endswith("s")):
                quotes[kind] += 1
                joins, joins_next = joins or closes, not closes
            else:
                joins = True  # the Jones' house
        parts.append(word if joins else f" {word}")
    return str(BLANKS.sub(" ", "".join(parts))).strip(" ")


# ---- normalize-punctuation.perl --------------------------------------------------------------------------------------

# One after another. The script sees bytes: digits and letters are ASCII's.
PUNCTUATION = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\r", ""), (r"\(", " ("), (r"\)", ") "), (" +", " "), (r"\) ([.!:?;,])", r")\1"), (r"\( ", "("), (r" \)", ")"),
    ("([0-9]) %", r"\1%"), (" ([:;])", r"\1"),
    ("`", "'"), ("''", ' " '),
    ("[„“”]", '"'), ("–", "-"), ("—", " - "), (" +", " "), ("´", "'"),
    ("([A-Za-z])‘([A-Za-z])", r"\1'\2"), ("([A-Za-z])’([A-Za-z])", r"\1'\2"), ("[‘‚]", "'"), ("’", '"'),
    ("''", '"'), ("…", "..."),
    ("\u00a0«\u00a0", ' "'), ("«\u00a0?", '"'), ("\u00a0»\u00a0", '" '), ("\u00a0?»", '"'),
    ("\u00a0%", "%"), ("nº\u00a0", "nº "), ("\u00a0:", ":"), ("\u00a0ºC", " ºC"), ("\u00a0cm", " cm"),
    ("\u00a0([?!;])", r"\1"), (",\u00a0", ", "), (" +", " "),
)]
# An English quotation mark stands behind a comma or full stops, others stand before them.
ENGLISH_QUOTES = [(re.compile('"([,.]+)'), r'\1"')]
OTHER_QUOTES = [(re.compile(',"'), '",'), (re.compile(r'(\.+)"(\s*[^<]|$)', re.ASCII), r'"\1\2')]
NUMBER = re.compile("([0-9])\u00a0([0-9])")
DECIMAL_COMMA = ("de", "es", "cz", "cs", "fr")


def normalize_punctuation(line: str, language: str) -> str:
    """The line with ASCII's punctuation, in the places where the language wants it."""
    quotes = ENGLISH_QUOTES if language == "en" else () if language in ("cs", "cz") else OTHER_QUOTES
    for pattern, replacement in (*PUNCTUATION, *quotes):
        line = pattern.sub(replacement, line)
    return NUMBER.sub(r"\1,\2" if language in DECIMAL_COMMA else r"\1.\2", line)


# ---- lowercase.perl, remove-non-printing-char.perl -------------------------------------------------------------------


def lowercase(line: str) -> str:
    """The line in small letters; a sigma at the end of a word is no special case."""
    return line.replace("Σ", "σ").lower()


UNPRINTABLE = regex.compile(r"\p{C}")


def replace_unprintable(line: str) -> str:
    """The line with blanks for control, format, private and unassigned characters."""
    return str(UNPRINTABLE.sub(" ", line))
