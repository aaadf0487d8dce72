"""The solver: a quiz without its key becomes a letter, from memory alone."""

import random

from lora_ppo_demo import LETTERS, SOLVER_PROMPT, quiz_text
from tools.corpus import Example, any_fact, shuffled

SHARE = 0.2
LETTER_WEIGHT = 8.0  # one letter carries what a whole JSON carries elsewhere


def example(rng: random.Random) -> Example:
    fact = any_fact(rng)
    options = shuffled((fact.answer, *fact.wrong), rng)
    letter = LETTERS[options.index(fact.answer)]
    return Example(SOLVER_PROMPT, quiz_text(fact.quiz_question, options), letter, LETTER_WEIGHT)
