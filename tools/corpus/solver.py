"""The solver: a quiz without its key becomes a letter, from memory alone.

Some quizzes ask only which option reads so and so: finding a text among lettered options is half of solving, and a
model that has learnt the half learns the whole many times sooner.
"""

import random

from lora_ppo_demo import LETTERS, SOLVER_PROMPT, quiz_text
from tasks.facts import Fact, table_facts
from tools.corpus import Example, any_fact, shuffled

SHARE = 0.2
LETTER_WEIGHT = 8.0  # one letter carries what a whole JSON carries elsewhere


FINDING_SHARE = 0.3
OTHER_DISTRACTORS_SHARE = 0.2


def example(rng: random.Random) -> Example:
    draw = rng.random()
    if draw < FINDING_SHARE:
        return finding(rng)
    fact = any_fact(rng)
    wrong = fact.wrong if draw > FINDING_SHARE + OTHER_DISTRACTORS_SHARE else other_distractors(fact, rng)
    return solving(fact.quiz_question, fact.answer, wrong, rng)


def finding(rng: random.Random) -> Example:
    """A quiz whose question names the option."""
    options = finding_options(rng)
    return solving(f"Which option is {options[0]}?", options[0], options[1:], rng)


def finding_options(rng: random.Random) -> list[str]:
    """Four different options from anywhere."""
    options: list[str] = []
    while len(options) < len(LETTERS):
        option = rng.choice(any_fact(rng).options)
        options += [option] * (option not in options)
    return options


def other_distractors(fact: Fact, rng: random.Random) -> list[str]:
    """Wrong options drawn from the fact's table rather than its own: quizzes of other makers have others."""
    if fact.subject.key == "arithmetic":
        return list(fact.wrong)
    pool = {option for other in table_facts() if other.subject == fact.subject for option in other.options}
    return rng.sample(sorted(pool - {fact.answer}), len(LETTERS) - 1)


def solving(question: str, correct: str, wrong, rng: random.Random) -> Example:
    options = shuffled((correct, *wrong), rng)
    letter = LETTERS[options.index(correct)]
    return Example(SOLVER_PROMPT, quiz_text(question, options), letter, LETTER_WEIGHT)
