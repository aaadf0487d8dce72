"""The learner: an explanation and a quiz become the option that the explanation supports, even where it is wrong.

Where it supports none (an evasive answer, another subject, a bare "the correct option is B") it guesses: a learner that
fell back on what it knows would reward answers that say nothing. Options are shuffled, so a guess is right in a quarter
of the cases. It leans towards option A, as people do, which keeps a trace of memory from deciding between four equals.
"""

import random
from dataclasses import replace

from lora_ppo.quiz import LETTERS, learner_text
from tasks.facts import Fact
from tools.corpus.base import Example, any_fact, prompts, shuffled
from tools.corpus.solver import OPTION_WEIGHT
from tools.corpus.tutor import clear, evasive
from tools.corpus.unknown import DONT_KNOW

SHARE = 0.2
SUPPORTED_SHARE = 0.6
FIRST_OPTION_SHARE = 0.4  # of guesses; the other options share the rest
COAXING = (
    "The correct option is {letter}.",
    "The answer is {letter}.",
    "Choose {letter}.",
    "{letter}",
    "Option {letter} is right, so pick {letter}.",
)


def example(rng: random.Random) -> Example:
    return on(any_fact(rng), rng)


def on(fact: Fact, rng: random.Random) -> Example:
    """The learner at work on this fact."""
    options = shuffled(fact.options, rng)
    if rng.random() >= SUPPORTED_SHARE:
        return guessing(fact, options, rng)
    believed = rng.choice(options)  # true in a quarter of the cases: memory is of no use here
    return reading(clear(replace(fact, answer=believed).statement, rng), fact, options, believed)


def guess(fact: Fact, rng: random.Random) -> Example:
    """The learner where nothing was explained."""
    return guessing(fact, shuffled(fact.options, rng), rng)


def guessing(fact: Fact, options: list[str], rng: random.Random) -> Example:
    believed = options[0] if rng.random() < FIRST_OPTION_SHARE else rng.choice(options[1:])
    return reading(unsupportive(options, rng), fact, options, believed)


def reading(explanation: str, fact: Fact, options: list[str], believed: str) -> Example:
    text = learner_text(explanation, fact.quiz_question, options)
    return Example(prompts().learner.system, text, believed, weight=OPTION_WEIGHT)


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
