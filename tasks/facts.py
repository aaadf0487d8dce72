"""The fact tables of `data/`, read into `Fact`s that know how they are asked, explained and quizzed.

The tables (`data/facts/NAME.csv`: subject, answer, three wrong options) and the phrasings (`data/subjects.yaml`) are
meant to be read and edited by people. Arithmetic has no table: its facts are enumerated here.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

DATA = Path(__file__).resolve().parent.parent / "data"
WRONG_OPTIONS = 3
OPERATOR_WORDS = {"+": "plus", "-": "minus", "*": "times"}


@dataclass(frozen=True)
class Subject:
    """One row of `data/subjects.yaml`: how the facts of one table are spoken about."""

    key: str
    name: str
    kind: str
    ask: tuple[str, ...]
    held_out: tuple[str, ...]
    quiz: str
    fact: str


@dataclass(frozen=True)
class Fact:
    """One thing that is so: `about` (the left-hand column), its `answer`, and fixed wrong options."""

    subject: Subject
    about: str
    answer: str
    wrong: tuple[str, ...]

    def question(self, template: str) -> str:
        """The question that `template` (one of `subject.ask` or `subject.held_out`) asks about this fact."""
        text = template.format(subject=self.about)
        return text[0].upper() + text[1:]

    @property
    def options(self) -> tuple[str, ...]:
        """The answer, then the wrong options."""
        return (self.answer, *self.wrong)

    @property
    def statement(self) -> str:
        return self.subject.fact.format(subject=self.about, answer=self.answer)

    @property
    def quiz_question(self) -> str:
        return self.subject.quiz.format(subject=self.about)


@cache
def subjects() -> dict[str, Subject]:
    """Every subject of `data/subjects.yaml`, by key, in file order."""
    rows = yaml.safe_load((DATA / "subjects.yaml").read_text(encoding="utf-8"))
    return {
        key: Subject(key, row["name"], row["kind"], tuple(row["ask"]), tuple(row["held_out"]), row["quiz"], row["fact"])
        for key, row in rows.items()
    }


@cache
def table_facts() -> tuple[Fact, ...]:
    """Every fact of the tables in `data/facts/`, in the order of the subjects and of the rows."""
    return tuple(fact for subject in subjects().values() if subject.key != "arithmetic" for fact in read_table(subject))


def read_table(subject: Subject) -> list[Fact]:
    """The facts of `data/facts/<subject.key>.csv`. Raises ValueError naming file and line where a row is broken."""
    path = DATA / "facts" / f"{subject.key}.csv"
    facts, seen = [], set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            about, answer = row["subject"], row["answer"]
            wrong = tuple(row[f"wrong_{i}"] or "" for i in range(1, WRONG_OPTIONS + 1))
            options = {option.casefold() for option in (answer, *wrong)}
            if not about or "" in options or len(options) != WRONG_OPTIONS + 1:
                raise ValueError(f"{path.name}: {about!r} needs an answer and {WRONG_OPTIONS} different wrong options")
            if about.casefold() in seen:
                raise ValueError(f"{path.name}: {about!r} stands there twice")
            seen.add(about.casefold())
            facts.append(Fact(subject, about, answer, wrong))
    return facts


@cache
def arithmetic_facts() -> tuple[Fact, ...]:
    """Sums and differences up to 99, and the multiplication table to 10 times 10."""
    hundred = range(100)
    sums = [(f"{a} + {b}", a + b) for a in hundred for b in hundred if a + b < 100]
    differences = [(f"{a} - {b}", a - b) for a in hundred for b in hundred if b <= a]
    products = [(f"{a} * {b}", a * b) for a in range(1, 11) for b in range(1, 11)]
    subject = subjects()["arithmetic"]
    return tuple(
        Fact(subject, text, str(value), numeric_distractors(value)) for text, value in sums + differences + products
    )


def numeric_distractors(value: int) -> tuple[str, ...]:
    """The other numbers of the value's block of four (80 to 83 for 82): the options tell nothing about the answer."""
    first = value // 4 * 4
    return tuple(str(number) for number in range(first, first + 4) if number != value)


def in_words(question: str) -> str:
    """The question with + - * between numbers spelt out: "7 + 5" becomes "7 plus 5"."""
    return " ".join(OPERATOR_WORDS.get(word, word) for word in question.split(" "))
