"""What the bundled model is trained on: one module a skill, each with `SHARE` and `example(rng) -> Example`.

A new skill is a new module with those two names, added to `skills`. `drill` is none: it fills rows by itself. `wording`
comes in the build's second stage, `spelling` in its third.
"""

import random

from tools.corpus import learner, quizmaster, solver, spelling, tutor, unknown, wording
from tools.corpus.base import Example


def skills(stage: int = 0):
    """The skill modules of a stage of the build, with their shares of the corpus."""
    return [tutor, quizmaster, solver, learner, unknown, *[wording, spelling][:stage]]


def example(rng: random.Random, stage: int = 0) -> Example:
    """A training conversation, each skill in its share."""
    modules = skills(stage)
    return rng.choices(modules, [module.SHARE for module in modules])[0].example(rng)
