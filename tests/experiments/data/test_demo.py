"""The corpus of the benchmark demo: its splits, and the German and English of its grammar."""

import hashlib
import os
import re
import subprocess
import sys

import pytest

from fairseq_powernorm.experiments.data import demo

SHA256 = "c7236a3143d5c4f694b4a15558bd71de38287ec3c5766e21782e4ca498cd3fd0"
FILES = [f"{split}.{language}" for split in ("train", "valid", "test") for language in ("de", "en")]


@pytest.fixture(scope="module")
def corpus():
    return demo.generate()


def small_grammar(words):
    """A grammar with only these words (German) of each kind of which there are any among them."""
    grammar = demo.Grammar(seed=1)
    for kind, entries in grammar.lexicon.items():
        kept = [entry for entry in entries if entry.get("german", entry.get("infinitive")) in words.split()]
        grammar.lexicon[kind] = kept or entries
    return grammar


# ---- the splits ------------------------------------------------------------------------------------------------------


def test_files_are_pinned(tmp_path):
    """The corpus is one sequence of bytes, whatever the hash seed and the locale are."""
    code = "import pathlib, runpy, sys; runpy.run_path(sys.argv[1])['write'](pathlib.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, demo.__file__, tmp_path], check=True,
                   env={**os.environ, "PYTHONHASHSEED": "4711", "LC_ALL": "C"})
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)
    assert hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in FILES)).hexdigest() == SHA256


def test_files_hold_the_pairs_line_by_line(corpus, tmp_path):
    """Line n of the two files of a split is pair n of the split."""
    demo.write(tmp_path)
    for split, pairs in corpus.items():
        sides = [(tmp_path / f"{split}.{language}").read_text(encoding="utf-8").split("\n") for language in ("de", "en")]
        assert [side.pop() for side in sides] == ["", ""] and list(zip(*sides)) == pairs


def test_splits_are_disjoint_and_sized(corpus):
    """Sizes are as stated; a German sentence occurs once; no sentence of a split is in another, on either side."""
    assert {split: len(pairs) for split, pairs in corpus.items()} == demo.SIZES
    assert len({german for pairs in corpus.values() for german, _ in pairs}) == sum(demo.SIZES.values())
    for side in (0, 1):
        each = [{pair[side] for pair in pairs} for pairs in corpus.values()]
        assert len(set.union(*each)) == sum(map(len, each))


LEXICON = demo.read_lexicon()
ADJECTIVES = {word["german"] + ending: word["german"] for word in LEXICON["adjective"]
              for ending in ("e", "en", "er", "es", "em")}
NOUNS = {modifier + (form.lower() if modifier else form): word["german"] for word in LEXICON["noun"]
         for form in (word["german"], *([word["plural"], f"{word['plural']}n"] if word["plural"] else []))
         for modifier in ("", *(each["german"] for each in LEXICON["modifier"]))}


def described(german):
    """The pairs of an adjective and a noun in a sentence, read off its text; of a compound, its last noun."""
    tokens = re.findall(r"\w+", german)
    return [(ADJECTIVES[first], NOUNS[second]) for first, second in zip(tokens, tokens[1:]) if first in ADJECTIVES]


def test_what_is_held_out(corpus):
    """Each sentence of valid and test has a held-out pair of adjective and noun, none of train has one; every word of
    valid and test, on both sides, is in train."""
    for split, pairs in corpus.items():
        for german, _ in pairs:
            assert any(map(demo.is_held_out, described(german))) == (split != "train"), german
    known, *others = [demo.words(*(text for pair in pairs for text in pair)) for pairs in corpus.values()]
    assert all(words <= known for words in others)


# ---- the grammar -----------------------------------------------------------------------------------------------------


def test_translation_is_a_function():
    """Equal German sentences have equal English ones; no German word of the lexicon has two translations."""
    grammar = small_grammar(
        "Frau Lehrer Junge Buch Käse Schule lesen essen fragen helfen geben gehen ein|schlafen alt gut Anna")
    translations, repeated = {}, 0
    for _ in range(30000):
        german, english = grammar.sentence()
        repeated += german in translations
        assert translations.setdefault(german, english) == english, german
    assert repeated > 500  # else nothing was compared
    for kind, words in LEXICON.items():
        forms = [word["german"] for word in words if "german" in word and kind != "pronoun"]
        assert len(set(forms)) == len(forms), kind


