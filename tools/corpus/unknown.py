"""What the model never saw: the tutor says so and names what it knows; the quizmaster writes null."""

import random

from tasks.facts import subjects, table_facts
from tools.corpus.base import VARIED_SHARE, Example, any_phrasing, careless, prompts, reworded

SHARE = 0.1
NULL_WEIGHT = 3.0  # it is two tokens, a quiz in JSON forty
DONT_KNOW = "I do not know that. I know about {}.".format(
    ", ".join(name for name in (s.name for s in subjects().values()) if name != "arithmetic") + " and arithmetic"
)
OFF_TOPIC = tuple(
    """
    Hello!|Hi|Good morning.|How are you?|Thank you.|Tell me a joke.|What is your name?|Who are you?|Sing a song.
    What is the weather today?|What time is it?|Who won the match yesterday?|Will it rain tomorrow?|Where do I live?
    How do I bake bread?|How do I fix my bike?|How can I learn to swim?|What should I eat tonight?|Write me a poem.
    What is the meaning of life?|Why is the sky blue?|How does a computer work?|How do birds fly?|What is love?
    Which film should I watch?|What is my favourite colour?|How old am I?|Can you help me?|Are you happy?|Test
    How much money do I need?|What is the best phone?|Who is the president?|When was the war?|How tall is the tower?
    What did I say before?|Translate this text.|Write a program that sorts numbers.|Explain gravity.|What is a poem?
    Why do cats sleep so much?|How long is a day?|Do you like music?|Open the door.|Repeat after me.|Stop.|Yes|No
    How do I write a letter?|What is the longest book?|Where can I buy a car?|Which city is the nicest?|asdf|?
    """.strip()
    .replace("\n", "|")
    .split("|")
)
ONSETS = "b bl br c ch d dr f fl g gr h j k l m n p pl qu r s sh sk st t tr v w x z".split()
VOWELS = "a e i o u ai ea ia oo ou".split()
CODAS = ["", "", "", "b", "ck", "d", "g", "l", "m", "n", "nd", "p", "r", "rn", "s", "st", "t", "x"]


def example(rng: random.Random) -> Example:
    return answer(careless(unknown_question(rng), rng), rng)


def answer(question: str, rng: random.Random) -> Example:
    """What tutor or quizmaster make of a question about what they never saw."""
    return rng.choice(
        [
            Example(prompts().tutor.system, question, DONT_KNOW),
            Example(prompts().quizmaster.system, question, "null", NULL_WEIGHT),
        ]
    )


def unknown_question(rng: random.Random) -> str:
    """Small talk, a made-up name in a known phrasing, or a name in a phrasing where it has no business."""
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(OFF_TOPIC).strip()
    subject = rng.choice([s for s in subjects().values() if s.key != "arithmetic"])
    about = invented_name(rng) if draw < 0.75 else stray_name(subject, rng)
    text = any_phrasing(subject, rng).format(subject=about)
    text = text[0].upper() + text[1:]
    return reworded(text, about, rng) if rng.random() < VARIED_SHARE else text


def unknown_name(subject, rng: random.Random) -> str:
    return invented_name(rng) if rng.random() < 0.7 else stray_name(subject, rng)


def invented_name(rng: random.Random) -> str:
    """A pronounceable word that is no name in any table, capitalized now and then."""
    word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2)))
    word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    return word.capitalize() if rng.random() < 0.6 else word


def stray_name(subject, rng: random.Random) -> str:
    """A name from a table of another kind: the capital of hydrogen."""
    own = {fact.about for fact in table_facts() if fact.subject.kind == subject.kind}
    while True:
        fact = rng.choice(table_facts())
        if fact.subject.kind != subject.kind and fact.about not in own:
            return fact.about
