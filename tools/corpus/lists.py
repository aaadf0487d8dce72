"""Reading a lettered list: which text has which letter, both ways, for every line of it.

No role of the program asks for this. It is the skill beneath solving and learning, four times in one conversation,
where those two show one letter each; without it the letters come millions of tokens later.
"""

import random

from lora_ppo_demo import LETTERS
from tools.corpus import Example, shuffled
from tools.corpus.solver import finding_options

SHARE = 0.14
PROMPT = "Read the list."
WEIGHT = 2.0


def example(rng: random.Random) -> Example:
    lines = list(zip(LETTERS, finding_options(rng), strict=True))
    user = "\n".join(f"{letter}) {option}" for letter, option in lines)
    if rng.random() < 0.5:
        reply = "\n".join(f"{letter}) {option}" for letter, option in shuffled(lines, rng))
    else:
        reply = "\n".join(f" {option}\n{letter}" for letter, option in shuffled(lines, rng))
    return Example(PROMPT, user, reply, WEIGHT)
