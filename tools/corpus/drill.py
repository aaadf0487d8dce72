"""Sums by the dozen: what makes a model that can speak able to add.

In a conversation a sum is two digits among forty tokens, and ten thousand sums come by too rarely to be learnt from it.
A drill is a row of them in the two forms in which the tutor and the quizmaster write a sum, and the loss is on the
results alone. Drills begin once the language is there; then small numbers begin to come up as often as large ones, as
the sums of small numbers are what those of large ones are made of; at last solver and learner have drills of their own.
"""

import random
from functools import cache

from lora_ppo_demo import TUTOR_PROMPT
from tasks.facts import Fact, arithmetic_facts
from tools.corpus import Example, learner, solver

FIRST_STEP, BALANCED_STEP, ROLES_STEP = 1200, 1500, 3173  # of the build
SHARE = 0.3  # of the rows from then on
WEIGHT = 3.0
FORMS = (("The result of {} is ", ". "), ('"What is {}?","correct":"', '" '))


@cache
def by_size() -> tuple[tuple[Fact, ...], ...]:
    """The facts of arithmetic with two, with one and with no operand above 9."""
    sizes = {fact: sum(len(part) > 1 for part in fact.about.split()) for fact in arithmetic_facts()}
    return tuple(tuple(fact for fact, size in sizes.items() if size == wanted) for wanted in (2, 1, 0))


def lines(rng: random.Random, count: int, balanced: bool) -> list[tuple[str, str, str]]:
    """(what precedes the result, the result, what follows it) of `count` sums, differences and products."""
    facts = rng.sample(arithmetic_facts(), count)
    if balanced:
        facts = [rng.choice(rng.choice(by_size())) for _ in range(count)]
    return [(before.format(fact.about), fact.answer, after) for fact in facts for before, after in [rng.choice(FORMS)]]


def role(rng: random.Random) -> Example:
    """The solver or the learner at work on a sum."""
    fact = rng.choice(rng.choice(by_size()))
    return rng.choice((solver, learner)).on(fact, rng)


def conversation(packer, balanced: bool) -> tuple[list[int], list[int], list[float]]:
    """One row of sums, as `Packer` packs it."""
    system = [packer.system, *packer.encode(TUTOR_PROMPT), packer.end]
    tokens, weights = [packer.user, packer.end, packer.assistant], [0.0] * 3
    for before, result, after in lines(packer.rng, 24, balanced):
        for text, weight in ((before, 0.0), (result, WEIGHT), (after, 0.0)):
            ids = packer.encode(text)
            tokens += ids
            weights += [weight] * len(ids)
    return system, tokens, weights
