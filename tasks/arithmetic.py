"""Sums that are made here, of five levels: a number to find, and nothing to look up.

What is held out is decided by the numbers in a problem: where 7 and 5 are held out, so are 7 + 5, 5 * 7 and 7 - 5, in
whatever words. It is the same with every seed.
"""

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tasks import heldout

LEVELS = {
    "1": "sums and differences to 20",
    "2": "sums and differences to 99",
    "3": "products to 10 times 10",
    "4": "two operations",
    "5": "word problems of one sentence",
}
TRAINING = 9000  # problems of the training split; those of the small levels come again
MOST_TESTS = 200  # of a level in the test split, each once; every level has as many as the smallest
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MISSES = 20_000
PHRASINGS = ("What is {}?", "Calculate {}.", "{} = ?")
# A template, and what is to be done with its numbers. Differences need the first number to be the larger one.
STORIES = (
    ("{who} has {a} {things} and buys {b} more: how many {things} does {who} have now?", "+"),
    ("{who} picks {a} {things} in the morning and {b} in the afternoon: how many {things} are that in all?", "+"),
    ("There are {a} {things} in one box and {b} in another: how many {things} are in both boxes together?", "+"),
    ("{who} had {a} {things} and gave {b} of them away: how many {things} are left?", "-"),
    ("Of {a} {things} on the table {who} takes {b}: how many {things} remain on the table?", "-"),
    ("{who} needs {a} {things} and already has {b}: how many more {things} does {who} need?", "-"),
    ("{who} fills {a} bags with {b} {things} each: how many {things} are in the bags?", "*"),
    ("Each of {a} children has {b} {things}: how many {things} do the children have in all?", "*"),
)
NAMES = "Ada Ben Chloe Dev Emma Farid Greta Hugo Ines Jonas Kira Leo Mina Noah Olga Paul".split()
THINGS = "apples pencils shells marbles books stamps coins cards eggs flowers".split()


@dataclass(frozen=True)
class Sum:
    """A problem, its value, and the numbers in it, which decide the split that it belongs to."""

    question: str
    value: int
    level: str
    numbers: tuple[int, ...]


def sums(split: Literal["train", "test"], seed: int, levels: list[str], test_share: float) -> list[Sum]:
    """The problems of a split; the levels take turns, a level that is named twice has two.

    The training split has TRAINING of them. Those of the test split are all different. None where a level has none.
    """
    rng = random.Random(f"arithmetic/{split}/{seed}")
    drawn = {level: stream(level, rng, split == "test", test_share) for level in levels}
    if split == "train":
        found = [next(drawn[levels[i % len(levels)]], None) for i in range(TRAINING)]
        return [] if None in found else found
    unseen = {level: list(distinct(drawn[level], MOST_TESTS * levels.count(level))) for level in drawn}
    rounds = min(len(found) // levels.count(level) for level, found in unseen.items())
    return [unseen[level].pop() for _ in range(rounds) for level in levels]


def stream(level: str, rng: random.Random, tests: bool, test_share: float) -> Iterator[Sum]:
    """Problems of a level and a split, without end; an end only where MISSES in a row are of the other split."""
    misses = 0
    while misses < MISSES:
        drawn = draw(level, rng)
        misses += 1
        if held_out(drawn.numbers, test_share) == tests:
            misses = 0
            yield drawn


def distinct(drawn: Iterator[Sum], most: int) -> Iterator[Sum]:
    """Those that are new, until there are `most`, or a thousand in a row were not."""
    seen: set[str] = set()
    old = 0
    for one in drawn:
        old = old + 1 if one.question in seen else 0
        if not old:
            seen.add(one.question)
            yield one
        if len(seen) == most or old == 1000:
            return


def held_out(numbers: tuple[int, ...], test_share: float) -> bool:
    """Whether problems with these numbers, in whatever order, are of the test split."""
    return heldout.held_out(" ".join(map(str, sorted(numbers))), test_share)


def draw(level: str, rng: random.Random) -> Sum:
    """A problem of a level, of either split."""
    if level == "5":
        return story(rng)
    numbers, expression, value = (two_operations if level == "4" else one_operation)(level, rng)
    return Sum(rng.choice(PHRASINGS).format(expression), value, level, numbers)


def one_operation(level: str, rng: random.Random) -> tuple[tuple[int, ...], str, int]:
    if level == "3":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return (a, b), f"{a} * {b}", a * b
    whole = rng.randint(0, 20) if level == "1" else rng.randint(21, 99)  # the largest number in it
    part = rng.randint(0, whole)
    if rng.random() < 0.5:
        return (part, whole - part), f"{part} + {whole - part}", whole
    return (whole, part), f"{whole} - {part}", whole - part


def two_operations(level: str, rng: random.Random) -> tuple[tuple[int, ...], str, int]:
    """Such as 3 + 4 * 5 and (3 + 4) * 5: nothing negative, nothing above 200."""
    while True:
        a, b, c = (rng.randint(1, 20) for _ in range(3))
        first, second = rng.choice("+-*"), rng.choice("+-*")
        text = f"({a} {first} {b}) {second} {c}" if rng.random() < 0.5 else f"{a} {first} {b} {second} {c}"
        left_first = "(" in text or second != "*" or first == "*"
        value = OPERATIONS[second](OPERATIONS[first](a, b), c) if left_first else OPERATIONS[first](a, b * c)
        if 0 <= value <= 200:
            return (a, b, c), text, value


def story(rng: random.Random) -> Sum:
    template, operation = rng.choice(STORIES)
    a, b = (rng.randint(2, 10), rng.randint(2, 10)) if operation == "*" else (rng.randint(2, 60), rng.randint(2, 39))
    a, b = (max(a, b), min(a, b)) if operation == "-" else (a, b)
    question = template.format(who=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    return Sum(question, OPERATIONS[operation](a, b), "5", (a, b))
