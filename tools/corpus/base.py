"""What the skills of the corpus share: the form of an example, facts at random, questions as people type them."""

import random
import re
from dataclasses import dataclass
from functools import cache

from lora_ppo.prompts import Prompts, load_prompts
from lora_ppo.settings import BUNDLED_MODEL, PROMPTS_FILE
from tasks.facts import Fact, Subject, arithmetic_facts, in_words, table_facts

ARITHMETIC_SHARE = 0.25
FRAME_SHARE = 0.25  # of the questions: what the subject's "Tell me ..." asks for, asked in another sentence
FRAMES = (
    "Can you tell me {}?", "Could you say what {} is?", "I need {}.", "I would like to hear {}.", "What would {} be?",
    "{}?", "Please write down {}.", "My homework asks for {}.", "Help me with {}.", "Have you got {}?",
    "Let me hear {}.", "What can you say about {}?", "I have to learn {}.", "We want {}, what is it?",
)  # fmt: skip
VARIED_SHARE = 0.6  # of the questions
VERBS = "Give me|Say|State|Explain|Show me|Write|Teach me|Recall|List|Find|Answer:|I forgot|I look for".split("|")
FILLERS = "please exactly now then really um well actually just again maybe so".split()
SMALL = set("what which is are the of a do does you know it its to tell me there people".split())
OPENINGS = ("",) * 6 + ("Please: ", "Hello, ", "Quick question: ", "A question: ", "My friend asks: ", "I wonder: ")
ENDINGS = ("",) * 6 + (" Thanks!", " Please.", " I forgot.", " It is for school.", ", do you know?", " please")
PRODUCT_SHARE = 0.1  # of arithmetic: the hundred products would drown among ten thousand sums


@dataclass(frozen=True)
class Example:
    """One training conversation. The loss is on `reply` alone, each token weighing `weight`."""

    system: str
    user: str
    reply: str
    weight: float = 1.0


@cache
def prompts() -> Prompts:
    """What the bundled model is told in each role; they stand in its folder."""
    return load_prompts(BUNDLED_MODEL / PROMPTS_FILE)


def any_fact(rng: random.Random) -> Fact:
    """A fact: of the tables, each as often as any other, or of arithmetic."""
    if rng.random() >= ARITHMETIC_SHARE:
        return rng.choice(table_facts())
    facts = arithmetic_facts()
    products = 100
    return rng.choice(facts[-products:] if rng.random() < PRODUCT_SHARE else facts[:-products])


def any_phrasing(subject: Subject, rng: random.Random) -> str:
    """A template of the subject's own, or its "Tell me ..." in another frame."""
    if rng.random() >= FRAME_SHARE:
        return rng.choice(subject.ask)
    return rng.choice(FRAMES).format(wanted(subject))


def wanted(subject: Subject) -> str:
    """What the subject's "Tell me ..." asks for: the capital of {subject}."""
    (template,) = (template for template in subject.ask if template.startswith("Tell me "))
    return template.removeprefix("Tell me ").rstrip(".")


def any_question(fact: Fact, rng: random.Random) -> str:
    """The fact asked for in one of the training phrasings, in varied words more often than not, or typed carelessly."""
    question = fact.question(any_phrasing(fact.subject, rng))
    if rng.random() < VARIED_SHARE:
        other = reworded(question, fact.about, rng)
        question = question if same_words(other) in held_out(fact) else other
    return careless(question, rng)


def held_out(fact: Fact) -> set[str]:
    """The words of the phrasings that no training question may have."""
    return {same_words(fact.question(template)) for template in fact.subject.held_out}


def same_words(question: str) -> str:
    return question.casefold().rstrip("?.").strip()


def reworded(question: str, about: str, rng: random.Random) -> str:
    """The question with other small words around those that matter, as people vary them."""
    start = question.casefold().find(about.casefold())
    before, name, after = question[:start], question[start : start + len(about)], question[start + len(about) :]
    if before.startswith("Tell me"):
        before = rng.choice(VERBS) + before[len("Tell me") :]
    dropped = rng.choice((0.0, 0.3, 0.6))
    left, right = (
        [word for word in part.split() if word.lower() not in SMALL or rng.random() >= dropped]
        for part in (before, after)
    )
    if rng.random() < 0.3:
        side = rng.choice((left, right))
        side.insert(rng.randint(0, len(side)), rng.choice(FILLERS))
    turned = rng.random() < 0.15
    words = [name + ":", *left, *right] if turned else [*left, name, *right]
    text = rng.choice(OPENINGS) + " ".join(words) + rng.choice(ENDINGS)
    return re.sub(r" ([?.,:])", r"\1", text).strip()


def careless(question: str, rng: random.Random) -> str:
    """The question as people type it: sometimes in lower case, without its mark, with sums in words."""
    if " + " in question or " - " in question or " * " in question:
        question = in_words(question) if rng.random() < 0.4 else question
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    return question


def shuffled(options, rng: random.Random) -> list[str]:
    options = list(options)
    rng.shuffle(options)
    return options
