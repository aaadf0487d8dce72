"""Sums by the dozen: what makes a model that can speak able to add.

In a conversation a sum is two digits among forty tokens, and ten thousand sums come by too rarely to be learnt from it.
A drill is a row of nothing else: either the two forms in which the tutor and the quizmaster write a sum, with the loss
on the results alone, or the solver or the learner at work on sums. Small numbers come up as often as large ones, as the
sums of small numbers are what those of large ones are made of.
"""

import random
from functools import cache

from tasks.facts import Fact, arithmetic_facts
from tools.corpus import learner, solver
from tools.corpus.base import Example, prompts

SHARE = 0.25  # of the rows
LINES_SHARE = 0.4  # of the drills
WEIGHT = 3.0
FORMS = (("The result of {} is ", ". "), ('"What is {}?","correct":"', '" '))


@cache
def by_size() -> tuple[tuple[Fact, ...], ...]:
    """The facts of arithmetic with two, with one and with no operand above 9."""
    sizes = {fact: sum(len(part) > 1 for part in fact.about.split()) for fact in arithmetic_facts()}
    return tuple(tuple(fact for fact, size in sizes.items() if size == wanted) for wanted in (2, 1, 0))


def any_sum(rng: random.Random) -> Fact:
    return rng.choice(rng.choice(by_size()))


def lines(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """(what precedes the result, the result, what follows it) of `count` sums, differences and products."""
    drawn = [(any_sum(rng), *rng.choice(FORMS)) for _ in range(count)]
    return [(before.format(fact.about), fact.answer, after) for fact, before, after in drawn]


def roles(rng: random.Random, count: int) -> list[Example]:
    """`count` conversations about sums, all with the solver or all with the learner."""
    role = rng.choices((solver, learner), (2, 1))[0]
    return [role.on(any_sum(rng), rng) for _ in range(count)]


def conversation(packer) -> tuple[list[int], list[int], list[float]]:
    """One row of lines, as `Packer` packs it."""
    system = [packer.system, *packer.encode(prompts().tutor.system), packer.end]
    tokens, weights = [packer.user, packer.end, packer.assistant], [0.0] * 3
    for before, result, after in lines(packer.rng, 24):
        for text, weight in ((before, 0.0), (result, WEIGHT), (after, 0.0)):
            ids = packer.encode(text)
            tokens += ids
            weights += [weight] * len(ids)
    return system, tokens, weights
