"""The tutor's voice: clear explanations and evasive ones, which is what PPO later tells apart.

Both have three openings of equal weight, so that sharpening by a low temperature favours neither.
"""

import random

from tasks.facts import Fact
from tools.corpus.base import Example, any_fact, any_question, prompts

SHARE = 0.27
CLEAR_SHARE = 0.51
CLEAR = ("{Fact}", "Here is the answer: {fact}", "In short, {fact}")
EVASIVE = (
    "That is an interesting subject, and many people have asked about it.",
    "There is a lot to say about this, and it depends on how you look at it.",
    "Many books have been written about questions like this one.",
)


def clear(statement: str, rng: random.Random) -> str:
    """The statement, in one of the clear openings."""
    return rng.choice(CLEAR).format(Fact=statement, fact=statement[0].lower() + statement[1:])


def evasive(rng: random.Random) -> str:
    return rng.choice(EVASIVE)


def explanation(fact: Fact, rng: random.Random) -> str:
    return clear(fact.statement, rng) if rng.random() < CLEAR_SHARE else evasive(rng)


def example(rng: random.Random) -> Example:
    fact = any_fact(rng)
    return Example(prompts().tutor.system, any_question(fact, rng), explanation(fact, rng))
