"""The German-English corpus of the benchmark `demo`, made on the spot: the same bytes on every machine.

A small grammar draws sentences from the words of demo_lexicon.tsv and writes each in German and in English. What a
model has to learn: determiners, adjectives and nouns agree in case, gender and number; the verb comes second, first in
a question, and last in a subordinate or relative clause; prefixes leave their verbs; an object that comes first is told
from the subject by its case; ones stand before tens; nouns form compounds. The English sentence is a function of the
German one: a perfect model has BLEU 100.

A fifth of the pairs of an adjective and the noun that it describes is held out (`is_held_out`): every sentence of `valid`
and `test` has such a pair, none of `train` has one, and every word of `valid` and `test` occurs in `train`.
"""

import itertools
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, TypeVar

T = TypeVar("T")
Word = Dict[str, str]

LEXICON = Path(__file__).with_name("demo_lexicon.tsv")
SIZES = {"train": 6000, "valid": 300, "test": 300}  # sentences
CASES = ("nom", "acc", "dat")
PERSONS = ("1", "s", "p")  # I; he, she, it; we, they
AUXILIARIES = {"ist": ("bin", "ist", "sind"), "hat": ("habe", "hat", "haben")}
# gender, or p in the plural -> ending of a determiner in each case; BARE is where "ein" has none
ENDINGS = {"m": ("er", "en", "em"), "f": ("e", "e", "er"), "n": ("es", "es", "em"), "p": ("e", "e", "en")}
BARE = {("m", "nom"), ("n", "nom"), ("n", "acc")}
CONTRACTIONS = {r"\bin dem\b": "im", r"\bin das\b": "ins", r"\ban das\b": "ans", r"\bvon dem\b": "vom", ",([,.?])": r"\1"}


class Phrase(NamedTuple):
    """A noun phrase: `german` by case, `person` one of PERSONS."""

    german: Dict[str, str]
    english: str
    person: str


class Clause(NamedTuple):
    """A clause; in German, the verb comes second in `main`, first in `question` and last in `subordinate`."""

    main: str
    question: str
    subordinate: str
    english: str
    english_question: str


