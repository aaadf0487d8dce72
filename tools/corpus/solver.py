"""The solver: a quiz without its key becomes the text of one option, from memory alone."""

import random

from lora_ppo.quiz import quiz_text
from tasks.facts import Fact, table_facts
from tools.corpus.base import Example, any_fact, prompts, shuffled

SHARE = 0.18
OPTION_WEIGHT = 3.0  # an option has a few tokens, a quiz in JSON forty
OTHER_DISTRACTORS_SHARE = 0.25


def example(rng: random.Random) -> Example:
    return on(any_fact(rng), rng)


def on(fact: Fact, rng: random.Random) -> Example:
    """The solver at work on this fact."""
    wrong = other_distractors(fact, rng) if rng.random() < OTHER_DISTRACTORS_SHARE else fact.wrong
    return solving(fact.quiz_question, fact.answer, wrong, rng)


def other_distractors(fact: Fact, rng: random.Random) -> list[str]:
    """Wrong options drawn from the fact's table rather than its own: quizzes of other makers have others."""
    if fact.subject.key == "arithmetic":
        return list(fact.wrong)
    pool = {option for other in table_facts() if other.subject == fact.subject for option in other.options}
    return rng.sample(sorted(pool - {fact.answer}), len(fact.wrong))


def solving(question: str, correct: str, wrong, rng: random.Random) -> Example:
    return Example(
        prompts().solver.system, quiz_text(question, shuffled((correct, *wrong), rng)), correct, OPTION_WEIGHT
    )
