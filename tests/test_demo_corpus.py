"""The corpus of the benchmark demo: its grammar, its splits and its command line."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_powernorm.experiments.data import demo_corpus as demo
from fairseq_powernorm.experiments.data.demo_corpus import (
    ADJECTIVE, COMPOUND, NOUN, VERB, Adverbial, Clause, noun_phrase, pronoun,
)

SCRIPT = Path(demo.__file__)
FILES = [f"{split}.{language}" for split in ("train", "valid", "test") for language in ("de", "en")]
SHA256 = "482129e64054b062fe8dcee17c87cf089c8cd8c4dfc76f67fbf114780e8f8a95"


@pytest.fixture(scope="module")
def corpus():
    return demo.draw_corpus()


def run(*args, **env):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, **env})


def digest(directory):
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in FILES)).hexdigest()


def phrase(lemma, determiner="def", adjective=None, number="s", **kwargs):
    noun = NOUN.get(lemma) or COMPOUND[lemma]
    return noun_phrase(noun, determiner, adjective and ADJECTIVE[adjective], number, **kwargs)


def clause(subject, verb, *objects, **kwargs):
    return Clause(subject, VERB[verb], objects=objects, **kwargs)


ANNA = demo.name("Anna", "3f")
TODAY, YESTERDAY = Adverbial("heute", "today"), Adverbial("gestern", "yesterday")


# ---- reproducibility and splits ------------------------------------------------------------------
def test_default_output_is_pinned(corpus, tmp_path):
    """The default corpus is one sequence of bytes, here and in a process with another PYTHONHASHSEED and locale."""
    texts = ("".join(getattr(s, side) + "\n" for s in corpus[split]) for split, side in
             (name.split(".") for name in FILES))
    assert hashlib.sha256("".join(texts).encode("utf-8")).hexdigest() == SHA256
    result = run(tmp_path / "out", PYTHONHASHSEED="4711", LC_ALL="C")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)
    assert digest(tmp_path / "out") == SHA256


def test_seed_changes_the_corpus():
    """Another seed draws other sentences; the same seed draws the same."""
    one, again, other = (demo.generate(20, 5, 5, seed) for seed in (1, 1, 2))
    assert one == again
    assert all(not set(one[split]) & set(other[split]) for split in one)


def test_test_set_and_prefix_do_not_depend_on_the_training_size():
    """test and valid are the same for every training size, and a smaller train begins a larger one."""
    small, large = demo.generate(40, 10, 10), demo.generate(90, 10, 10)
    assert small["test"] == large["test"] and small["valid"] == large["valid"]
    assert small["train"] == large["train"][:40]


def test_splits_are_disjoint_and_sized(corpus):
    """Sizes are as asked; no German sentence comes twice; no English test or valid sentence is elsewhere."""
    assert {split: len(drawn) for split, drawn in corpus.items()} == {"train": 6000, "valid": 300, "test": 300}
    german = [s.de for drawn in corpus.values() for s in drawn]
    assert len(set(german)) == len(german)
    english = {split: {s.en for s in drawn} for split, drawn in corpus.items()}
    assert not english["test"] & (english["train"] | english["valid"])
    assert not english["valid"] & english["train"]


def test_english_of_test_and_valid_is_kept_out_of_train(monkeypatch):
    """A German sentence whose English another split has already is passed over, although it is new itself."""
    held, common = (("number", 24),), (("number", 25),)
    drawn = iter([demo.Sentence("Du A.", "You A.", held), demo.Sentence("Ihr A.", "You A.", common),
                  demo.Sentence("Du B.", "You B.", common), demo.Sentence("Ihr B.", "You B.", common),
                  demo.Sentence("Du B.", "You B.", common), demo.Sentence("Ich C.", "I C.", common)])
    monkeypatch.setattr(demo, "draw_sentence", lambda dice: next(drawn))
    assert demo.generate(1, 1, 1) == {"train": [("Ich C.", "I C.")], "valid": [("Du B.", "You B.")],
                                      "test": [("Du A.", "You A.")]}


def test_files_hold_the_pairs_line_by_line(tmp_path):
    """The two files of a split have one line for each pair, in order, and hold what generate returns."""
    assert demo.main([str(tmp_path / "out"), "--train", "30", "--valid", "7", "--test", "5", "--seed", "3"]) == 0
    for split, pairs in demo.generate(30, 7, 5, 3).items():
        sides = [(tmp_path / "out" / f"{split}.{side}").read_bytes().decode("utf-8") for side in ("de", "en")]
        assert all(text.endswith("\n") and text.count("\n") == len(pairs) for text in sides)
        assert list(zip(*(text.split("\n")[:-1] for text in sides))) == pairs


def test_every_german_sentence_has_one_translation():
    """Drawn freely, before duplicates are dropped, equal German sentences always have equal English ones."""
    dice, seen, repeated = demo.Dice(99), {}, 0
    for i in range(8000):
        sentence = (demo.draw_sentence, demo.draw_imperative, demo.draw_swapped, demo.draw_wh_question)[i % 4](dice)
        repeated += sentence.de in seen
        assert seen.setdefault(sentence.de, sentence.en) == sentence.en, sentence.de
    assert repeated > 30  # else nothing was compared


def test_lexicon_maps_each_german_form_to_one_english_form():
    """No German noun or adjective entry, compounds included, is listed twice with different English."""
    for table, text in ((NOUN, demo.NOUNS), (ADJECTIVE, demo.ADJECTIVES)):
        assert len(table) == len(text.strip().splitlines())
    assert not set(NOUN) & set(COMPOUND)
    products = sum(len(modifiers.split()) * len(heads.split()) for modifiers, heads in demo.COMPOUNDS)
    assert len(COMPOUND) == products
    assert len(NOUN) >= 150 and len(ADJECTIVE) >= 50 and len(VERB) >= 60


# ---- what is held out ----------------------------------------------------------------------------
def combinations(german):
    """Compounds, number words and attributive adjective-noun pairs in a German sentence, read off its text."""
    tokens = [re.sub(r"[^\w]", "", token) for token in german.split()]
    found = set()
    if tokens[0].lower() in ADJECTIVE_FORMS:  # elsewhere a capital marks a noun: der Junge
        tokens[0] = tokens[0].lower()
    for before, token in zip([""] + tokens, tokens):
        if token in NOUN_FORMS:
            noun = NOUN_FORMS[token]
            found.update(noun.parts)
            if before in ADJECTIVE_FORMS:
                found.add(("adjective", ADJECTIVE_FORMS[before], noun.head))
        if NUMBERS.get(token.lower(), 0) > 12:  # smaller ones also tell the time
            found.add(("number", NUMBERS[token.lower()]))
    return found


NOUN_FORMS = {noun.form(number, case): noun for noun in [*NOUN.values(), *COMPOUND.values()]
              for number in ("s", "p") if number == "s" or noun.plural for case in demo.CASES}
ADJECTIVE_FORMS = {adjective.inflected(ending): adjective.lemma for adjective in ADJECTIVE.values()
                   for ending in ("e", "en", "er", "es", "em")}
NUMBERS = {demo.number_words(n)[0]: n for n in range(2, 1000)}


def test_nothing_held_out_is_in_train_or_valid(corpus):
    """Read off the text, no held-out compound, number word or adjective-noun pair is in train or valid."""
    kinds = set()
    for split in ("train", "valid"):
        for sentence in corpus[split]:
            found = combinations(sentence.de)
            assert found <= set(sentence.parts), sentence.de  # the book-keeping misses nothing in the text
            assert not [part for part in sentence.parts if demo.held_out(part)], sentence.de
            kinds |= {part[0] for part in found}
    assert kinds == {"compound", "number", "adjective"}


def test_every_test_sentence_holds_a_held_out_combination(corpus):
    """Each test sentence has at least one held-out combination, and each kind makes up a good share."""
    share = dict.fromkeys(("compound", "number", "adjective"), 0)
    for sentence in corpus["test"]:
        held = {part[0] for part in sentence.parts if demo.held_out(part)}
        assert held, sentence.de
        for kind in held:
            share[kind] += 1
    assert all(count >= 50 for count in share.values()), share


def test_parts_of_held_out_combinations_are_in_train(corpus):
    """The pieces of what is held out occur in training: modifiers, heads, adjectives, nouns, tens and ones."""
    seen = {part for sentence in corpus["train"] for part in sentence.parts}
    pieces = {(i, part[0], part[i]) for part in seen if part[0] != "number" for i in (1, 2)}
    numbers = {part[1] % 100 for part in seen if part[0] == "number"}
    words = {word for s in corpus["train"] for word in re.findall(r"\w+", s.de)}
    for sentence in corpus["test"]:
        for part in filter(demo.held_out, sentence.parts):
            if part[0] == "number" and part[1] % 100 > 20:
                assert {n // 10 for n in numbers} >= {part[1] % 100 // 10}
                assert {n % 10 for n in numbers if n > 20} >= {part[1] % 10}
            elif part[0] == "compound":
                assert (1, "compound", part[1]) in pieces and (2, "compound", part[2]) in pieces, part
            elif part[0] == "adjective":
                assert (1, "adjective", part[1]) in pieces, part
                noun = NOUN[part[2]]
                assert {noun.lemma, noun.plural, noun.form("p", "dat") if noun.plural else ""} & words, part


def test_held_out_share():
    """About a fifth of the compounds and of the two-digit compound numbers is held out, none below 21."""
    compounds = [demo.held_out(noun.parts[0]) for noun in COMPOUND.values()]
    assert 0.15 < sum(compounds) / len(compounds) < 0.27
    numbers = [n for n in range(2, 100) if demo.held_out(("number", n))]
    assert numbers[0] >= 21 and 12 <= len(numbers) <= 18
    assert all(demo.held_out(("number", 100 * h + n)) for h in range(1, 10) for n in numbers)


# ---- surface ------------------------------------------------------------------------------------
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_characters_spacing_and_final_punctuation(corpus):
    """Only expected characters, single spaces, a capital first and a full stop, ? or ! last."""
    common = set(LETTERS + LETTERS.upper() + "0123456789 .,!?'äöüÄÖÜß")
    allowed = {"de": common | set("„“"), "en": common | set('-:"')}
    used = {"de": set(), "en": set()}
    for sentence in (s for drawn in corpus.values() for s in drawn):
        for side, text in (("de", sentence.de), ("en", sentence.en)):
            used[side] |= set(text)
            assert set(text) <= allowed[side], text
            assert re.fullmatch(r'[„"]?[A-ZÄÖÜ].*[.!?]"?', text), text
            assert "  " not in text and not re.search(r' [.,!?:]|[,.!?]{2}(?!")', text), text
            assert not re.search(r"\bNone\b|\b(a [aeioAEIO]|an [^aeiouhAEIOU])", text) or side == "de", text
    assert set("äöüß„“,?!") <= used["de"] and set("'-\",?!") <= used["en"]


@pytest.mark.parametrize("words, expected", [
    ("old man", "an old man"), ("honest man", "an honest man"), ("useful tool", "a useful tool"),
    ("university clock", "a university clock"), ("unusual idea", "an unusual idea"), ("house", "a house"),
    ("hospital bus", "a hospital bus"), ("uncle", "an uncle"), ("ugly duck", "an ugly duck")])
def test_english_article(words, expected):
    """a or an follows the sound of the next word, not its letter."""
    assert demo.with_article(words) == expected


@pytest.mark.parametrize("n, expected", [
    (7, ("sieben", "seven")), (16, ("sechzehn", "sixteen")), (17, ("siebzehn", "seventeen")),
    (21, ("einundzwanzig", "twenty-one")), (30, ("dreißig", "thirty")), (76, ("sechsundsiebzig", "seventy-six")),
    (101, ("einhunderteins", "one hundred one")), (300, ("dreihundert", "three hundred")),
    (745, ("siebenhundertfünfundvierzig", "seven hundred forty-five"))])
def test_number_words(n, expected):
    """German number words put the ones before the tens, English the other way round."""
    assert demo.number_words(n) == expected


@pytest.mark.parametrize("n", [1, 1000])
def test_number_words_out_of_range(n):
    """A number without words is refused by name, value and range."""
    with pytest.raises(ValueError, match=f"number {n} .*2 to 999"):
        demo.number_words(n)


@pytest.mark.parametrize("made, forms, english", [
    (phrase("Hund", "def", "alt"), "der alte Hund|den alten Hund|dem alten Hund|des alten Hundes", "the old dog"),
    (phrase("Hund", "a", "alt"), "ein alter Hund|einen alten Hund|einem alten Hund|eines alten Hundes", "an old dog"),
    (phrase("Kind", "1s", "klug"), "mein kluges Kind|mein kluges Kind|meinem klugen Kind|meines klugen Kindes",
     "my clever child"),
    (phrase("Frau", 21, "müde"), "einundzwanzig müde Frauen|einundzwanzig müde Frauen|einundzwanzig müden Frauen|"
     "einundzwanzig müder Frauen", "twenty-one tired women"),
    (phrase("Nachbar", "this"), "dieser Nachbar|diesen Nachbarn|diesem Nachbarn|dieses Nachbarn", "this neighbor"),
    (phrase("Haus", "2p", "teuer", "p"), "eure teuren Häuser|eure teuren Häuser|euren teuren Häusern|"
     "eurer teuren Häuser", "your expensive houses"),
    (phrase("Brot", "bare", "frisch"), "frisches Brot|frisches Brot|frischem Brot|frischen Brotes", "fresh bread"),
    (phrase("Tasche", "a", "rosa"), "eine rosa Tasche|eine rosa Tasche|einer rosa Tasche|einer rosa Tasche",
     "a pink bag"),
    (phrase("Küchentür", "a"), "eine Küchentür|eine Küchentür|einer Küchentür|einer Küchentür", "a kitchen door"),
    (phrase("Schulbus", "def", None, "p"), "die Schulbusse|die Schulbusse|den Schulbussen|der Schulbusse",
     "the school buses"),
    (phrase("Auto", phrase("Lehrer", number="p")), "das Auto der Lehrer|das Auto der Lehrer|dem Auto der Lehrer|"
     "des Autos der Lehrer", "the teachers' car"),
    (phrase("Hund", ANNA, "alt"), "Annas alter Hund|Annas alten Hund|Annas altem Hund|Annas alten Hundes",
     "Anna's old dog"),
    (phrase("Buch", demo.name("Lukas", "3m")), "Lukas' Buch|Lukas' Buch|Lukas' Buch|Lukas' Buches", "Lukas's book"),
], ids=lambda value: value.split("|")[0] if isinstance(value, str) else "")
def test_noun_phrase(made, forms, english):
    """Determiner, adjective and noun agree in gender, case and number (weak, mixed, strong)."""
    assert "|".join(made.forms) == forms
    assert made.en == english


def test_noun_phrase_refuses_what_does_not_fit():
    """A plural of a mass noun and an unknown determiner are refused by name."""
    with pytest.raises(ValueError, match="determiner 3 does not fit 'Milch'"):
        phrase("Milch", 3)
    with pytest.raises(ValueError, match="determiner 'those' is unknown; valid are .*'this'"):
        phrase("Hund", "those")


ICH, DU, SIE = pronoun("1s"), pronoun("2s"), pronoun("3f")
MANN, BUCH, FENSTER = phrase("Mann", owner="3m"), phrase("Buch"), phrase("Fenster")


@pytest.mark.parametrize("sentence, german, english", [
    (demo.statement(clause(MANN, "lesen", phrase("Buch", "a"), tense="past", time=YESTERDAY), "time"),
     "Gestern hat der Mann ein Buch gelesen.", "Yesterday the man read a book."),
    (demo.statement(clause(MANN, "aufmachen", FENSTER, tense="progressive", time=TODAY)),
     "Der Mann macht heute das Fenster auf.", "The man is opening the window today."),
    (demo.statement(clause(SIE, "kaufen", phrase("Auto", "no"), negated=True)),
     "Sie kauft kein Auto.", "She doesn't buy a car."),
    (demo.statement(clause(ICH, "helfen", MANN, tense="past", negated=True)),
     "Ich habe dem Mann nicht geholfen.", "I didn't help the man."),
    (demo.statement(clause(MANN, "anrufen", pronoun("1s"), modal="müssen", negated=True)),
     "Der Mann muss mich nicht anrufen.", "The man doesn't have to call me."),
    (demo.statement(clause(SIE, "abholen", pronoun("1p"), tense="soon", time=Adverbial("morgen", "tomorrow"))),
     "Sie holt uns morgen ab.", "She'll pick us up tomorrow."),
    (demo.statement(clause(DU, "lesen", BUCH, tense="perfect", aspect="noch nicht")),
     "Du hast das Buch noch nicht gelesen.", "You haven't read the book yet."),
    (demo.statement(clause(ICH, "lesen", BUCH, tense="perfect", aspect="schon")),
     "Ich habe das Buch schon gelesen.", "I've already read the book."),
    (demo.statement(clause(MANN, "sehen", phrase("Hund")), "object"), "Den Hund sieht der Mann.", "The man sees the dog."),
    (demo.statement(clause(ANNA, "lesen", phrase("Buch", "bare", None, "p"), modal="gern")),
     "Anna liest gern Bücher.", "Anna likes to read books."),
    (demo.statement(clause(MANN, "geben", pronoun("3m"), BUCH)), "Der Mann gibt ihm das Buch.",
     "The man gives him the book."),
    (demo.statement(clause(ICH, "erklären", MANN, phrase("Problem"))), "Ich erkläre dem Mann das Problem.",
     "I explain the problem to the man."),
    (demo.statement(clause(MANN, "gehen", tense="past", goal=demo.direction(phrase("Bahnhof", "def", "alt")))),
     "Der Mann ist zum alten Bahnhof gegangen.", "The man went to the old station."),
    (demo.question(clause(DU, "schlafen", tense="past", place=demo.location(phrase("Garten")))),
     "Hast du im Garten geschlafen?", "Did you sleep in the garden?"),
    (demo.wh_question(clause(ANNA, "schlafen", tense="past"), "warum", "why"), "Warum hat Anna geschlafen?",
     "Why did Anna sleep?"),
    (demo.imperative(clause(DU, "sich beeilen")), "Beeil dich!", "Hurry!"),
    (demo.imperative(clause(DU, "vergessen", BUCH, negated=True)), "Vergiss das Buch nicht!", "Don't forget the book!"),
    (demo.imperative(clause(pronoun("2p"), "zumachen", FENSTER), plural=True, polite=True),
     "Bitte macht das Fenster zu!", "Please close the window!"),
    (demo.complex_sentence(clause(MANN, "weinen"), "weil", clause(pronoun("3m"), "aufräumen", phrase("Zimmer"),
                                                                   modal="müssen")),
     "Der Mann weint, weil er das Zimmer aufräumen muss.", "The man cries because he has to tidy up the room."),
    (demo.complex_sentence(clause(ICH, "lachen"), "wenn", clause(DU, "aufstehen"), first=True),
     "Wenn du aufstehst, lache ich.", "If you get up, I laugh."),
    (demo.infinitive(clause(SIE, "versuchen", tense="past"), clause(SIE, "aufmachen", FENSTER)),
     "Sie hat versucht, das Fenster aufzumachen.", "She tried to open the window."),
    (demo.statement(clause(demo.relative(MANN, clause(MANN, "kaufen", phrase("Hut", "a", "rot"), tense="past"), "nom"),
                           "lachen")),
     "Der Mann, der einen roten Hut gekauft hat, lacht.", "The man who bought a red hat laughs."),
    (demo.statement(clause(ICH, "brauchen", demo.relative(BUCH, clause(ANNA, "lesen"), "acc"))),
     "Ich brauche das Buch, das Anna liest.", "I need the book that Anna reads."),
    (demo.passive(phrase("Brücke", "def", None, "p"), VERB["bauen"], phrase("König")),
     "Die Brücken wurden vom König gebaut.", "The bridges were built by the king."),
    (demo.quotation(demo.statement(clause(ICH, "sein", goal=Adverbial("müde", "tired"))), ANNA),
     "„Ich bin müde“, sagt Anna.", '"I\'m tired," Anna says.'),
    (demo.statement(clause(phrase("Frau", number="p", owner="3p"), "suchen", phrase("Hund", "3p"))),
     "Die Frauen suchen ihren Hund.", "The women look for their dog."),
    (demo.coordination(clause(SIE, "kochen", phrase("Suppe", "a")), "aber", clause(pronoun("1p"), "schlafen")),
     "Sie kocht eine Suppe, aber wir schlafen.", "She cooks a soup, but we sleep."),
], ids=lambda value: value if isinstance(value, str) else "")
def test_construction(sentence, german, english):
    """The construction gives exactly this German and this English sentence, chosen by hand."""
    assert (sentence.de, sentence.en) == (german, english)


# ---- command line -------------------------------------------------------------------------------
@pytest.mark.parametrize("options, message", [
    (["--train", "0"], "--train 0 is too small; valid are whole numbers from 1"),
    (["--valid", "-3"], "--valid -3 is too small"),
    (["--test", "1000000"], "--test 1000000 is more than the grammar supplies; valid are sizes that add up to 100000"),
    (["--seed", "-1"], "--seed -1 is negative; valid are whole numbers from 0"),
    (["--train", "many"], "invalid int value: 'many'")])
def test_usage_errors_exit_2_and_write_nothing(tmp_path, capsys, options, message):
    """A bad option ends with code 2, a message with option, value and valid choices, and no file."""
    with pytest.raises(SystemExit) as stop:
        demo.main([str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_existing_outdir_is_refused_and_kept(tmp_path):
    """An existing OUTDIR, even an empty one, ends with code 2 and stays as it was."""
    out = tmp_path / "out"
    out.mkdir()
    result = run(out, "--train", 5)
    assert result.returncode == 2
    assert f"OUTDIR {out} exists; valid is the path of a directory to be made" in result.stderr
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == []


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    """If a file cannot be finished, neither OUTDIR nor its temporary sibling is left."""
    broken = {"train": [("Gut.", "Good.")], "valid": [("Halb.",)]}
    with pytest.raises(IndexError):
        demo.write(tmp_path / "out", broken)
    assert os.listdir(tmp_path) == []


def test_exhausted_grammar_is_an_error(monkeypatch):
    """A grammar that yields one sentence cannot fill a split of two: the error says how far it got."""
    sentence = demo.Sentence("Der Schulbus.", "The school bus.", (("number", 24),))
    monkeypatch.setattr(demo, "draw_sentence", lambda dice: sentence)
    monkeypatch.setattr(demo, "held_out", lambda part: True)
    with pytest.raises(ValueError, match="--test 2 is more than the grammar supplies .* up to 1"):
        demo.generate(1, 1, 2)


def test_help_names_every_option():
    """--help ends with 0 and shows each option and its default."""
    result = run("--help")
    assert result.returncode == 0
    for text in ("OUTDIR", "--train N", "--valid N", "--test N", "--seed S", "6000", "300"):
        assert text in result.stdout
