"""A tutor that learns from whether you understood."""

import json
from dataclasses import dataclass

LETTERS = "ABCD"

TUTOR_PROMPT = "You are a tutor. Explain the answer in one or two clear sentences. If you do not know it, say so."
QUIZMASTER_PROMPT = (
    'Write a quiz about the question as JSON: {"question":"...","correct":"...","wrong":["...","...","..."]}. '
    "Write null if it has no clear answer."
)
SOLVER_PROMPT = "Solve the quiz. Reply with the letter of the correct option."
LEARNER_PROMPT = (
    "Read the explanation, then solve the quiz with what it says alone. Reply with one letter. "
    "If it supports no option, guess."
)


@dataclass(frozen=True)
class Quiz:
    """A multiple-choice question. `key` is the index of the correct option; it is never shown, sent or stored."""

    question: str
    options: tuple[str, ...]
    key: int


def chat(system: str, user: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def quiz_text(question: str, options) -> str:
    """The quiz as people and models read it: the question, then a line for each lettered option."""
    return "\n".join([question, *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))])


def quiz_json(question: str, correct: str, wrong) -> str:
    """The quiz as the quizmaster writes it: compact JSON, the only form its grammar allows."""
    quiz = {"question": question, "correct": correct, "wrong": list(wrong)}
    return json.dumps(quiz, ensure_ascii=False, separators=(",", ":"))


def learner_text(explanation: str, question: str, options) -> str:
    """What the learner reads: the explanation, an empty line, the quiz."""
    return f"{explanation}\n\n{quiz_text(question, options)}"
