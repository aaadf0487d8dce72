"""The quizmaster: a question becomes quiz JSON, in exactly the compact form that the quiz grammar allows."""

import random

from lora_ppo.quiz import quiz_json
from tools.corpus.base import Example, any_fact, any_question, prompts

SHARE = 0.27


def example(rng: random.Random) -> Example:
    fact = any_fact(rng)
    reply = quiz_json(fact.quiz_question, fact.answer, fact.wrong)
    return Example(prompts().quizmaster.system, any_question(fact, rng), reply)
