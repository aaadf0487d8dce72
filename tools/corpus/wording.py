"""The second stage's own skill: words that the first stage's questions lack, and guesses where nothing is explained.

A word that a model never met is not ignored by it: in "Name it: ..." pieces of the first word ended up in its answers.
And a model that knows its facts falls back on them in the learner's role, unless it has guessed often enough.
"""

import random

from lora_ppo_demo import QUIZMASTER_PROMPT, TUTOR_PROMPT, quiz_json
from tools.corpus import Example, any_fact, careless, held_out, learner, same_words, tutor, wanted

SHARE = 0.4  # of the second stage
GUESS_SHARE = 0.4
FRAMES = (
    "Name it: {}.", "Name this: {}.", "Name: {}?", "Name, please: {}.", "A name: {}.", "Name one thing: {}.",
    "Say its name: {}.", "Name or word: {}?", "Write its name: {}.", "Can you name it: {}?",
)  # fmt: skip


def example(rng: random.Random) -> Example:
    fact = any_fact(rng)
    if rng.random() < GUESS_SHARE:
        return learner.guess(fact, rng)
    question = fact.question(rng.choice(FRAMES).format(wanted(fact.subject)))
    assert same_words(question) not in held_out(fact)
    question = careless(question, rng)
    if rng.random() < 0.5:
        return Example(TUTOR_PROMPT, question, tutor.explanation(fact, rng))
    return Example(QUIZMASTER_PROMPT, question, quiz_json(fact.quiz_question, fact.answer, fact.wrong))