@pytest.mark.parametrize("noun, singular, plural", [
    ("Mann", "der alte Mann|den alten Mann|dem alten Mann; ein alter Mann|einen alten Mann|einem alten Mann; "
     "Annas alter Mann|Annas alten Mann|Annas altem Mann", "die alten Männer|die alten Männer|den alten Männern; "
     "zwei alte Männer|zwei alte Männer|zwei alten Männern"),
    ("Junge", "der alte Junge|den alten Jungen|dem alten Jungen; kein alter Junge|keinen alten Jungen|keinem alten Jungen",
     "alle alten Jungen|alle alten Jungen|allen alten Jungen"),
    ("Frau", "die alte Frau|die alte Frau|der alten Frau; jede alte Frau|jede alte Frau|jeder alten Frau; "
     "Annas alte Frau|Annas alte Frau|Annas alter Frau", "ihre alten Frauen|ihre alten Frauen|ihren alten Frauen"),
    ("Kind", "das alte Kind|das alte Kind|dem alten Kind; unser altes Kind|unser altes Kind|unserem alten Kind; "
     "Annas altes Kind|Annas altes Kind|Annas altem Kind", "diese alten Kinder|diese alten Kinder|diesen alten Kindern"),
])
def test_noun_phrases_agree(noun, singular, plural):
    """Determiner, adjective and noun agree in gender, case and number; written by hand: nominative|accusative|dative."""
    grammar = small_grammar(f"{noun} alt Anna zwei")
    drawn = {(phrase.person == "p", "|".join(phrase.german.values()))
             for phrase in (grammar.noun_phrase("person") for _ in range(2000))}
    for is_plural, forms in ((False, singular), (True, plural)):
        assert {(is_plural, each) for each in forms.split("; ")} <= drawn


@pytest.mark.slow
@pytest.mark.parametrize("named, german, english", [
    ("ein|schlafen gestern", "Gestern bin ich eingeschlafen.", "I fell asleep yesterday."),
    ("ein|schlafen", "Sie schlafen nicht ein.", "They don't fall asleep."),
    ("helfen Mann d bald", "Bald hilft sie dem alten Mann nicht.", "She won't help the old man soon."),
    ("fragen Mann Frau d", "Den Mann fragt die Frau.", "The woman asks the man."),
    ("geben Frau Buch d ein", "Er gibt der Frau ein altes Buch.", "He gives the woman an old book."),
    ("schlafen Schule d", "Wir mussten in der Schule schlafen.", "We had to sleep in the school."),
    ("gehen Schule d", "Anna ist in die Schule gegangen.", "Anna went to the school."),
    ("zurück|kommen Frau d", "Kommt die alte Frau zurück?", "Does the old woman come back?"),
    ("lesen Buch d er wann", "Wann konnte er das Buch nicht lesen?", "When couldn't he read the book?"),
    ("lachen weil er", "Er lacht, weil er nicht lacht.", "He laughs because he doesn't laugh."),
    ("ein|schlafen weil wir", "Weil wir einschlafen, schlafen wir ein.", "Because we fall asleep, we fall asleep."),
    ("lachen weinen Frau d", "Gestern hat die Frau, die nicht weint, gelacht.",
     "The woman that doesn't cry laughed yesterday."),
    ("lesen Buch drei zwanzig", "Sie liest dreiundzwanzig Bücher.", "She reads twenty-three books."),
    ("lesen Buch ihr Lieblings", "Ich lese ihr altes Lieblingsbuch.", "I read her old favorite book."),
])
def test_construction(named, german, english):
    """The grammar, with only these words of a kind, draws this German sentence with this translation, made by hand."""
    grammar = small_grammar(f"alt Anna heute gestern bald Schule Mann {named}")
    assert any(grammar.sentence() == (german, english) for _ in range(200_000))
