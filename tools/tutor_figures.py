"""The figures of the bundled model, measured through the program's own functions at its default settings.

Facts are asked in phrasings that never occur in training; questions about what the model never saw are new too.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.generate import Request, replies
from lora_ppo.loading import load_policy
from lora_ppo.quiz import (
    Quiz,
    learner_choices,
    learner_probabilities,
    option_probabilities,
    parse_quiz,
    quiz_text,
    shuffle_quiz,
)
from lora_ppo.quizmaster import quiz_request, survives
from tasks.facts import Fact, arithmetic_facts, subjects, table_facts
from tasks.questions import states
from tools.corpus import tutor
from tools.corpus.base import ARITHMETIC_SHARE, shuffled
from tools.corpus.unknown import invented_name

STRANGE_QUESTIONS = (
    "How do I repair a clock?",
    "What did you eat for breakfast?",
    "Nice to meet you!",
    "Which shoes should I wear?",
    "Who will win the election?",
    "Can you dance?",
    "Why do people dream?",
    "Tell me a story about a dragon.",
)


def held_out_facts(count: int, rng: random.Random) -> list[Fact]:
    """Facts of the tables and of arithmetic in the corpus' proportion, no fact twice."""
    sums = round(count * ARITHMETIC_SHARE)
    return rng.sample(table_facts(), count - sums) + rng.sample(arithmetic_facts(), sums)


def measure(policy, facts: list[Fact], rng: random.Random) -> dict[str, tuple[int, int]]:
    """Every figure as (how many, of how many)."""
    import torch

    hits: dict[str, list[bool]] = {}

    def count(name: str, hit: bool) -> None:
        hits.setdefault(name, []).append(hit)

    torch.manual_seed(rng.randrange(2**31))
    questions = [fact.question(rng.choice(fact.subject.held_out)) for fact in facts]
    for fact, (answer, written) in zip(facts, answers_and_quizzes(policy, questions), strict=True):
        count("answer explains the fact", states(answer, fact))
        parts = parse_quiz(written)
        count("quiz JSON valid, options distinct", parts is not None)
        if parts:
            right = parts[1] == fact.answer
            kind = "arithmetic" if fact.subject.key == "arithmetic" else "tables"
            count("quiz key right before the gate", right)
            count(f"quiz key right before the gate: {kind}", right)
            passed = survives(policy, shuffle_quiz(*parts))
            count("quiz passes the gate", passed)
            if passed:
                count("quiz key right after the gate", right)
        options = shuffled(fact.options, rng)
        asked = policy.prompts.solver.messages(quiz_text(fact.quiz_question, options))
        pick = option_probabilities(policy, [asked], [options])
        count("solver right", options[int(pick.argmax())] == fact.answer)
        quiz = Quiz(fact.quiz_question, tuple(options), options.index(fact.answer))
        texts = tutor.clear(fact.statement, rng), tutor.evasive(rng)
        picks = learner_choices(*learner_probabilities(policy, texts, [quiz] * 2))
        for name, pick in zip(("learner right, clear", "learner right, evasive"), picks, strict=True):
            count(name, pick == quiz.key)
    for answer, written in answers_and_quizzes(policy, strange_questions(rng)):
        count("says it does not know what it never saw", bool(re.match("I do not know", answer)))
        count("no quiz on what it never saw", written == "null")
    return {name: (sum(values), len(values)) for name, values in hits.items()}


def answers_and_quizzes(policy, questions: list[str], at_once: int = 20) -> Iterator[tuple[str, str]]:
    """The tutor's answer to each question, without adapters, and the quizmaster's reply."""
    from rich.progress import track

    for start in track(range(0, len(questions), at_once), description="asking"):
        some = questions[start : start + at_once]
        prompts = [encode_chat(policy.tokenizer, policy.prompts.tutor.messages(question)) for question in some]
        requests = [Request(prompt, policy.config.temperature, adapter=False) for prompt in prompts]
        requests += [quiz_request(policy, question) for question in some]
        texts = [policy.text(ids) for ids in replies(policy, requests)]
        yield from zip(texts[: len(some)], texts[len(some) :], strict=True)


def strange_questions(rng: random.Random, invented: int = 32) -> list[str]:
    """Small talk that is in no table, and held-out phrasings about names that do not exist."""
    pool = [template for subject in subjects().values() if subject.key != "arithmetic" for template in subject.held_out]
    return [*STRANGE_QUESTIONS, *(rng.choice(pool).format(subject=invented_name(rng)) for _ in range(invented))]


def evaluate(model: Path, samples: int, seed: int) -> dict[str, float]:
    """Prints the figures as a table and writes them into the README.md of the model's folder; returns the shares."""
    import torch

    policy, _ = load_policy(Config(model_name=str(model)))
    rng = random.Random(seed + 1)
    with torch.no_grad():
        figures = measure(policy, held_out_facts(samples, rng), rng)
    rows = [f"| {name} | {100 * hit / of:.1f} % | {hit} of {of} |" for name, (hit, of) in figures.items()]
    table = "\n".join(["| on held-out phrasings | share | count |", "| --- | --- | --- |", *rows])
    print(table)

    (model / "README.md").write_text(CARD.format(table=table), encoding="utf-8")
    return {name: round(hit / of, 4) for name, (hit, of) in figures.items()}


CARD = """---
license: apache-2.0
library_name: transformers
---
# tutor-tiny

The bundled model of the tutor: a Llama trained from scratch by `tools/build_tutor_model.py` on conversations made from
the tables in `data/`. It explains, writes quizzes, solves them, and reads explanations, each under its own system
prompt, and knows nothing outside those tables. Its tutor voice is evasive about half of the time, on purpose: that is
what PPO trains away.

Built with `python tools/build_tutor_model.py`; measured by
`python tools/build_tutor_model.py --evaluate`, at the program's default temperatures:

{table}
"""
