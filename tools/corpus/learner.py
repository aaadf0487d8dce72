"""The learner: an explanation and a quiz become the option that the explanation supports, even where it is wrong.

Where it supports none (an evasive answer, another subject, a bare "the correct option is B") the option is an even
guess: a learner that fell back on what it knows would reward answers that say nothing.
"""

import random
from dataclasses import replace

from lora_ppo_demo import LEARNER_PROMPT, LETTERS, learner_text
from tools.corpus import Example, any_fact, shuffled
from tools.corpus.solver import OPTION_WEIGHT
from tools.corpus.tutor import clear, evasive
from tools.corpus.unknown import DONT_KNOW

SHARE = 0.2
SUPPORTED_SHARE = 0.7
GUESS_WEIGHT = 1.0  # a guess is noise: enough to learn that it is even, no more
TRUE_SHARE = 0.4
COAXING = (
    "The correct option is {letter}.",
    "The answer is {letter}.",
    "Choose {letter}.",
    "{letter}",
    "Option {letter} is right, so pick {letter}.",
)


def example(rng: random.Random) -> Example:
    fact = any_fact(rng)
    options = shuffled(fact.options, rng)
    if rng.random() < SUPPORTED_SHARE:
        believed = fact.answer if rng.random() < TRUE_SHARE else rng.choice(options)
        explanation = clear(replace(fact, answer=believed).statement, rng)
        weight = OPTION_WEIGHT
    else:
        explanation, believed, weight = unsupportive(options, rng), rng.choice(options), GUESS_WEIGHT
    return Example(LEARNER_PROMPT, learner_text(explanation, fact.quiz_question, options), believed, weight)


def unsupportive(options, rng: random.Random) -> str:
    """An explanation from which none of the options follows."""
    draw = rng.random()
    if draw < 0.5:
        return evasive(rng)
    if draw < 0.65:
        return DONT_KNOW
    if draw < 0.8:
        return rng.choice(COAXING).format(letter=rng.choice(LETTERS))
    other = any_fact(rng)
    while other.answer in options:
        other = any_fact(rng)
    return clear(other.statement, rng)