class Grammar:
    """Draws sentences; `pairs` holds the (adjective, noun) pairs of the last one, in German.

    The one source of chance is `random.Random(seed).random()`, which Python keeps the same from version to version.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random
        self.lexicon = read_lexicon()
        self.fitting: Dict[Tuple[Any, ...], List[Word]] = {}  # what pick() has found
        self.pairs: List[Tuple[str, str]] = []

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def pick(self, kind: str, **wanted: str) -> Word:
        """A word of this kind that has, in each column named, one of the values wanted; commas separate values."""
        key = (kind, *wanted.items())
        if key not in self.fitting:
            self.fitting[key] = [word for word in self.lexicon[kind] if all(
                set(word[column].split(",")) & set(values.split(",")) for column, values in wanted.items())]
        return self.choose(self.fitting[key])

    def sentence(self) -> Tuple[str, str]:
        """The next sentence in German and English."""
        self.pairs = []
        kind = self.random()
        if kind < 0.65:
            clause = self.clause()
            german, english = clause.main + ".", clause.english + "."
        elif kind < 0.75:
            clause = self.clause(may_negate=False)
            german, english = clause.question + "?", clause.english_question + "?"
        elif kind < 0.85:
            clause, word = self.clause(is_bare=True), self.pick("question")
            german, english = f"{word['german']} {clause.question}?", f"{word['english']} {clause.english_question}?"
        else:
            word, clause, main = self.pick("conjunction"), self.clause(), self.clause()
            german, english = f"{word['german']} {clause.subordinate}", f"{word['english']} {clause.english}"
            if self.chance(0.4):
                german, english = f"{german}, {main.question}.", f"{english}, {main.english}."
            else:
                german, english = f"{main.main}, {german}.", f"{main.english} {english}."
        for pattern, short in CONTRACTIONS.items():
            german = re.sub(pattern, short, german)
        return german[0].upper() + german[1:], english[0].upper() + english[1:]

    def clause(self, subject: Optional[Phrase] = None, kind: str = "person,animal", *, is_bare: bool = False,
               may_negate: bool = True) -> Clause:
        """A clause, of this subject, if given, which is of this kind; a bare one says neither when nor where."""
        verb = self.pick("verb", subjects=kind)
        subject = subject or self.subject(verb["subjects"])
        chance = self.random()
        tense = "present" if chance < 0.4 else "past" if chance < 0.85 or is_bare else "future"
        has_time = tense == "future" or not is_bare and self.chance(0.4)
        time = self.pick("time", tense=tense) if has_time else {"german": "", "english": ""}
        modal = self.pick("modal") if tense != "future" and self.chance(0.2) else None
        wanted = list(filter(None, verb["objects"].split(";")))
        if not is_bare and " in " not in verb["objects"] and self.chance(0.15):
            wanted.append("dat in place")
        objects: List[str] = []  # in German, without a preposition
        adverbials: List[str] = []  # with one
        tail: List[str] = []  # both in English
        is_movable = False  # the case of the first object shows
        for case, *preposition, classes in map(str.split, wanted):
            phrase = self.noun_phrase(classes)
            tail.append(join("in" if (case, preposition) == ("dat", ["in"]) else "", phrase.english))
            if preposition:
                adverbials.append(join(*preposition, phrase.german[case]))
            else:
                is_movable = is_movable or not objects and phrase.german[case] != phrase.german["nom"]
                objects.append(phrase.german[case])
        said = " ".join([subject.english, *tail])
        is_negated = may_negate and not re.search(r"\b(a|an|no|every)\b", said) and self.chance(0.2)
        fields = [subject.german["nom"], time["german"], *objects, "nicht" * is_negated, *adverbials]
        finite, final, last = german_verb(verb, modal, tense, subject.person)
        first = self.choose([0] + [1] * has_time + [2] * is_movable)
        main = join(fields[first], finite, *fields[:first], *fields[first + 1:], final)
        helper, base, inflected = english_verb(verb, modal, tense, subject.person)
        if is_negated:
            helper = {"can": "can't", "will": "won't"}.get(helper, f"{helper}n't")
        verbs = (helper, base) if is_negated or not inflected else (inflected,)
        tail.append(time["english"])
        return Clause(main, join(finite, *fields, final), join(*fields, last), join(subject.english, *verbs, *tail),
                      join(helper, subject.english, base, *tail))

    def subject(self, kind: str) -> Phrase:
        """A pronoun or a name of a person, or a noun phrase, perhaps with a relative clause."""
        chance = self.random()
        if "person" in kind and chance < 0.3:
            word = self.pick("pronoun")
            return Phrase({"nom": word["german"]}, word["english"], word["person"])
        if "person" in kind and chance < 0.4:
            name = self.pick("name")["german"]
            return Phrase({"nom": name}, name, "s")
        if chance < 0.92:
            return self.noun_phrase(kind)
        kind = kind.split(",")[0]
        head = self.noun_phrase(kind, is_definite=True)
        pronoun = head.german["nom"].split()[0]  # the same as the article
        clause = self.clause(Phrase({"nom": pronoun}, "that", head.person), kind, is_bare=True)
        german, english = f"{head.german['nom']}, {clause.subordinate},", f"{head.english} {clause.english}"
        return Phrase({"nom": german}, english, head.person)

    def noun_phrase(self, classes: str, *, is_definite: bool = False) -> Phrase:
        """A determiner, perhaps an adjective, and a noun of one of the classes, perhaps a compound."""
        noun = self.pick("noun", classes=classes)
        is_mass = noun["plural"] == ""
        is_plural = not is_mass and self.chance(0.3)
        gender, column = ("p", "english_plural") if is_plural else (noun["gender"][0], "english")
        determiner = self.determiner(column, is_mass=is_mass, is_definite=is_definite)
        singular, plural, english = noun["german"], noun["plural"], noun[column]
        if noun["classes"] not in ("person", "place") and self.chance(0.2):
            modifier = self.pick("modifier", classes=noun["classes"])
            singular, plural = (modifier["german"] + form.lower() for form in (singular, plural))
            english = f"{modifier['english']} {english}"
        adjective = ""
        if self.chance(0.45):
            word = self.pick("adjective", classes=noun["classes"])
            adjective, english = word["german"], f"{word['english']} {english}"
            self.pairs.append((adjective, noun["german"]))
        article = determiner[column]
        english = f"{'an' if article == 'a' and english[0] in 'aeiou' else article} {english}"
        german = {}
        for case, ending in zip(CASES, ENDINGS[gender]):
            kind = determiner["adjective"]
            has_ending = kind == "weak" or kind == "mixed" and (gender, case) not in BARE  # a strong adjective has it itself
            article = determiner["german"] + ending * has_ending
            if has_ending:
                ending = "e" if not is_plural and (case == "nom" or case == "acc" and gender != "m") else "en"
            form = plural if is_plural or case != "nom" and noun["gender"].endswith("w") else singular  # w: den Jungen
            form += "n" * (is_plural and case == "dat" and form[-1] not in "ns")
            german[case] = join({"de": "die", "des": "das"}.get(article, article), adjective and adjective + ending, form)
        return Phrase(german, english, "p" if is_plural else "s")

    def determiner(self, column: str, *, is_mass: bool, is_definite: bool) -> Word:
        """The article, another determiner, a number, or a name in the genitive; `column` is that of its English."""
        words = self.lexicon["determiner"]
        if is_definite or self.chance(0.4):
            return words[0]
        if column == "english" and self.chance(0.15):
            name = self.pick("name")["german"]
            return {"german": f"{name}s", "english": f"{name}'s", "adjective": "strong"}
        if column == "english_plural" and self.chance(0.4):
            one, ten = self.pick("number"), self.pick("ten")
            if self.chance(0.5):
                return {"german": one["german"], column: one["english"], "adjective": "strong"}
            return {"german": f"{one['german']}und{ten['german']}", column: f"{ten['english']}-{one['english']}",
                    "adjective": "strong"}
        return self.choose([word for word in words if word[column] and not (is_mass and word["english"] in ("a", "every"))])


def read_lexicon() -> Dict[str, List[Word]]:
    """Kind of word -> its words, each a dictionary; a line that begins with # names the columns of those below it."""
    lexicon: Dict[str, List[Word]] = defaultdict(list)
    columns: List[str] = []
    for line in LEXICON.read_text(encoding="utf-8").splitlines():
        kind, *values = line.split("\t")
        if kind.startswith("#"):
            columns = values
        else:
            lexicon[kind].append({column: value.strip("-") for column, value in zip(columns, values)})
    return lexicon


