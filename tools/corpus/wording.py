"""The second stage's own skill: what the first stage had too little of.

Questions, about known and unknown things, in words that the other questions lack: a word that a model never met is not
ignored by it; in "Name it: ..." pieces of the first word ended up in its answers. And two things of the learner's:
guesses, as a model that knows its facts falls back on them, and options that look alike (losed, losen, lost).
"""

import random
from functools import cache

from lora_ppo.quiz import quiz_json
from tasks.facts import Fact, subjects, table_facts
from tools.corpus import learner, tutor, unknown
from tools.corpus.base import Example, any_fact, careless, prompts, wanted

SHARE = 0.5  # of the second stage
KINDS = {"question": 0.4, "unknown": 0.12, "guess": 0.24, "alike": 0.24}
FRAMES = (
    "Name it: {}.", "Name this: {}.", "Name: {}?", "Name, please: {}.", "A name: {}.", "Name one thing: {}.",
    "Say its name: {}.", "Name or word: {}?", "Write its name: {}.", "Can you name it: {}?",
)  # fmt: skip
LOOK_ALIKE = ("past_tenses", "plurals", "opposites", "elements")


@cache
def look_alike() -> list[Fact]:
    return [fact for fact in table_facts() if fact.subject.key in LOOK_ALIKE]


def example(rng: random.Random) -> Example:
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    if kind == "guess":
        return learner.guess(any_fact(rng), rng)
    if kind == "alike":
        return learner.on(rng.choice(look_alike()), rng)
    if kind == "unknown":
        subject = rng.choice([subject for subject in subjects().values() if subject.key != "arithmetic"])
        question = rng.choice(FRAMES).format(wanted(subject)).format(subject=unknown.unknown_name(subject, rng))
        return unknown.answer(careless(question, rng), rng)
    fact = any_fact(rng)
    question = careless(fact.question(rng.choice(FRAMES).format(wanted(fact.subject))), rng)
    if rng.random() < 0.5:
        return Example(prompts().tutor.system, question, tutor.explanation(fact, rng))
    return Example(prompts().quizmaster.system, question, quiz_json(fact.quiz_question, fact.answer, fact.wrong))
