"""What the bundled model is trained on: one module a skill, each with `SHARE` and `example(rng) -> Example`.

A new skill is a new module with those two names, added to `skills`. `drill` is none: it fills rows by itself.
"""

import random
from dataclasses import dataclass

from tasks.facts import Fact, arithmetic_facts, in_words, table_facts

ARITHMETIC_SHARE = 0.25
PRODUCT_SHARE = 0.1  # of arithmetic: the hundred products would drown among ten thousand sums


@dataclass(frozen=True)
class Example:
    """One training conversation. The loss is on `reply` alone, each token weighing `weight`."""

    system: str
    user: str
    reply: str
    weight: float = 1.0


def any_fact(rng: random.Random) -> Fact:
    """A fact: of the tables, each as often as any other, or of arithmetic."""
    if rng.random() >= ARITHMETIC_SHARE:
        return rng.choice(table_facts())
    facts = arithmetic_facts()
    products = 100
    return rng.choice(facts[-products:] if rng.random() < PRODUCT_SHARE else facts[:-products])


def any_question(fact: Fact, rng: random.Random) -> str:
    """One of the training phrasings of the fact, now and then typed carelessly."""
    return careless(fact.question(rng.choice(fact.subject.ask)), rng)


def careless(question: str, rng: random.Random) -> str:
    """The question as people type it: sometimes in lower case, without its mark, with sums in words."""
    if " + " in question or " - " in question or " * " in question:
        question = in_words(question) if rng.random() < 0.4 else question
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    return question


def shuffled(options, rng: random.Random) -> list[str]:
    options = list(options)
    rng.shuffle(options)
    return options


def skills():
    """The skill modules, with their shares of the corpus."""
    from tools.corpus import learner, quizmaster, solver, tutor, unknown

    return [tutor, quizmaster, solver, learner, unknown]


def examples(rng: random.Random):
    """Training conversations without end, each skill in its share."""
    modules = skills()
    shares = [module.SHARE for module in modules]
    while True:
        yield rng.choices(modules, shares)[0].example(rng)