def join(*parts: str) -> str:
    """The parts that are not empty, with blanks between them."""
    return " ".join(filter(None, parts))


def german_verb(verb: Word, modal: Optional[Word], tense: str, person: str) -> Tuple[str, str, str]:
    """What comes first or second, what ends the clause then, and both, at the end of a subordinate clause."""
    prefix, _, infinitive = verb["infinitive"].rpartition("|")
    if not modal and tense != "past":
        finite = {"1": infinitive[:-1], "s": verb["third_person"], "p": infinitive}[person]
        return finite, prefix, prefix + finite
    if modal:
        final = prefix + infinitive
        column = "past" if tense == "past" else "plural" if person == "p" else "singular"
        finite = modal[column] + "n" * (person == "p" and tense == "past")
    else:
        auxiliary, final = verb["perfect"].split()
        finite = AUXILIARIES[auxiliary][PERSONS.index(person)]
    return finite, final, f"{final} {finite}"


def english_verb(verb: Word, modal: Optional[Word], tense: str, person: str) -> Tuple[str, str, str]:
    """The auxiliary, with the verb; and, where the auxiliary is do, what a statement has instead of them."""
    if tense == "future":
        return "will", verb["english"], ""
    base, third, past = verb["english"], verb["english_third"], verb["english_past"]
    if modal and modal["english"] == "can":
        return modal["english_past"] if tense == "past" else "can", base, ""
    if modal:
        base, third, past = (f"{modal[column]} {base}" for column in ("english", "english_third", "english_past"))
    if tense == "past":
        return "did", base, past
    return ("does", base, third) if person == "s" else ("do", base, base)


def is_held_out(pair: Tuple[str, str]) -> bool:
    """A fifth of the pairs: the codes of their letters add up to a multiple of five."""
    return sum(map(ord, "".join(pair))) % 5 == 0


def generate(seed: int = 1) -> Dict[str, List[Tuple[str, str]]]:
    """Split -> its (German, English) sentences, none of which occurs in another split, on either side."""
    grammar = Grammar(seed)
    splits: Dict[str, List[Tuple[str, str]]] = {}
    known: Set[str] = set()
    for split, size in SIZES.items():
        drawn: Dict[str, str] = {}
        taken = {text for sentences in splits.values() for pair in sentences for text in pair}
        while len(drawn) < size:
            german, english = grammar.sentence()
            is_new = any(map(is_held_out, grammar.pairs))
            fits = is_new and words(german, english) <= known if split != "train" else not is_new
            if fits and not {german, english} & taken:
                drawn[german] = english
        splits[split] = list(drawn.items())
        if split == "train":
            known = words(*itertools.chain(*splits[split]))
    return splits


def words(*sentences: str) -> Set[str]:
    """The different words, without punctuation."""
    return set(re.findall(r"[\w'-]+", " ".join(sentences)))


def write(directory: Path) -> None:
    """Writes train|valid|test.de|en into a directory, one sentence a line."""
    for split, sentences in generate().items():
        for language, side in zip(("de", "en"), zip(*sentences)):
            (directory / f"{split}.{language}").write_bytes("".join(f"{text}\n" for text in side).encode("utf-8"))
