"""The third stage's own skill: the learner among options that look alike.

A learner that reads by likeness takes "losen" for "lost". Here the options are one word in several spellings, a known
word or one that nobody has met, and right is the one that the explanation spells.
"""

import random
from dataclasses import replace

from tools.corpus import learner, unknown
from tools.corpus.base import Example
from tools.corpus.wording import look_alike

SHARE = 0.8  # of the third stage, beside the others' shares
RESPELLED_SHARE = 0.6
ENDINGS = "s es en ed er e a n t y us ing ves ened".split()


def example(rng: random.Random) -> Example:
    fact = rng.choice(look_alike())
    if rng.random() < RESPELLED_SHARE:
        word = rng.choice((fact.answer, fact.about, unknown.invented_name(rng).lower()))
        answer, *wrong = spellings(word, rng)
        fact = replace(fact, answer=answer, wrong=tuple(wrong))
    return learner.on(fact, rng)


def spellings(word: str, rng: random.Random, count: int = 4) -> list[str]:
    """`count` different spellings of a word."""
    found: list[str] = []
    while len(found) < count:
        spelt = respelt(word, rng) if rng.random() < 0.8 else word
        if spelt and spelt not in found:
            found.append(spelt)
    return found


def respelt(word: str, rng: random.Random) -> str:
    """The word with another ending, another vowel, or a letter doubled, dropped or moved."""
    place = rng.randrange(len(word))
    start, letter, rest = word[:place], word[place], word[place + 1 :]
    vowels = [i for i, one in enumerate(word) if one in "aeiou"]
    kind = rng.choice(("ending", "ending", "cut", "vowel", "double", "drop", "move"))
    if kind == "ending":
        return word + rng.choice(ENDINGS)
    if kind == "cut":
        return word[:-1] + rng.choice(ENDINGS)
    if kind == "vowel" and vowels:
        at = rng.choice(vowels)
        return word[:at] + rng.choice("aeiou") + word[at + 1 :]
    if kind == "double":
        return start + letter * 2 + rest
    if kind == "drop":
        return start + rest
    return start + rest[:1] + letter + rest[1:]
